"""``AuxiliaryMixin``: for people who own the module and want objectives to travel with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_aux.engine import Attached

__all__ = ["AuxiliaryMixin"]

_MADE = "_auxiliary_callbacks_made"


class AuxiliaryMixin:
    """Hands callbacks over through ``LightningModule.configure_callbacks``; nothing more.

    Put it before ``LightningModule`` in the bases and override `auxiliary_callbacks`, or
    use the ready ones (`SelfDistillationMixin` and so on). Several mixins
    add up. Lightning lets a module's callback replace a Trainer callback of the same class.

    The callbacks are made once per module, when Lightning first asks, so that a second ``fit`` goes
    on with their teachers and memories; a copy of the module makes its own.

    Examples:
        >>> import lightning as L, lightning_aux as aux
        >>> class Net(aux.AuxiliaryMixin, L.LightningModule):
        ...     def auxiliary_callbacks(self):
        ...         return [*super().auxiliary_callbacks(), aux.EMATeacher(decay=0.99)]
        >>> [type(callback).__name__ for callback in Net().configure_callbacks()]
        ['EMATeacher']
    """

    def auxiliary_callbacks(self) -> list[Attached]:
        """The callbacks that come with this module."""
        return []

    def configure_callbacks(self) -> list[Any]:
        """What LightningModule asks for: the module's other callbacks, then these."""
        others: Any = super().configure_callbacks()  # type: ignore[misc]
        if not isinstance(others, Sequence):  # Lightning also takes a single callback, and None
            others = [] if others is None else [others]
        if _MADE not in self.__dict__:
            self.__dict__[_MADE] = self.auxiliary_callbacks()
        return [*others, *self.__dict__[_MADE]]

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[assignment]
        return {key: value for key, value in state.items() if key != _MADE}
