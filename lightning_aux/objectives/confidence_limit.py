"""``ConfidenceLimit``: train for the chance that one of N answers is right."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from lightning_aux.engine import AuxiliaryError, Step
from lightning_aux.functional import coverage_loss
from lightning_aux.objective import Objective, ObjectiveOptions
from lightning_aux.schedule import Schedule

__all__ = ["ConfidenceLimit"]


class ConfidenceLimit(Objective):
    """Turns the cross entropy into direct coverage optimisation, ``−log(1 − (1 − p)^N)``.

    Chen et al. 2025, "Rethinking Fine-Tuning when Scaling Test-Time Compute: Limiting Confidence
    Improves Mathematical Reasoning", arXiv:2502.07154, with p the probability of the right answer.
    Examples whose p is well above 1/N stop to matter. See `functional.coverage_loss`, which names
    the gradient.

    The term is the difference from the cross entropy, ``DCO − CE``, so that with ``weight=1`` the
    loss of a module that returns the cross entropy becomes DCO, whatever else is in its loss, and
    a schedule blends the two. Both are means over ALL examples, those without a label (−100)
    included, which torch's mean leaves out: return the sum over the labelled ones divided by all.

    Args:
        samples: N, the number of answers that are drawn; N = 1 is the cross entropy.
        sequence: p is of a whole answer, the product over its positions, as in the paper; the mean
            is over the batch. Then the user's loss must be the sum over positions and the mean
            over the batch. Otherwise every position is an example.
        weight: 1 for DCO alone.
        dim: class dimension of the logits: -1 for ``(batch, classes)`` and ``(batch, length,
            classes)``, 1 for dense predictions ``(batch, classes, height, width)``.
        common: name, taps and the like, see `ObjectiveOptions`.

    Raises:
        AuxiliaryError: fewer samples than one; in a step, logits without the dimension ``dim``, or
            a target that is neither class indices in the shape of the examples nor probabilities.
    """

    def __init__(
        self,
        samples: float = 16,
        sequence: bool = False,
        weight: float | str | Schedule = 1.0,
        dim: int = -1,
        **common: Unpack[ObjectiveOptions],
    ) -> None:
        super().__init__(weight, **common)
        if not samples >= 1:
            raise AuxiliaryError(f"{self.name}: samples={samples}; at least one answer is drawn.")
        self.samples = samples
        self.sequence = sequence
        self.dim = dim

    def loss(self, step: Step) -> Tensor:
        return coverage_loss(
            step.logits,
            step.target,
            self.samples,
            step.mask,
            self.dim,
            self.sequence,
            difference=True,
        )
