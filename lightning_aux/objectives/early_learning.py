"""``EarlyLearningRegularization``: hold on to what was learnt before label noise is memorised."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from lightning_aux.engine import AuxiliaryError, Step
from lightning_aux.functional import early_learning_regularization, early_learning_target
from lightning_aux.functional.examples import IGNORED
from lightning_aux.objective import ObjectiveOptions
from lightning_aux.objectives.memory import Remembering
from lightning_aux.schedule import Schedule

__all__ = ["EarlyLearningRegularization"]


class EarlyLearningRegularization(Remembering):
    """Steers each sample towards the running average of the model's predictions for it.

    ``mean_i log(1 − ⟨p_i, t_i⟩)`` with ``t_i ← β t_i + (1 − β) p_i``: Liu, Niles-Weed, Razavian &
    Fernandez-Granda 2020, "Early-Learning Regularization Prevents Memorization of Noisy Labels",
    arXiv:2007.00151, eq. 6 and 9. Like the authors' code, ``p`` is clamped to [1e-4, 1 − 1e-4],
    the target is updated before it is used and carries no gradient.

    The targets are a memory of ``samples × classes`` numbers on the training device, keyed by
    dataset index (which the engine reads from the sampler). It moves when the optimizer steps. Its
    size is said at the first step. Several processes hold a part each and exchange the rows of
    their batches.

    Logs ``agreement``, the mean of ``⟨p_i, t_i⟩``, and where the batch has class labels
    ``label_agreement``, the share of them that the targets agree with: with noisy labels at most
    about one minus the noise while nothing is memorised, and more where it is.

    Args:
        weight: λ; 3 in the paper for CIFAR-10 with symmetric noise.
        momentum: β in [0, 1).
        storage: ``"float32"``, ``"float16"`` (half the memory, for a momentum up to about 0.99), or
            k or ``"top-k"``: the k largest entries of a target, and the sum of the others, which
            counts as spread evenly over them.
        dim: where the classes are in the logits, for dense predictions of one size in all batches:
            −1 for ``(batch, length, classes)``, 1 for ``(batch, classes, height, width)``.
        common: name, taps and the like, see `ObjectiveOptions`.

    Raises:
        AuxiliaryError: ``momentum`` outside [0, 1); a ``storage`` or ``dim`` that there is none of;
            before the first step, a dataloader without sample indices; logits that are not
            ``(batch, ..., classes)`` with one entry per sample.
    """

    def __init__(
        self,
        weight: float | str | Schedule = 3.0,
        momentum: float = 0.7,
        storage: str | int = "float32",
        dim: int = -1,
        **common: Unpack[ObjectiveOptions],
    ) -> None:
        super().__init__(weight, storage, dim, **common)
        if not 0.0 <= momentum < 1.0:
            raise AuxiliaryError(f"{self.name}: momentum={momentum} must lie in [0, 1).")
        self.momentum = momentum
        self._agreement: dict[str, Tensor] = {}

    def loss(self, step: Step) -> Tensor:
        logits = self.classes_last(step)
        before, _ = self.memory.read(step, *logits.shape[1:])
        target = early_learning_target(before, logits.detach(), self.momentum)
        self.memory.write(step, target)
        if step.logs:
            self._agreement = self._agreed(step, logits.detach(), target)
        return early_learning_regularization(logits, target, step.mask)

    def _agreed(self, step: Step, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        p = logits.float().softmax(-1)
        agreed = {"agreement": (p * target).sum(-1).mean()}
        try:
            label = step.target
        except AuxiliaryError:  # the term needs none
            return agreed
        if label.shape == target.shape[:-1] and not label.is_floating_point():
            agree = (target.argmax(-1) == label) & (label != IGNORED)
            agreed["label_agreement"] = agree.sum() / (label != IGNORED).sum().clamp_min(1)
        return agreed

    def logged(self) -> dict[str, Any]:
        return {**super().logged(), **self._agreement}
