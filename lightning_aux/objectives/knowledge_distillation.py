"""``KnowledgeDistillation``: learn from another model."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from typing_extensions import Unpack

from lightning_aux.engine import Attached, AuxiliaryError, Tap
from lightning_aux.objective import ObjectiveOptions
from lightning_aux.objectives.distillation import Distillation, Divergence
from lightning_aux.schedule import Schedule
from lightning_aux.teachers import FrozenTeacher, StoredTeacher

__all__ = ["KnowledgeDistillation"]


class KnowledgeDistillation(Distillation):
    """Distils another model, of any architecture, into the one that trains.

    On logits ``T² · D(p_teacher, p_student)``, ``p = softmax(z / T)``: Hinton, Vinyals & Dean 2015,
    "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2. The factor T²
    keeps the size of the gradient when T changes. With ``blend=True`` the total is
    ``(1 − weight) · loss + weight · term``, as in Polino, Pascanu & Alistarh 2018, "Model
    compression via distillation and quantization", arXiv:1802.05668 (T = 2, weight = 0.7; the
    authors' code averages the divergence over classes too, which is not followed).

    The teacher is one of the Trainer's callbacks (``teacher="big"``), or made from one of
    ``module``, ``checkpoint`` and ``logits``.

    Args:
        teacher: name of a teacher among the Trainer's callbacks.
        module: the model to learn from; ``checkpoint`` then holds its weights.
        checkpoint: a file of weights, of ``module``, or of the user's own model without it.
        logits: a folder that ``lightning-aux teach`` has written: no teacher runs at all.
        on: ``"logits"``, or the path or glob of a module whose outputs are compared, or a callable
            that gets a step and returns features.
        teacher_on: the path in the teacher where it is another one.
        divergence: on logits one of ``functional.DIVERGENCES``; on features ``"mse"`` or
            ``"cosine"``. For regression ``on="logits"`` with ``"mse"``.
        temperature: T, with the factor T²; logits only.
        weight: factor of the term, see `Objective`.
        only_correct: count only the examples whose target the teacher predicts; the mean is still
            over all of them.
        blend: let the user's own loss count ``1 − weight``.
        dim: class dimension of the logits: -1 for ``(batch, classes)`` and ``(batch, length,
            classes)``, 1 for dense predictions ``(batch, classes, height, width)``.
        binary: every logit is a prediction of its own, with a sigmoid; see `SelfDistillation`.
        common: name, taps and the like, see `ObjectiveOptions`.

    Raises:
        AuxiliaryError: no teacher, or several; a divergence that does not fit ``on``; a
            temperature that is not positive; before training, a teacher that is not attached, a
            file that cannot be read, a path that names no module.
    """

    def __init__(
        self,
        teacher: str | None = None,
        module: nn.Module | None = None,
        checkpoint: str | Path | None = None,
        logits: str | Path | None = None,
        on: Tap = "logits",
        teacher_on: Tap | None = None,
        divergence: Divergence = "kl",
        temperature: float | None = None,
        weight: float | str | Schedule = 1.0,
        only_correct: bool = False,
        blend: bool = False,
        dim: int = -1,
        binary: bool = False,
        **common: Unpack[ObjectiveOptions],
    ) -> None:
        if temperature is None:
            temperature = 2.0 if on == "logits" else 1.0
        super().__init__(
            teacher or "",
            on,
            teacher_on,
            divergence,
            temperature,
            weight,
            only_correct,
            blend,
            dim,
            binary,
            **common,
        )
        made = module is not None or checkpoint is not None
        if (teacher is not None) + made + (logits is not None) != 1:
            raise AuxiliaryError(
                f"{self.name}: one teacher is needed: teacher='name' of one among the callbacks, "
                f"or module= and/or checkpoint=, or logits= (a folder of lightning-aux teach)."
            )
        self.own_teacher: Attached | None = None
        if teacher is None:
            self.teacher = f"{self.name}.teacher"
            if logits is not None:
                self.own_teacher = StoredTeacher(logits, self.teacher)
            else:
                self.own_teacher = FrozenTeacher(self.teacher, checkpoint, module)

    def companions(self) -> list[Attached]:
        return [] if self.own_teacher is None else [self.own_teacher]
