"""``MultiSampleDropout``: several masks over the end of the model, the mean of their losses."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from typing_extensions import Unpack

from lightning_aux.engine import AuxiliaryError, Engine, Step
from lightning_aux.objective import Objective, ObjectiveOptions
from lightning_aux.schedule import Schedule

__all__ = ["MultiSampleDropout"]


class MultiSampleDropout(Objective):
    """The mean of the losses under M dropout masks, of which the user's step is the first.

    Inoue 2019, "Multi-Sample Dropout for Accelerated Training and Better Generalization",
    arXiv:1905.09788, section 3: the layers after the dropout layer are repeated with the same
    weights and other masks, and the final loss is the average of the losses. The layers before it
    run once.

    The term is ``(1/M) Σ lossₘ − loss₁``, so that with ``weight=1`` the total is the mean. The
    losses come from the user's own ``training_step``, run again from the dropout layer on (what it
    logs, and its metrics and BatchNorm statistics, stay those of the first run), or from ``loss``.
    Masks are drawn from random numbers of our own; what the step draws before the layer (mixup, a
    permutation) is the same in each repetition. With ``samples=1`` training is bit-identical to
    training without.

    Args:
        dropout: module path of the dropout layer. What follows it, in whatever code, is repeated;
            so is what the step computes before it outside of modules. Not within a function that
            ``torch.utils.checkpoint`` runs.
        samples: M, the number of masks; 8 in most of the paper.
        loss: ``(logits, target) -> scalar``, in place of the user's own loss; needed in manual
            optimisation. Then the mean is of this loss, and what else is in the user's loss
            stays as it is.
        weight: see `Objective`; 1 is the paper's.
        common: name, taps and the like, see `ObjectiveOptions`.

    Raises:
        AuxiliaryError: fewer samples than one; before training, for a path that names no module,
            or several, and in manual optimisation without ``loss``; in a step that does not call
            the layer, or calls it within ``torch.utils.checkpoint``.
    """

    def __init__(
        self,
        dropout: str,
        samples: int = 8,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        weight: float | str | Schedule = 1.0,
        **common: Unpack[ObjectiveOptions],
    ) -> None:
        super().__init__(weight, **common)
        if samples < 1:
            raise AuxiliaryError(f"{self.name}: samples={samples}; there is at least one mask.")
        self.dropout = dropout
        self.samples = samples
        self.criterion = loss

    def check(self, engine: Engine) -> None:
        super().check(engine)
        engine.tail(self.dropout, self.name)
        if self.criterion is None and not engine.module.automatic_optimization:
            raise AuxiliaryError(
                f"{self.name}: in manual optimisation training_step also takes optimizer steps, so "
                f"it cannot be run again. Give the loss: loss=torch.nn.functional.cross_entropy."
            )

    def weight_at(self, steps: int) -> float:
        return 0.0 if self.samples == 1 else super().weight_at(steps)

    def loss(self, step: Step) -> Tensor:
        repeats = step.after(self.dropout)
        if self.criterion is None:
            first = step.loss
            more = [repeats.loss() for _ in range(self.samples - 1)]
        else:
            first = self.criterion(step.logits, step.target)
            more = [
                self.criterion(repeats.again().logits, step.target) for _ in range(self.samples - 1)
            ]
        # Sums of losses, each with a factor: nothing but these numbers is computed here.
        return sum(more, start=first) / self.samples - first
