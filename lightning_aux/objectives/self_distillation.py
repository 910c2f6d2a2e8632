"""``SelfDistillation``: learn from an earlier or averaged copy of the same model."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from typing_extensions import Unpack

from lightning_aux.engine import Attached, Tap
from lightning_aux.mixin import AuxiliaryMixin
from lightning_aux.objective import ObjectiveOptions
from lightning_aux.objectives.distillation import Distillation, Divergence
from lightning_aux.schedule import Schedule
from lightning_aux.teachers import EMATeacher

__all__ = ["SelfDistillation", "SelfDistillationMixin"]


class SelfDistillation(Distillation):
    """Distils a teacher of the same architecture into the model while it trains.

    On logits ``T² · D(p_teacher, p_student)``, ``p = softmax(z / T)`` (Hinton, Vinyals & Dean
    2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2; with an EMA
    teacher Tarvainen & Valpola 2017, arXiv:1703.01780; ``"alpha"`` Wang et al. 2021,
    arXiv:2102.07954), summed over classes and averaged over examples; every position of a sequence
    or an image is one. On features the distance between the outputs of one module; what
    ``Taps(mask=...)`` leaves out does not count where they have its dimensions and more.

    Args:
        teacher: name of a teacher among the Trainer's callbacks.
        on: ``"logits"``, or the path or glob of a module whose outputs are compared (a glob gives
            the mean over its modules), or a callable that gets a step and returns features.
        divergence: on logits ``"kl"`` (forward, KL(teacher ‖ student)), ``"reverse_kl"``, ``"js"``,
            ``"alpha"`` (the larger of two, see `functional.alpha_divergence`), ``"tv"`` (total
            variation), and of the logits themselves ``"mse"`` or ``"cosine"``; on features
            ``"mse"`` or ``"cosine"``.
        temperature: T, with the factor T², for ``"tv"`` T; it cancels in ``"mse"`` and
            ``"cosine"``. Logits only.
        weight: factor of the term, see `Objective`.
        only_correct: count only the examples whose target the teacher predicts; the others
            contribute 0 and the mean is still over all examples, so that accumulation and several
            processes give the same gradient. Logits only, with class indices as the target: of
            the shape of the logits without their class dimension.
        blend: let the user's own loss count ``1 − weight``: the total is then
            ``(1 − weight) · loss + weight · term``, as between generations (Borup & Andersen 2021,
            arXiv:2102.13088, whose α is ``1 − weight``).
        dim: class dimension of the logits: -1 for ``(batch, classes)`` and ``(batch, length,
            classes)``, 1 for dense predictions ``(batch, classes, height, width)``.
        binary: every logit is a prediction of its own, with a sigmoid: ``(batch, labels)`` summed
            over the labels, or ``(batch,)``. Logits only, and without ``only_correct``.
        common: name, taps and the like, see `ObjectiveOptions`.

    Raises:
        AuxiliaryError: a divergence that does not fit ``on``, a non-positive temperature, a
            ``teacher`` that is not attached, a path that names no module; in a step, logits
            without the dimension ``dim``, or a target that ``only_correct`` cannot compare.
    """

    def __init__(
        self,
        teacher: str = "ema",
        on: Tap = "logits",
        divergence: Divergence = "kl",
        temperature: float = 1.0,
        weight: float | str | Schedule = 1.0,
        only_correct: bool = False,
        blend: bool = False,
        dim: int = -1,
        binary: bool = False,
        **common: Unpack[ObjectiveOptions],
    ) -> None:
        super().__init__(
            teacher,
            on,
            None,
            divergence,
            temperature,
            weight,
            only_correct,
            blend,
            dim,
            binary,
            **common,
        )


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
