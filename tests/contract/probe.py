"""`Probe`: the smallest objective with a head, for what the contract says about heads."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_aux import Objective, Step
from tests.contract.models import CLASSES, HIDDEN

SILENT_STEPS = 3


class Probe(Objective):
    """A linear classifier on the encoder's features; silent in the first steps."""

    def __init__(self, weight: float | str = f"late(0.5, start={SILENT_STEPS})") -> None:
        super().__init__(weight, reads=("encoder",))

    def build_head(self, module: nn.Module) -> nn.Module:
        return nn.Linear(HIDDEN, CLASSES)

    def loss(self, step: Step) -> Tensor:
        return F.cross_entropy(self.head(step.features("encoder")), step.target)
