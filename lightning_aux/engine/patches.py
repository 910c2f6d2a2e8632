"""Instance attributes that are replaced for the time of a fit and put back afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import update_wrapper
from typing import Any

__all__ = ["Patches", "Wrapper"]

_ABSENT = object()


class Wrapper:
    """A function in place of a method, which copies and pickles as the method.

    A copy of the user's module made during training (their own average, a snapshot) is thereby
    the copy it would be without us: its methods are bound to it, not to the original.

    Args:
        method: what is replaced.
        function: what is called instead.
        transparent: whether ``inspect`` and Lightning look through to ``method``.
    """

    def __init__(
        self, method: Callable[..., Any], function: Callable[..., Any], transparent: bool = True
    ) -> None:
        # Not its __dict__: torch.compile would follow an attribute past this wrapper.
        update_wrapper(self, method, updated=())
        self.__code__ = function.__code__
        if not transparent:
            del self.__wrapped__
        self._method = method
        self._function = function

    __wrapped__: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._method, memo)

    def __reduce__(self) -> Any:
        return copy.copy, (self._method,)


class Patches:
    """Replaces attributes on single instances and restores exactly what was there before.

    Classes are never touched. Where somebody else has replaced the attribute after us, theirs is
    left in place: our wrapper underneath passes calls through once the engine is detached.
    """

    def __init__(self) -> None:
        self._done: list[tuple[Any, str, Any, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set ``owner.name`` on the instance, past any ``__setattr__`` of its class."""
        self._done.append((owner, name, value, owner.__dict__.get(name, _ABSENT)))
        owner.__dict__[name] = value

    def wrap(
        self, owner: Any, name: str, function: Callable[..., Any], transparent: bool = True
    ) -> None:
        """Have ``function`` called in place of the method ``owner.name``."""
        self.set(owner, name, Wrapper(getattr(owner, name), function, transparent))

    def undo(self) -> None:
        """Put everything back, the latest replacement first."""
        while self._done:  # each is forgotten once it is done, should Ctrl-C come in between
            owner, name, value, before = self._done[-1]
            if owner.__dict__.get(name, _ABSENT) is value:
                if before is _ABSENT:
                    del owner.__dict__[name]
                else:
                    owner.__dict__[name] = before
            self._done.pop()
