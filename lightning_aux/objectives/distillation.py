"""``Distillation``: what learning from one teacher is, wherever that comes from."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_aux.engine import AuxiliaryError, Engine, Pass, Step, Tap
from lightning_aux.engine.taps import describe
from lightning_aux.functional import DIVERGENCES, FEATURE_DISTANCES
from lightning_aux.functional.examples import shape_of_examples
from lightning_aux.objective import Objective, ObjectiveOptions
from lightning_aux.schedule import Schedule

__all__ = ["Distillation", "Divergence"]

Divergence: TypeAlias = Literal["kl", "reverse_kl", "js", "alpha", "tv", "mse", "cosine"]


class Distillation(Objective):
    """A distance between what the model and a teacher say, or compute on the way.

    `SelfDistillation` and `KnowledgeDistillation` say what the arguments mean.
    """

    def __init__(
        self,
        teacher: str,
        on: Tap,
        teacher_on: Tap | None,
        divergence: Divergence,
        temperature: float,
        weight: float | str | Schedule,
        only_correct: bool,
        blend: bool,
        dim: int,
        binary: bool,
        **common: Unpack[ObjectiveOptions],
    ) -> None:
        on_logits = on == "logits"
        reads = (on,) if isinstance(on, str) and not on_logits else ()
        super().__init__(weight, reads=reads, **common)
        fitting = DIVERGENCES if on_logits else FEATURE_DISTANCES
        if divergence not in fitting:
            raise AuxiliaryError(
                f"{self.name}: divergence={divergence!r} does not fit on={on!r}. Choose one of "
                f"{', '.join(map(repr, fitting))}."
            )
        if not 0 < temperature < math.inf:
            raise AuxiliaryError(
                f"{self.name}: temperature={temperature} must be positive and finite."
            )
        if not on_logits and (temperature != 1.0 or only_correct or dim != -1 or binary):
            raise AuxiliaryError(
                f"{self.name}: temperature, only_correct, dim and binary need on='logits', not "
                f"{on!r}."
            )
        if binary and only_correct:
            raise AuxiliaryError(
                f"{self.name}: only_correct needs one class index per prediction, which the labels "
                f"of binary=True do not have. Leave one of the two away."
            )
        self.teacher = teacher
        self.on = on
        self.teacher_on: Tap = on if teacher_on is None else teacher_on
        self.divergence = divergence
        self.temperature = temperature
        self.only_correct = only_correct
        self.blend = blend
        self.dim = dim
        self.binary = binary

    def check(self, engine: Engine) -> None:
        super().check(engine)
        on_path = isinstance(self.teacher_on, str) and self.teacher_on != "logits"
        self.learn_from(self.teacher, engine, (str(self.teacher_on),) if on_path else ())

    def loss(self, step: Step) -> Tensor:
        teacher = step.teacher(self.teacher)
        if self.on == "logits":
            term = self._on_logits(step, teacher)
        else:
            term = self._on_features(step, teacher)
        if not self.blend:
            return term
        # (1 − w)·loss + w·term = loss + w·(term − loss). A loss that overflows is the scaler's.
        return term - torch.where(step.loss.isfinite(), step.loss, 0)

    def _on_logits(self, step: Step, teacher: Pass) -> Tensor:
        mask = step.mask
        if self.only_correct:
            correct = self._correct(teacher.logits, step.target)
            mask = correct if mask is None else correct * mask
        divergence = DIVERGENCES[self.divergence]
        return divergence(
            step.logits, teacher.logits, self.temperature, mask, self.dim, self.binary
        )

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

    def _on_features(self, step: Step, teacher: Pass) -> Tensor:
        distance = FEATURE_DISTANCES[self.divergence]
        student, taught = step.features(self.on), teacher.features(self.teacher_on)
        if not isinstance(student, dict):
            student, taught = {str(self.on): student}, {str(self.on): taught}
        if not isinstance(taught, dict) or set(taught) != set(student):
            raise AuxiliaryError(
                f"{self.name}: on={self.on!r} and teacher_on={self.teacher_on!r} do not name the "
                f"same modules. Give teacher_on= one path for one path of the student."
            )
        for path, output in student.items():
            if not isinstance(output, Tensor):
                raise AuxiliaryError(
                    f"{self.name}: the output of {path!r} is {describe(output)}, not a tensor. "
                    f"Name a module that returns one tensor, or pick it: on=lambda p: "
                    f"p.features()[0] with taps=Taps(features={path!r})."
                )
        each = [
            distance(output, taught[path], _of_positions(step.mask, output))
            for path, output in student.items()
        ]
        return torch.stack(each).mean()


def _of_positions(mask: Tensor | None, features: Tensor) -> Tensor | None:
    """The mask, where these features have its examples or positions.

    Features of whole examples, ``(batch, channels)``, have no positions that could be left out.
    """
    if mask is None or (mask.ndim > 1 and features.ndim <= mask.ndim):
        return None
    return mask
