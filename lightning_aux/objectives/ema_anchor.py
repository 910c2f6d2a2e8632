"""``EMAAnchor``: pull the model towards the moving average of itself."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor
from typing_extensions import Unpack

from lightning_aux.engine import Attached, AuxiliaryError, Step
from lightning_aux.functional import output_anchor, squared_distance
from lightning_aux.mixin import AuxiliaryMixin
from lightning_aux.objective import Objective, ObjectiveOptions
from lightning_aux.schedule import Schedule
from lightning_aux.teachers import EMATeacher

__all__ = ["EMAAnchor", "EMAAnchorMixin"]


class EMAAnchor(Objective):
    """Pulls the model towards the exponential moving average of its own weights.

    In output space ``KL(p_θ ‖ p_φ) − entropy · H(p_θ)``: a regulariser towards a dynamic anchor
    with an entropy bonus, as in Hou et al. 2025, "Advancing Language Model Reasoning through
    Reinforcement Learning and Inference Scaling", arXiv:2501.11651. In weight space
    ``Σ ‖θ − φ‖²`` over the trainable parameters. ``φ`` gives no gradient.

    Args:
        space: ``"output"`` (on the logits) or ``"weight"``.
        weight: factor of the term, see `Objective`.
        entropy: factor of the entropy bonus relative to the divergence; output space only.
        teacher: name of a teacher among the Trainer's callbacks. Default: a teacher of its own,
            an `EMATeacher` made from ``decay``, ``warmup``, ``every``, ``start`` and ``buffers``.
        temperature: of both distributions in output space, with the factor T².
        dim: class dimension of the logits in output space: -1 for ``(batch, classes)`` and
            ``(batch, length, classes)``, 1 for dense predictions ``(batch, classes, height,
            width)``. The mean is over all positions.
        decay: of the anchor's own average.
        warmup: see `EMATeacher`; of the anchor's own average.
        every: optimizer steps between updates of the anchor's own average.
        start: optimizer steps before the anchor's own average begins. Until then the anchor is
            the model itself.
        buffers: ``"copy"`` or ``"average"``, of the anchor's own average.
        common: name, taps and the like, see `ObjectiveOptions`.

    Raises:
        AuxiliaryError: unknown ``space``; ``entropy``, ``temperature`` or ``dim`` in weight space;
            non-positive temperature; arguments of its own average beside a named ``teacher``, or a
            ``teacher`` that is not attached; logits without the dimension ``dim``.
    """

    def __init__(
        self,
        space: Literal["output", "weight"] = "output",
        weight: float | str | Schedule = 0.1,
        entropy: float = 0.0,
        teacher: str | None = None,
        temperature: float = 1.0,
        dim: int = -1,
        decay: float = 0.999,
        warmup: bool = False,
        every: int = 1,
        start: int = 0,
        buffers: Literal["copy", "average"] = "copy",
        **common: Unpack[ObjectiveOptions],
    ) -> None:
        super().__init__(weight, **common)
        if space not in ("output", "weight"):
            raise AuxiliaryError(
                f"{self.name}: space={space!r} is unknown. Choose 'output' or 'weight'."
            )
        of_outputs = _changed(entropy=entropy, temperature=temperature, dim=dim)
        if space == "weight" and of_outputs:
            raise AuxiliaryError(
                f"{self.name}: {of_outputs} needs outputs. Leave it out or use space='output'."
            )
        if not (temperature > 0 and math.isfinite(temperature)):
            raise AuxiliaryError(
                f"{self.name}: temperature={temperature} must be positive and finite."
            )
        self.space = space
        self.entropy = entropy
        self.temperature = temperature
        self.dim = dim
        self.own_teacher: EMATeacher | None = None
        if teacher is None:
            teacher = f"{self.name}.teacher"
            self.own_teacher = EMATeacher(decay, teacher, warmup, every, start, buffers)
        elif own := _changed(decay=decay, warmup=warmup, every=every, start=start, buffers=buffers):
            raise AuxiliaryError(
                f"{self.name}: {own} beside teacher={teacher!r} would change nothing: such "
                f"arguments belong to the named teacher, EMATeacher(name={teacher!r}, {own}). "
                f"Without teacher= the anchor has an average of its own, which they are for."
            )
        self.teacher = teacher

    def companions(self) -> list[Attached]:
        return [] if self.own_teacher is None else [self.own_teacher]

    def check(self, engine: Any) -> None:
        super().check(engine)
        self.learn_from(self.teacher, engine, weights=self.space == "weight")

    def loss(self, step: Step) -> Tensor:
        if self.space == "weight":
            return squared_distance(*step.weights(self.teacher))
        logits = step.logits
        if logits.shape[self.dim : self.dim + 1 or None] == (1,):
            raise AuxiliaryError(
                f"{self.name}: the output of shape {tuple(logits.shape)} is of one class, whose "
                f"probability is 1 whatever the value. Give space='weight', which suits a "
                f"regression, or dim= where the classes are in another dimension."
            )
        anchor = step.teacher(self.teacher).logits
        return output_anchor(logits, anchor, self.temperature, self.entropy, step.mask, self.dim)


def _changed(**given: Any) -> str:
    """Those arguments, as they are written in a call, that are not the default of `EMAAnchor`."""
    known = inspect.signature(EMAAnchor.__init__).parameters
    return ", ".join(f"{key}={v!r}" for key, v in given.items() if v != known[key].default)


class EMAAnchorMixin(AuxiliaryMixin):
    """For a LightningModule that brings its `EMAAnchor` along.

    Attributes:
        ema_anchor: arguments of the `EMAAnchor`.
    """

    ema_anchor: Mapping[str, Any] = MappingProxyType({})

    def auxiliary_callbacks(self) -> list[Attached]:
        return [*super().auxiliary_callbacks(), EMAAnchor(**self.ema_anchor)]
