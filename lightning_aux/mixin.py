"""``AuxiliaryMixin``: for people who own the module and want objectives to travel with it."""

from __future__ import annotations

from typing import Any

from lightning_aux.engine import Attached

__all__ = ["AuxiliaryMixin"]


class AuxiliaryMixin:
    """Hands callbacks over through ``LightningModule.configure_callbacks``; nothing more.

    Put it before ``LightningModule`` in the bases and override `auxiliary_callbacks`, or
    use the ready ones (`SelfDistillationMixin` and so on). Several mixins
    add up. Lightning lets a module's callback replace a Trainer callback of the same class.

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
        others: list[Any] = list(super().configure_callbacks())  # type: ignore[misc]
        return [*others, *self.auxiliary_callbacks()]
