"""``EarlyLearningRegularization``: hold on to what was learnt before label noise is memorised."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from lightning_aux.engine import AuxiliaryError, Engine, Step
from lightning_aux.functional import early_learning_regularization, early_learning_target
from lightning_aux.objective import Objective, ObjectiveOptions
from lightning_aux.objectives.memory import SampleMemory
from lightning_aux.schedule import Schedule

__all__ = ["EarlyLearningRegularization"]


class EarlyLearningRegularization(Objective):
    """Steers each sample towards the running average of the model's predictions for it.

    ``mean_i log(1 − ⟨p_i, t_i⟩)`` with ``t_i ← β t_i + (1 − β) p_i``: Liu, Niles-Weed, Razavian &
    Fernandez-Granda 2020, "Early-Learning Regularization Prevents Memorization of Noisy Labels",
    arXiv:2007.00151, eq. 6 and 9. Like the authors' code, ``p`` is clamped to [1e-4, 1 − 1e-4],
    the target is updated before it is used and carries no gradient.

    The targets are a float32 memory of ``samples × classes`` on the training device, keyed by
    dataset index (which the engine reads from the sampler). It moves when the optimizer steps.
    Every process holds the whole memory: the rows that a step has changed are exchanged.

    Args:
        weight: λ; 3 in the paper for CIFAR-10 with symmetric noise.
        momentum: β in [0, 1).
        common: name, taps and the like, see `ObjectiveOptions`.

    Raises:
        AuxiliaryError: ``momentum`` outside [0, 1); before the first step, a dataloader without
            sample indices; logits that are not ``(batch, classes)``, one row per sample.
    """

    needs: ClassVar[tuple[str, ...]] = ("index",)
    observes: ClassVar[bool] = True

    def __init__(
        self,
        weight: float | str | Schedule = 3.0,
        momentum: float = 0.7,
        **common: Unpack[ObjectiveOptions],
    ) -> None:
        super().__init__(weight, **common)
        if not 0.0 <= momentum < 1.0:
            raise AuxiliaryError(f"{self.name}: momentum={momentum} must lie in [0, 1).")
        self.momentum = momentum
        self.targets = SampleMemory()

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        super().start(engine, state)
        self.targets.load((state or {}).get("targets"))

    def state(self) -> dict[str, Any]:
        return {**super().state(), "targets": self.targets.rows}

    def loss(self, step: Step) -> Tensor:
        logits = step.logits
        if logits.ndim != 2 or len(logits) != len(step.index):
            raise AuxiliaryError(
                f"{self.name}: logits of shape {tuple(logits.shape)} do not fit a batch of "
                f"{len(step.index)} samples. It needs (batch, classes), one row per sample; name "
                f"them with taps=Taps(logits=...)."
            )
        before = self.targets.read(step, logits.shape[1])
        target = early_learning_target(before, logits.detach(), self.momentum)
        self.targets.write(step, target)
        return early_learning_regularization(logits, target)
