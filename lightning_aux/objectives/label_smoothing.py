"""``LabelSmoothing``: keep the logit of the label near the mean of all."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from lightning_aux.engine import Step
from lightning_aux.functional import label_smoothing
from lightning_aux.objective import Objective, ObjectiveOptions
from lightning_aux.schedule import Schedule

__all__ = ["LabelSmoothing"]


class LabelSmoothing(Objective):
    """Label smoothing as a term beside an unsmoothed cross entropy: ``ε · (z_y − mean_k z_k)``.

    Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision",
    arXiv:1512.00567, section 7, in the form of a regulariser of Zhou et al. 2025,
    arXiv:2502.15798, theorem 3.3: with weight ε the total is exactly the cross entropy with targets
    ``(1 − ε) · onehot + ε/K``. See `functional.label_smoothing`.

    The mean is over ALL examples. torch's loss divides by those that have a label: where only a
    share s of them has one (padding is −100, say), a weight of ε/s gives what its ε gives.

    What it costs is the ranking of predictions by confidence (Xia et al. 2025, "Understanding Why
    Label Smoothing Degrades Selective Classification and How to Fix It", arXiv:2403.14715); attach
    `SelectiveClassification` to see it on your data.

    Args:
        weight: ε, in [0, 1); may be a schedule.
        dim: class dimension of the logits: -1 for ``(batch, classes)`` and ``(batch, length,
            classes)``, 1 for dense predictions ``(batch, classes, height, width)``.
        common: name, taps and the like, see `ObjectiveOptions`.

    Raises:
        AuxiliaryError: in a step, logits without the dimension ``dim``, or a target that is
            neither class indices in the shape of the examples nor probabilities.
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
        return label_smoothing(step.logits, step.target, step.mask, self.dim)
