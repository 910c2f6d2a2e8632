"""``WeakToStrongConfidence``: trust the model's own predictions more than its weak labels."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from lightning_aux.engine import Step
from lightning_aux.functional import confidences, confident_labels, target_change
from lightning_aux.functional.examples import shape_of_examples
from lightning_aux.objective import Objective, ObjectiveOptions
from lightning_aux.schedule import Schedule

__all__ = ["WeakToStrongConfidence"]


class WeakToStrongConfidence(Objective):
    """Replaces a growing share of the weak labels by the model's own hard predictions.

    ``(1 − α) · CE(f, y_weak) + α · CE(f, ŷ)`` with ŷ the predictions of f, hardened so that each
    class is as frequent as in the labels of the batch, and without gradient: Burns et al. 2023,
    "Weak-to-Strong Generalization: Eliciting Strong Capabilities With Weak Supervision",
    arXiv:2312.09390, its auxiliary confidence loss. See `functional.confident_labels` for the
    threshold, and for more than two classes.

    The term is the difference ``CE(f, ŷ) − CE(f, y_weak)``, so the user's loss stays what it is
    (the cross entropy with the weak labels) and ``weight`` is α. Its mean is over ALL examples,
    those without a label (−100) included.

    Args:
        weight: α. The released code ends at 0.5 after a tenth of the training (where it jumps from
            0.05, a defect that is reported there; here it rises all the way).
        balanced: give each class its share of the labels, over the batches of all processes. With
            False the largest logit decides.
        dim: class dimension of the logits: -1 for ``(batch, classes)`` and ``(batch, length,
            classes)``, 1 for dense predictions ``(batch, classes, height, width)``.
        common: name, taps and the like, see `ObjectiveOptions`.

    Raises:
        AuxiliaryError: in a step, logits without the dimension ``dim`` or with one class, or a
            target that is neither class indices in the shape of the examples nor probabilities.
    """

    def __init__(
        self,
        weight: float | str | Schedule = "linear(0, 0.5, until=10%)",
        balanced: bool = True,
        dim: int = -1,
        **common: Unpack[ObjectiveOptions],
    ) -> None:
        super().__init__(weight, **common)
        self.balanced = balanced
        self.dim = dim

    def loss(self, step: Step) -> Tensor:
        own = self._own_labels(step) if self.balanced else step.logits.detach().argmax(self.dim)
        return target_change(step.logits, step.target, own, step.mask, self.dim)

    def _own_labels(self, step: Step) -> Tensor:
        rows, everywhere = step.gathered(
            lambda: confidences(step.logits.detach(), step.target, step.mask, self.dim)
        )
        examples = shape_of_examples(step.logits, self.dim)
        return confident_labels(rows, everywhere).reshape(examples)
