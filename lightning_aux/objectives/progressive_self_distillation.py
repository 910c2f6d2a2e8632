"""``ProgressiveSelfDistillation``: targets that hold more and more of the last prediction."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from lightning_aux.engine import Step
from lightning_aux.functional import target_change
from lightning_aux.functional.softmax import softmax
from lightning_aux.objective import ObjectiveOptions
from lightning_aux.objectives.memory import Remembering
from lightning_aux.schedule import Schedule

__all__ = ["ProgressiveSelfDistillation"]


class ProgressiveSelfDistillation(Remembering):
    """Replaces a growing share of each label by what the model predicted for the sample before.

    PS-KD: Kim, Ji, Yoon & Hwang 2021, "Self-Knowledge Distillation with Progressive Refinement of
    Targets", arXiv:2006.12000: the cross entropy with ``(1 − α_t) · y + α_t · p_{t−1}(x)``, where
    ``p_{t−1}`` is the softmax output of the epoch before, and ``α_t = α_T · t/T`` in epoch t of T.
    Like the authors' code, it is the output of the training step itself (dropout and augmentation
    included) that is remembered, once the optimizer has stepped; in the first epoch the target is
    the label alone.

    The term is the difference from the cross entropy with the labels, so the user's loss stays
    what it is (the cross entropy) and ``weight`` is α. Its mean is over ALL examples, those without
    a label (−100) included.

    The memory is of ``samples × classes`` numbers, keyed by dataset index; its size is said at the
    first step. Without indices, a `SnapshotTeacher` with ``every="1ep"`` and `SelfDistillation`
    with ``blend=True`` come near, for a forward per step.

    Args:
        weight: α, in steps of an epoch as in the paper; a schedule without ``epochwise`` rises in
            every step.
        storage: ``"float32"``, ``"float16"``, or k or ``"top-k"``: the k largest probabilities, the
            rest counting as spread evenly.
        dim: where the classes are in the logits, for dense predictions of one size in all batches:
            −1 for ``(batch, length, classes)``, 1 for ``(batch, classes, height, width)``.
        common: name, taps and the like, see `ObjectiveOptions`.

    Raises:
        AuxiliaryError: a ``storage`` or ``dim`` that there is none of; before the first step, a
            dataloader without sample indices; logits that are not ``(batch, ..., classes)`` with
            one entry per sample, or a target that does not fit them.
    """

    def __init__(
        self,
        weight: float | str | Schedule = "epochwise(linear(0, 0.8))",
        storage: str | int = "float32",
        dim: int = -1,
        **common: Unpack[ObjectiveOptions],
    ) -> None:
        super().__init__(weight, storage, dim, **common)

    def loss(self, step: Step) -> Tensor:
        logits = self.classes_last(step)
        before, seen = self.memory.read(step, *logits.shape[1:])
        self.memory.write(step, softmax(logits.detach().float(), -1))
        counted = seen.reshape(-1, *[1] * (logits.ndim - 2)).expand(logits.shape[:-1])
        if step.mask is not None:
            counted = counted * step.mask
        target = step.target
        if target.is_floating_point() and target.shape == step.logits.shape:
            target = target.movedim(self.dim, -1)
        return target_change(logits, target, before, counted)
