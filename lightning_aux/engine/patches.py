"""Instance attributes that are replaced for the time of a fit and put back afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import update_wrapper
from typing import Any

__all__ = ["Patches", "Wrapper", "evaluation_loop"]

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


class Surrounded(Wrapper):
    """A method that is called within the contexts that several have asked for, in their order."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.contexts: list[Callable[[], AbstractContextManager[None]]] = []
        self.removal = Patches()  # of this wrapper itself

        def within(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                for each in self.contexts:
                    stack.enter_context(each())
                return method(*args, **kwargs)

        super().__init__(method, within)


class Patches:
    """Replaces attributes on single instances and restores exactly what was there before.

    Classes are never touched. Where somebody else has replaced the attribute after us, theirs is
    left in place: our wrapper underneath passes calls through once the engine is detached.
    """

    def __init__(self) -> None:
        self._done: list[tuple[Any, str, Any, Any]] = []
        self._surrounding: list[tuple[Surrounded, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set ``owner.name`` on the instance, past any ``__setattr__`` of its class."""
        self._done.append((owner, name, value, owner.__dict__.get(name, _ABSENT)))
        owner.__dict__[name] = value

    def wrap(
        self, owner: Any, name: str, function: Callable[..., Any], transparent: bool = True
    ) -> None:
        """Have ``function`` called in place of the method ``owner.name``."""
        self.set(owner, name, Wrapper(getattr(owner, name), function, transparent))

    def surround(
        self, owner: Any, name: str, context: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Have the method ``owner.name`` called within ``context()``.

        Several may surround one method, and end that in any order.
        """
        there = owner.__dict__.get(name)
        if not isinstance(there, Surrounded):
            there = Surrounded(getattr(owner, name))
            there.removal.set(owner, name, there)
        there.contexts.append(context)
        self._surrounding.append((there, context))

    def undo(self) -> None:
        """Put everything back, the latest replacement first."""
        while self._surrounding:
            there, context = self._surrounding[-1]
            if context in there.contexts:
                there.contexts.remove(context)
            if not there.contexts:
                there.removal.undo()
            self._surrounding.pop()
        while self._done:  # each is forgotten once it is done, should Ctrl-C come in between
            owner, name, value, before = self._done[-1]
            if owner.__dict__.get(name, _ABSENT) is value:
                if before is _ABSENT:
                    del owner.__dict__[name]
                else:
                    owner.__dict__[name] = before
            self._done.pop()


def evaluation_loop(trainer: Any, stage: str) -> Any:
    """The loop whose ``run`` is the whole evaluation of a stage; in ``fit`` the validation's."""
    loops = {
        "fit": trainer.fit_loop.epoch_loop.val_loop,
        "validate": trainer.validate_loop,
        "test": trainer.test_loop,
        "predict": trainer.predict_loop,
    }
    return loops[stage]
