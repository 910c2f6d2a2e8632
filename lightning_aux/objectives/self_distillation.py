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
from lightning_aux.functional.divergences import shape_of_examples
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
    examples; every position of a sequence or an image is one. On features the distance between
    the outputs of one module.

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
            processes give the same gradient. Logits only, with class indices as the target: of
            the shape of the logits without their class dimension.
        dim: class dimension of the logits: -1 for ``(batch, classes)`` and ``(batch, length,
            classes)``, 1 for dense predictions ``(batch, classes, height, width)``.
        name: unique name for logs and checkpoints.
        taps: where logits and target are.
        nonfinite: ``"raise"`` or ``"skip"``.
        optimizer: with several optimizers, the one that the term belongs to, see `Objective`.
        backward: which ``manual_backward`` the term joins in manual optimisation, see `Objective`.

    Raises:
        AuxiliaryError: a divergence that does not fit ``on``, a non-positive temperature, a
            ``teacher`` that is not attached, a path that names no module; in a step, logits
            without the dimension ``dim``, or a target that ``only_correct`` cannot compare.
    """

    def __init__(
        self,
        teacher: str = "ema",
        on: Tap = "logits",
        divergence: Literal["kl", "reverse_kl", "js", "mse", "cosine"] = "kl",
        temperature: float = 1.0,
        weight: float | str | Schedule = 1.0,
        only_correct: bool = False,
        dim: int = -1,
        name: str | None = None,
        taps: Taps | None = None,
        nonfinite: Literal["raise", "skip"] = "raise",
        optimizer: int = 0,
        backward: int | None = None,
    ) -> None:
        on_logits = on == "logits"
        reads = (on,) if isinstance(on, str) and not on_logits else ()
        super().__init__(
            weight,
            name,
            taps=taps,
            reads=reads,
            nonfinite=nonfinite,
            optimizer=optimizer,
            backward=backward,
        )
        fitting = DIVERGENCES if on_logits else FEATURE_DISTANCES
        if divergence not in fitting:
            raise AuxiliaryError(
                f"{self.name}: divergence={divergence!r} does not fit on={on!r}. Choose one of "
                f"{', '.join(map(repr, fitting))}."
            )
        if temperature <= 0:
            raise AuxiliaryError(f"{self.name}: temperature={temperature} must be positive.")
        if not on_logits and (temperature != 1.0 or only_correct or dim != -1):
            raise AuxiliaryError(
                f"{self.name}: temperature, only_correct and dim need on='logits', not {on!r}."
            )
        self.teacher = teacher
        self.on = on
        self.divergence = divergence
        self.temperature = temperature
        self.only_correct = only_correct
        self.dim = dim

    def check(self, engine: Engine) -> None:
        super().check(engine)
        self.learn_from(self.teacher, engine, self.reads)

    def loss(self, step: Step) -> Tensor:
        teacher = step.teacher(self.teacher)
        if self.on != "logits":
            return self._feature_distance(step, teacher)
        mask = self._correct(teacher.logits, step.target) if self.only_correct else None
        divergence = DIVERGENCES[self.divergence]
        return divergence(step.logits, teacher.logits, self.temperature, mask, self.dim)

    def _correct(self, logits: Tensor, target: Tensor) -> Tensor:
        """Where the teacher predicts the target; nothing is broadcast."""
        found, expected = list(target.shape), shape_of_examples(logits, self.dim)
        if found != expected:
            fitting = [d for d in range(1, logits.ndim) if found == shape_of_examples(logits, d)]
            other = f" It would fit dim={fitting[0]}." if fitting else ""
            raise AuxiliaryError(
                f"{self.name}: only_correct compares class indices, but the target has shape "
                f"{tuple(found)}, and logits of shape {tuple(logits.shape)} with the classes in "
                f"dim={self.dim} need {tuple(expected)}.{other} Give dim=, or name the target with "
                f"taps=Taps(target=...)."
            )
        return logits.argmax(self.dim) == target

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
