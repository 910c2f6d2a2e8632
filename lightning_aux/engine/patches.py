"""Instance attributes that are replaced for the time of a fit and put back afterwards."""

from __future__ import annotations

from typing import Any

__all__ = ["Patches"]

_ABSENT = object()


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

    def undo(self) -> None:
        """Put everything back, the latest replacement first."""
        while self._done:
            owner, name, value, before = self._done.pop()
            if owner.__dict__.get(name, _ABSENT) is not value:
                continue
            if before is _ABSENT:
                del owner.__dict__[name]
            else:
                owner.__dict__[name] = before
