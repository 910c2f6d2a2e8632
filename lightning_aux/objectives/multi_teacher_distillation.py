"""``MultiTeacherDistillation``: the features of several teachers, each through a projector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_aux.engine import AuxiliaryError, Engine, Pass, Progress, Step
from lightning_aux.engine.taps import describe, modules_at
from lightning_aux.functional import feature_agreement, kept_teachers
from lightning_aux.objective import Objective, ObjectiveOptions
from lightning_aux.objectives.widths import output_width
from lightning_aux.schedule import Schedule

__all__ = ["MultiTeacherDistillation"]


class MultiTeacherDistillation(Objective):
    """Learns the features of several teachers at once, and most from the one it knows least.

    UNIC: Sariyildiz, Weinzaepfel, Lucas, Larlus & Kalantidis 2024, "UNIC: Universal Classification
    Models via Multi-teacher Distillation", arXiv:2408.05088. For each teacher the student's
    features go through projectors (linear, GELU, linear) that are ours: they train with the
    model and are in none of its checkpoints. With several paths in ``on`` there is one for each,
    a ladder, and their outputs are added. The term is the mean over examples and kept teachers of
    ``½ (1 − cos) + ½ smooth-L1``; see `functional.feature_agreement`.

    For each example the teacher with the largest loss is kept, and each of the others with
    probability ``1 − drop``; random numbers are our own. The authors' code divides by the number of
    teachers kept in the whole batch, so that examples with more of them count more; here each
    example counts the same, and accumulation gives the gradient of one large batch.

    Args:
        teachers: names of teachers among the Trainer's callbacks.
        on: path of the student's module whose output is compared, or several for a ladder.
        teacher_on: path in the teachers, or ``{teacher: path}``; ``"logits"`` for what they
            predict. Default: the last of ``on``.
        widths: number of features, ``{path or teacher: width}``, where they are not those of the
            last layer with weights in the module that is named.
        hidden: width between the two layers of a projector. Default: the student's.
        drop: probability of leaving out a teacher that is not the worst learnt, in [0, 1).
        normalize: subtract a running mean from each teacher's features and divide by a running
            standard deviation, so that teachers of different scale count alike.
        momentum: share of the current batch in these, a schedule; 1 takes the latest batch alone.
        weight: factor of the term, see `Objective`.
        common: name, taps and the like, see `ObjectiveOptions`.

    Features are ``(batch, features)``, ``(batch, length, features)``, or maps ``(batch, channels,
    height, width)``, which are averaged over their positions.

    Raises:
        AuxiliaryError: no teacher, or one twice; a ``drop`` outside [0, 1); before training, a
            teacher that is not attached, a path that names no module, a width that cannot be
            found; in a step, features of other shapes.
    """

    def __init__(
        self,
        teachers: Sequence[str],
        on: str | Sequence[str],
        teacher_on: str | Mapping[str, str] | None = None,
        widths: Mapping[str, int] | None = None,
        hidden: int | None = None,
        drop: float = 0.5,
        normalize: bool = True,
        momentum: float | str | Schedule = "cosine(1, 0.001)",
        weight: float | str | Schedule = 1.0,
        **common: Unpack[ObjectiveOptions],
    ) -> None:
        self.on = (on,) if isinstance(on, str) else tuple(on)
        super().__init__(weight, reads=self.on, **common)
        self.teachers = (teachers,) if isinstance(teachers, str) else tuple(teachers)
        if not self.teachers or len({*self.teachers}) < len(self.teachers) or not self.on:
            raise AuxiliaryError(
                f"{self.name}: teachers={list(self.teachers)} and on={list(self.on)}: name at "
                f"least one of each, and none twice."
            )
        if not 0.0 <= drop < 1.0:
            raise AuxiliaryError(f"{self.name}: drop={drop} must lie in [0, 1).")
        given = {} if teacher_on is None or isinstance(teacher_on, str) else dict(teacher_on)
        default = teacher_on if isinstance(teacher_on, str) else self.on[-1]
        if unknown := sorted({*given} - {*self.teachers}):
            raise AuxiliaryError(
                f"{self.name}: teacher_on names {unknown}, which are not among the teachers "
                f"{list(self.teachers)}."
            )
        self.teacher_on = {name: given.get(name, default) for name in self.teachers}
        self.widths = dict(widths or {})
        known = {*self.on, *self.teachers}
        if unknown := sorted({*self.widths} - known):
            raise AuxiliaryError(
                f"{self.name}: widths names {unknown}, and there are {sorted(known)}."
            )
        if hidden is not None and hidden < 1:
            raise AuxiliaryError(f"{self.name}: hidden={hidden} is no width of a layer.")
        self.hidden = hidden
        self.drop = drop
        self.normalize = normalize
        self.momentum = Schedule.parse(momentum)
        self._momentum_at: Callable[[int], float] | None = None
        self._scales: dict[str, _Scale] = {}
        self._noted: dict[str, Tensor] = {}

    # ------------------------------------------------------------------------------- the head
    def build_head(self, module: nn.Module) -> nn.Module:
        widths = [self._width(path, module, path) for path in self.on]
        teachers = [self._teacher_width(name, module) for name in self.teachers]
        return _Projectors(widths, self.hidden, teachers)

    def _teacher_width(self, name: str, module: nn.Module) -> int:
        teacher: Any = self.engine.teacher(name, self.name)
        other = getattr(teacher, "module", None)
        return self._width(name, module if other is None else other, self.teacher_on[name])

    def _width(self, key: str, module: nn.Module, path: str) -> int:
        if key in self.widths:
            return self.widths[key]
        named = module
        if path != "logits":
            named, *more = modules_at(module, path, f"{self.name} ({key})").values()
            if more:
                raise AuxiliaryError(
                    f"{self.name}: {path!r} names {1 + len(more)} modules; name one."
                )
        width = output_width(named)
        if width is None:
            raise AuxiliaryError(
                f"{self.name}: how many features {path!r} has cannot be seen from its layers. Say "
                f"it: widths={{{key!r}: ...}}."
            )
        return width

    # ----------------------------------------------------------------------------- membership
    def check(self, engine: Engine) -> None:
        super().check(engine)
        for name, path in self.teacher_on.items():
            self.learn_from(name, engine, () if path == "logits" else (path,))

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        super().start(engine, state)
        self._momentum_at = engine.bind(self.momentum, f"{self.name}: momentum")
        saved = (state or {}).get("scales", {})
        self._scales = {name: _Scale(saved.get(name)) for name in self.teachers}

    def state(self) -> dict[str, Any]:
        scales = {name: each.state() for name, each in self._scales.items() if each.known}
        return {**super().state(), "scales": scales}

    def logged(self) -> dict[str, Any]:
        return {**super().logged(), **self._noted}

    # ------------------------------------------------------------------------------- the term
    def loss(self, step: Step) -> Tensor:
        taught = self._taught(step)
        student = [self._shaped(step.features(path), path) for path in self.on]
        projected = self.head(*student)
        losses = torch.stack(
            [
                feature_agreement(each, target)
                for each, target in zip(projected, taught, strict=True)
            ],
            dim=1,
        )
        kept = kept_teachers(losses, step.uniform(*losses.shape), self.drop)
        if step.logs:
            for name, each, keep in zip(self.teachers, losses.detach().T, kept.T, strict=True):
                self._noted |= {f"{name}_loss": each.mean(), f"{name}_kept": keep.mean()}
        return ((losses * kept).sum(1) / kept.sum(1)).mean()

    def _taught(self, step: Step) -> list[Tensor]:
        """The teachers' features, on one scale by what is known from the steps before."""
        found: list[Tensor] = []

        def sums() -> Tensor:
            found.extend(self._features(step.teacher(name), name) for name in self.teachers)
            return torch.cat(
                [scale.sums(each) for scale, each in zip(self._scales.values(), found, strict=True)]
            )[None]

        if not self.normalize:
            return [self._features(step.teacher(name), name) for name in self.teachers]
        _, everywhere = step.gathered(sums)
        sizes = [2 * each.shape[-1] + 1 for each in found]
        parts = torch.split(everywhere.sum(0), sizes)
        scales = list(self._scales.values())

        def note() -> None:
            for scale, part in zip(scales, parts, strict=True):
                scale.note(part)

        step.after_optimizer_step(note)
        return [scale.applied(each) for scale, each in zip(scales, found, strict=True)]

    def after_optimizer_step(self, now: Progress) -> None:
        assert self._momentum_at is not None, "bound when training starts"
        momentum = self._momentum_at(now.steps - 1)
        for each in self._scales.values():
            each.move(momentum)

    def _features(self, teacher: Pass, name: str) -> Tensor:
        path = self.teacher_on[name]
        found = teacher.logits if path == "logits" else teacher.features(path)
        return self._shaped(found, f"{name}: {path}").float()

    def _shaped(self, features: Any, where: str) -> Tensor:
        if not isinstance(features, Tensor) or features.ndim not in (2, 3, 4):
            raise AuxiliaryError(
                f"{self.name}: the output of {where!r} is {describe(features)}. It needs (batch, "
                f"features), (batch, length, features) or maps (batch, channels, height, width)."
            )
        if features.numel() == 0:
            raise AuxiliaryError(
                f"{self.name}: the batch is empty (the output of {where!r} has the shape "
                f"{tuple(features.shape)}). Drop empty batches in the dataloader."
            )
        return features.mean((2, 3)) if features.ndim == 4 else features


