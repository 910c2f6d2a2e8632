"""``Taps``: where logits, target, features and input are, said once for all objectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_aux.engine import Attached, Engine, Locations, Tap

__all__ = ["Taps"]


class Taps(Attached):
    """Says where the common things are in the user's model and batch.

    As a callback it speaks for every objective of the Trainer; handed to one objective
    (``taps=Taps(...)``) it speaks for that one and takes precedence.

    Args:
        logits: module path whose output is the logits, or a callable that gets a
            `Step` (or a teacher's pass) and returns them. Default: what the
            module's own ``forward`` returned.
        target: key path into the batch (``"1"``, ``"labels"``, ``"graph.y"``), or a callable.
            Default: the second element, or the first of the keys ``labels``, ``label``,
            ``targets``, ``target``, ``y``.
        features: module path or glob whose output ``step.features()`` gives, or a callable.
        input: module path whose input ``step.input()`` gives, or a callable. Default: the input
            of the model.
        mask: key path into the batch (``"attention_mask"``), or a callable: which examples count,
            as booleans or weights in the shape of the logits without their class dimension.
            Default: all of them.
        forward: ``(module, batch) -> output``, how a teacher runs the model where ``training_step``
            does not call ``self(...)`` but several parts one after the other; for a whole Trainer
            only. Name ``logits`` too then.

    Raises:
        AuxiliaryError: before training, when a path names no module (near matches are listed).

    Examples:
        >>> taps = Taps(logits="classifier", target="labels")
        >>> taps.locations.logits
        'classifier'
    """

    def __init__(
        self,
        logits: Tap | None = None,
        target: Tap | None = None,
        features: Tap | None = None,
        input: Tap | None = None,
        mask: Tap | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        super().__init__("taps")
        self.locations = Locations(logits, target, features, input, mask, forward)

    def attach(self, engine: Engine) -> None:
        engine.locations = self.locations
