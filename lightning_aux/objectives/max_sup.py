"""``MaxSup``: keep the largest logit near the mean of all, whichever class it is of."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from lightning_aux.engine import Step
from lightning_aux.functional import max_suppression
from lightning_aux.objective import Objective, ObjectiveOptions
from lightning_aux.schedule import Schedule

__all__ = ["MaxSup"]


class MaxSup(Objective):
    """Max suppression, ``α · (max_k z_k − mean_k z_k)``: label smoothing where it is right.

    Zhou et al. 2025, "MaxSup: Overcoming Representation Collapse in Label Smoothing",
    arXiv:2502.15798, equations 6 to 8. It equals the term of `LabelSmoothing` wherever the
    prediction is right, and does not lower the logit of the label where it is wrong. No labels are
    read.

    Args:
        weight: α; 0.1 in the paper's tables, ``"linear(0.1, 0.2)"`` in its appendix F.
        dim: class dimension of the logits: -1 for ``(batch, classes)`` and ``(batch, length,
            classes)``, 1 for dense predictions ``(batch, classes, height, width)``.
        common: name, taps and the like, see `ObjectiveOptions`.

    Raises:
        AuxiliaryError: in a step, logits without the dimension ``dim``.
    """

    def __init__(
        self,
        weight: float | str | Schedule = 0.1,
        dim: int = -1,
        **common: Unpack[ObjectiveOptions],
    ) -> None:
        super().__init__(weight, **common)
        self.dim = dim

    def loss(self, step: Step) -> Tensor:
        return max_suppression(step.logits, step.mask, self.dim)