class _Scale:
    """A running mean and standard deviation of each feature, the same on every process.

    They move by ``(1 − ρ) · old + ρ · batch`` when the optimizer steps, from all micro-batches of a
    window together, and are used from the next step on.
    """

    def __init__(self, saved: dict[str, Tensor] | None) -> None:
        self._mean: Tensor | None = None if saved is None else saved["mean"].clone()
        self._deviation: Tensor | None = None if saved is None else saved["deviation"].clone()
        self._sums: Tensor | None = None

    @property
    def known(self) -> bool:
        return self._mean is not None

    def state(self) -> dict[str, Tensor | None]:
        return {"mean": self._mean, "deviation": self._deviation}

    def _known_on(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation on this device, if there are any yet."""
        if self._mean is None or self._deviation is None:
            return None
        self._mean, self._deviation = self._mean.to(device), self._deviation.to(device)
        return self._mean, self._deviation

    def sums(self, features: Tensor) -> Tensor:
        """Count, sum and sum of squares of the features, from the running mean."""
        rows = features.flatten(0, -2)
        known = self._known_on(rows.device)
        away = rows if known is None else rows - known[0]
        return torch.cat([away.new_tensor([len(away)]), away.sum(0), away.square().sum(0)])

    def applied(self, features: Tensor) -> Tensor:
        known = self._known_on(features.device)
        return features if known is None else (features - known[0]) / (known[1] + 1e-6)

    def note(self, sums: Tensor) -> None:
        self._sums = sums if self._sums is None else self._sums + sums

    def move(self, momentum: float) -> None:
        if self._sums is None:
            return
        count, rest = self._sums[0], self._sums[1:]
        away, square = rest.chunk(2)
        shift = away / count
        variance = (square - count * shift.square()) / (count - 1).clamp_min(1)
        # One example alone says nothing of the scale.
        deviation = torch.where(count > 1, variance.clamp_min(0).sqrt(), 1.0)
        known = self._known_on(shift.device)
        if known is None:
            self._mean, self._deviation = shift, deviation
        else:
            self._mean = torch.lerp(known[0], known[0] + shift, momentum)
            self._deviation = torch.lerp(known[1], deviation, momentum)
        self._sums = None


class _Projectors(nn.Module):
    """For each teacher a ladder: a projector from each of the student's layers, added up."""

    def __init__(self, widths: list[int], hidden: int | None, teachers: list[int]) -> None:
        super().__init__()
        self.ladders = nn.ModuleList(
            nn.ModuleList(_projector(width, hidden or width, outer) for width in widths)
            for outer in teachers
        )

    def forward(self, *student: Tensor) -> list[Tensor]:
        """The student's features as those of each teacher."""
        found = []
        for ladder in self.ladders:
            rungs: Any = zip(ladder, student, strict=True)  # type: ignore[call-overload]
            first, *rest = [project(each) for project, each in rungs]
            found.append(sum(rest, start=first))
        return found


def _projector(inner: int, hidden: int, outer: int) -> nn.Module:
    layers = nn.Sequential(nn.Linear(inner, hidden), nn.GELU(), nn.Linear(hidden, outer))
    for each in layers:
        if isinstance(each, nn.Linear):
            nn.init.trunc_normal_(each.weight, std=0.02)
            nn.init.zeros_(each.bias)
    return layers
