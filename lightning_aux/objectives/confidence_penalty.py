"""``ConfidencePenalty``: a bonus for the entropy of predictions."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from lightning_aux.engine import AuxiliaryError, Step
from lightning_aux.functional import confidence_penalty
from lightning_aux.objective import Objective, ObjectiveOptions
from lightning_aux.schedule import Schedule

__all__ = ["ConfidencePenalty"]


class ConfidencePenalty(Objective):
    """Rewards the entropy of predictions, ``−β · H(q)``, or only where it is below a threshold.

    Pereyra et al. 2017, "Regularizing Neural Networks by Penalizing Confident Output
    Distributions", arXiv:1701.06548; the entropy bonus beside an anchor in Hou et al. 2025,
    arXiv:2501.11651. See `functional.confidence_penalty`. No labels are read.

    Args:
        weight: β; the paper lets it grow in some experiments, for example
            ``"linear(0, 0.1, until=30%)"``.
        threshold: Γ in nats: ``max(0, Γ − H)`` instead, which leaves predictions alone that are
            uncertain enough. At most the logarithm of the number of classes makes sense.
        dim: class dimension of the logits: -1 for ``(batch, classes)`` and ``(batch, length,
            classes)``, 1 for dense predictions ``(batch, classes, height, width)``.
        common: name, taps and the like, see `ObjectiveOptions`.

    Raises:
        AuxiliaryError: a threshold that is not above 0; in a step, logits without the dimension
            ``dim``.
    """

    def __init__(
        self,
        weight: float | str | Schedule = 0.1,
        threshold: float | None = None,
        dim: int = -1,
        **common: Unpack[ObjectiveOptions],
    ) -> None:
        super().__init__(weight, **common)
        if threshold is not None and not threshold > 0:
            raise AuxiliaryError(
                f"{self.name}: threshold={threshold} must be above 0 nats; leave it out for the "
                f"entropy without a threshold."
            )
        self.threshold = threshold
        self.dim = dim

    def loss(self, step: Step) -> Tensor:
        return confidence_penalty(step.logits, self.threshold, step.mask, self.dim)
