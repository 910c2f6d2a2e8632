"""``SelfDistillation``: learn from an earlier or averaged copy of the same model."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_aux.engine import Attached, AuxiliaryError, Engine, Pass, Step, Tap
from lightning_aux.engine.taps import describe
from lightning_aux.functional import DIVERGENCES, FEATURE_DISTANCES
from lightning_aux.mixin import AuxiliaryMixin
from lightning_aux.objective import Objective
from lightning_aux.schedule import Schedule
from lightning_aux.taps import Taps
from lightning_aux.teachers import EMATeacher

__all__ = ["SelfDistillation", "SelfDistillationMixin"]


class SelfDistillation(Objective):
    """Distils a teacher of the same architecture into the model while it trains.

    On logits ``T² · D(p_teacher, p_student)``, ``p = softmax(z / T)`` (Hinton, Vinyals & Dean
    2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2; with an EMA
    teacher Tarvainen & Valpola 2017, arXiv:1703.01780), summed over classes and averaged over
    examples. On features the distance between the outputs of one module.

    Args:
        teacher: name of a teacher among the Trainer's callbacks.
        on: ``"logits"``, or the path or glob of a module whose outputs are compared (a glob gives
            the mean over its modules), or a callable that gets a step and returns features.
        divergence: on logits ``"kl"`` (forward, KL(teacher ‖ student)), ``"reverse_kl"`` or
            ``"js"``; on features ``"mse"`` or ``"cosine"``.
        temperature: T, with the factor T²; logits only.
        weight: factor of the term, see `Objective`.
        only_correct: count only the examples whose target the teacher predicts; the others
            contribute 0 and the mean is still over all examples, so that accumulation and several
            processes give the same gradient. Logits and class-index targets only.
        name: unique name for logs and checkpoints.
        taps: where logits and target are.
        nonfinite: ``"raise"`` or ``"skip"``.
        backward: which ``manual_backward`` the term joins in manual optimisation.

    Raises:
        AuxiliaryError: a divergence that does not fit ``on``, a non-positive temperature, a
            ``teacher`` that is not attached, a path that names no module.
    """

    def __init__(
        self,
        teacher: str = "ema",
        on: Tap = "logits",
        divergence: Literal["kl", "reverse_kl", "js", "mse", "cosine"] = "kl",
        temperature: float = 1.0,
        weight: float | str | Schedule = 1.0,
        only_correct: bool = False,
        name: str | None = None,
        taps: Taps | None = None,
        nonfinite: Literal["raise", "skip"] = "raise",
        backward: int = 0,
    ) -> None:
        on_logits = on == "logits"
        reads = (on,) if isinstance(on, str) and not on_logits else ()
        super().__init__(
            weight, name, taps=taps, reads=reads, nonfinite=nonfinite, backward=backward
        )
        fitting = DIVERGENCES if on_logits else FEATURE_DISTANCES
        if divergence not in fitting:
            raise AuxiliaryError(
                f"{self.name}: divergence={divergence!r} does not fit on={on!r}. Choose one of "
                f"{', '.join(map(repr, fitting))}."
            )
        if temperature <= 0:
            raise AuxiliaryError(f"{self.name}: temperature={temperature} must be positive.")
        if not on_logits and (temperature != 1.0 or only_correct):
            raise AuxiliaryError(
                f"{self.name}: temperature and only_correct need on='logits', not {on!r}."
            )
        self.teacher = teacher
        self.on = on
        self.divergence = divergence
        self.temperature = temperature
        self.only_correct = only_correct

    def check(self, engine: Engine) -> None:
        super().check(engine)
        engine.teacher(self.teacher, self.name)

    def loss(self, step: Step) -> Tensor:
        teacher = step.teacher(self.teacher)
        if self.on != "logits":
            return self._feature_distance(step, teacher)
        mask = None
        if self.only_correct:
            mask = teacher.logits.argmax(-1) == step.target
        return DIVERGENCES[self.divergence](step.logits, teacher.logits, self.temperature, mask)

    def _feature_distance(self, step: Step, teacher: Pass) -> Tensor:
        distance = FEATURE_DISTANCES[self.divergence]
        student, taught = step.features(self.on), teacher.features(self.on)
        if not isinstance(student, dict):
            student, taught = {str(self.on): student}, {str(self.on): taught}
        for path, output in student.items():
            if not isinstance(output, Tensor):
                raise AuxiliaryError(
                    f"{self.name}: the output of {path!r} is {describe(output)}, not a tensor. "
                    f"Name a module that returns one tensor, or pick it: on=lambda p: "
                    f"p.features()[0] with taps=Taps(features={path!r})."
                )
        return torch.stack([distance(student[path], taught[path]) for path in student]).mean()


class SelfDistillationMixin(AuxiliaryMixin):
    """For a LightningModule that brings its `SelfDistillation` along.

    Attributes:
        self_distillation: arguments of the `SelfDistillation`.
        ema_teacher: arguments of the `EMATeacher` that comes with it.
    """

    self_distillation: Mapping[str, Any] = MappingProxyType({})
    ema_teacher: Mapping[str, Any] = MappingProxyType({})

    def auxiliary_callbacks(self) -> list[Attached]:
        own = [EMATeacher(**self.ema_teacher), SelfDistillation(**self.self_distillation)]
        return [*super().auxiliary_callbacks(), *own]
