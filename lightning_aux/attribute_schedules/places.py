"""``Place``: one number of the user's that a schedule drives, and gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

__all__ = ["AttributePlace", "GroupPlace", "Place", "is_number"]


class Place(ABC):
    """Where a number is.

    Args:
        path: what the user calls it.
        owner: the object that holds it.
        key: its name there.
        index: position in a sequence that is the entry (``betas``), if it is one.
    """

    def __init__(self, path: str, owner: Any, key: str, index: int | None = None) -> None:
        self.path = path
        self.owner = owner
        self.key = key
        self.index = index

    @property
    def identity(self) -> tuple[int, str, int | None]:
        """The same for two places that are one."""
        return id(self.owner), self.key, self.index

    @abstractmethod
    def _read(self) -> Any: ...

    @abstractmethod
    def _write(self, value: Any) -> None: ...

    def get(self) -> Any:
        """What is there now: a number, or a tensor of one element."""
        held = self._read()
        return held if self.index is None else held[self.index]

    def set(self, value: float) -> None:
        """Put a number there; a tensor is filled, which neither synchronises nor recompiles."""
        held = self._read()
        if self.index is not None:
            parts = list(held)
            parts[self.index] = value
            self._write(type(held)(parts))
        elif isinstance(held, Tensor):
            with torch.no_grad():
                held.fill_(value)
        else:
            self._write(value)

    def plain(self) -> float | int:
        """What is there now, as a plain number."""
        value = self.get()
        return float(value) if isinstance(value, Tensor) else value

    def give_back(self, value: float | int) -> None:
        """Put the user's own number back."""
        self.set(value)


class AttributePlace(Place):
    """An attribute of an object."""

    def _read(self) -> Any:
        return getattr(self.owner, self.key)

    def _write(self, value: Any) -> None:
        setattr(self.owner, self.key, value)


class GroupPlace(Place):
    """An entry of a parameter group, found anew each time: restoring replaces the groups.

    Args:
        path: what the user calls it.
        optimizer: a torch optimizer.
        group: position of the group.
        key: its entry.
        index: position in a sequence that is the entry, if it is one.
    """

    def __init__(
        self, path: str, optimizer: Any, group: int, key: str, index: int | None = None
    ) -> None:
        super().__init__(path, optimizer, f"{group}.{key}", index)
        self._group = group
        self._entry = key

    def _read(self) -> Any:
        return self.owner.param_groups[self._group][self._entry]

    def _write(self, value: Any) -> None:
        self.owner.param_groups[self._group][self._entry] = value


def is_number(value: Any) -> bool:
    """Whether a schedule can take this value's place: a number, or a tensor of one float."""
    if isinstance(value, Tensor):
        trained = isinstance(value, torch.nn.Parameter)
        return value.numel() == 1 and value.is_floating_point() and not trained
    return isinstance(value, int | float) and not isinstance(value, bool)
