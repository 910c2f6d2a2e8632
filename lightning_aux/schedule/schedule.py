"""Schedules: a scalar as a function of training progress, written as a float, string or object.

A schedule is an immutable description; `bind` resolves its times once for one `Horizon` and returns
the function that training calls.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, cast, get_args

from lightning_aux.functional.dropout import Shape, early, late

from .build import Role, build
from .horizon import Border, Duration, Horizon, Moment, parse_moment
from .parse import SCHEDULE_EXAMPLE, ScheduleError, near, pointed

Time: TypeAlias = Moment | str | int
Bound: TypeAlias = Callable[[int], float]

_SHAPES: tuple[str, ...] = get_args(Shape)


@dataclass(frozen=True)
class Schedule(ABC):
    """A scalar as a function of the number of completed optimizer steps.

    Equal descriptions compare equal, and `str(schedule)` parses back to an equal schedule.

    Examples:
        >>> Schedule.parse("linear(0, 1, until=50%)").values(total=4)
        [0.0, 0.5, 1.0, 1.0]
    """

    kind: ClassVar[str]
    # Arguments in the order of the string form, with what each of them holds.
    arguments: ClassVar[dict[str, Role]]

    @staticmethod
    def parse(spec: float | str | Schedule) -> Schedule:
        """Reads a schedule from what a user wrote.

        Args:
            spec: a finite number (a constant), a string such as `"0.5"` or
                `"cosine(1, 0, until=10ep)"`, or a Schedule, which is returned as it is.

        Returns:
            The schedule.

        Raises:
            ScheduleError: (a ValueError) with the string, a caret under the character that does
                not fit, what was expected there and a valid example.
        """
        if isinstance(spec, Schedule):
            return spec
        if isinstance(spec, str):
            return build(spec, _KINDS)
        if isinstance(spec, bool) or not isinstance(spec, (int, float)):
            kind = type(spec).__name__
            message = f"a schedule is a number, a string or a Schedule, not a {kind}"
            raise pointed(repr(spec), 0, message, SCHEDULE_EXAMPLE)
        if not math.isfinite(spec):
            raise pointed(repr(spec), 0, "expected a finite number", SCHEDULE_EXAMPLE)
        return Constant(spec)

    def bind(self, horizon: Horizon) -> Bound:
        """Resolves all times and returns the schedule as a function.

        Args:
            horizon: the length of training and of its epochs.

        Returns:
            A function from the number of completed optimizer steps (0 in the first step) to the
            value. Past the end of training it holds the value of the end.

        Raises:
            ValueError: when a time needs a length that the horizon does not know, or when times
                contradict each other (`until` before `after`).
        """
        function = self._bind(horizon, 0)
        total = horizon.total
        if total is None:
            return function
        return lambda step: function(step if step < total else total)

    def values(
        self, total: int, steps_per_epoch: int | SequenceOf[int] | None = None
    ) -> list[float]:
        """Returns the value of each step of a training of `total` optimizer steps, for plotting.

        Args:
            total: optimizer steps.
            steps_per_epoch: optimizer steps in an epoch, or one number per epoch; needed for times
                in epochs.
        """
        if isinstance(steps_per_epoch, int):
            steps_per_epoch = (steps_per_epoch,)
        epochs = None if steps_per_epoch is None else tuple(steps_per_epoch)
        function = self.bind(Horizon(total, epochs))
        return [function(step) for step in range(total)]

    def length(self, horizon: Horizon) -> int | None:
        """Returns the steps until the schedule's own end (its `until`), or None if it has none."""
        return self._end(horizon, 0) if self._has_end else None

    @property
    def durations(self) -> tuple[Moment, ...]:
        """All times in the schedule, in the order of its arguments."""
        found: list[Moment] = []
        for name in self.arguments:
            value = getattr(self, name)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, Duration | Border):
                    found.append(item)
                elif isinstance(item, Schedule):
                    found.extend(item.durations)
        return tuple(found)

    @property
    def _has_end(self) -> bool:
        # Whether the schedule says when it ends, so that another can follow it in a chain.
        return True

    def __str__(self) -> str:
        written: list[str] = []
        for field in dataclasses.fields(self):
            value, role = getattr(self, field.name), self.arguments[field.name]
            if role in ("value", "values", "phase", "parts"):
                written += map(_write, value if isinstance(value, tuple) else (value,))
            elif value is not None and value != _DEFAULTS.get(field.name):
                written.append(f"{field.name}={_write(value)}")
        return f"{self.kind}({', '.join(written)})"

    def __post_init__(self) -> None:
        for name, role in self.arguments.items():
            object.__setattr__(self, name, _normal(name, role, getattr(self, name)))

    @abstractmethod
    def _bind(self, horizon: Horizon, origin: int) -> Bound:
        """Returns the function of the absolute step for a schedule that starts at `origin`."""

    def _end(self, horizon: Horizon, origin: int) -> int:
        """Returns the absolute step at which the schedule ends; only asked when `_has_end`."""
        return horizon.end(cast(Any, self).until, origin)


@dataclass(frozen=True)
class Constant(Schedule):
    """The same value always; `until` only says where the next part of a chain begins."""

    kind = "constant"
    arguments: ClassVar[dict[str, Role]] = {"value": "value", "until": "end"}

    value: float
    until: Time | None = None

    @property
    def _has_end(self) -> bool:
        return self.until is not None

    def __str__(self) -> str:
        return super().__str__() if self._has_end else _write(self.value)

    def _bind(self, horizon: Horizon, origin: int) -> Bound:
        return lambda step: self.value


@dataclass(frozen=True)
class _Ramp(Schedule):
    """From `start` to `end`; subclasses say along which curve.

    Args:
        start: value up to step `after`.
        end: value from step `until` on, reached exactly there.
        until: time at which `end` is reached.
        after: time at which the way begins.
    """

    arguments: ClassVar[dict[str, Role]] = {
        "start": "value",
        "end": "value",
        "until": "time",
        "after": "time",
    }

    start: float
    end: float
    until: Time = "100%"
    after: Time = 0

    @abstractmethod
    def _between(self, share: float) -> float:
        """Returns the value after a share (0 to 1, exclusive) of the way."""

    def _bind(self, horizon: Horizon, origin: int) -> Bound:
        first, last = horizon.end(self.after, origin), horizon.end(self.until, origin)
        if last < first:
            raise ValueError(
                f"{self}: until={self.until} (step {last}) lies before after={self.after} "
                f"(step {first}); both count from the same moment, so write a later until"
            )

        def value(step: int) -> float:
            if step >= last:
                return self.end
            if step <= first:
                return self.start
            return self._between((step - first) / (last - first))

        return value


@dataclass(frozen=True)
class Linear(_Ramp):
    """A straight line: start + (end − start)·s, s the share of the way."""

    kind = "linear"

    def _between(self, share: float) -> float:
        return self.start + (self.end - self.start) * share


@dataclass(frozen=True)
class Cosine(_Ramp):
    """Half a cosine: start + (end − start)·(1 − cos πs)/2, s the share of the way."""

    kind = "cosine"

    def _between(self, share: float) -> float:
        return self.start + (self.end - self.start) * (1 - math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class Exponential(_Ramp):
    """Geometric interpolation: start^(1−s)·end^s, s the share of the way; both values above 0."""

    kind = "exponential"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("start", "end"):
            if getattr(self, name) <= 0:
                message = f"exponential needs {name} above 0, not {_write(getattr(self, name))}"
                raise ScheduleError(f"{message}; linear and cosine may touch 0", name)

    def _between(self, share: float) -> float:
        # Two powers instead of a power of the quotient, which could overflow.
        return float(self.start ** (1 - share) * self.end**share)


@dataclass(frozen=True)
class Steps(Schedule):
    """Piecewise constant: `values[i]` before time `at[i]`, the last value from `at[-1]` on.

    Args:
        values: one value more than times.
        at: the time, or the times in order, at which the value changes.
    """

    kind = "step"
    arguments: ClassVar[dict[str, Role]] = {"levels": "values", "at": "times"}

    levels: SequenceOf[float]
    at: Time | SequenceOf[Time]

    def __post_init__(self) -> None:
        super().__post_init__()
        levels, at = self._resolved()
        if len(levels) != len(at) + 1:
            message = (
                f"{len(at)} time(s) separate {len(at) + 1} values, but there are {len(levels)}"
            )
            raise ScheduleError(message, "at")

    @property
    def _has_end(self) -> bool:
        return False

    def _resolved(self) -> tuple[tuple[float, ...], tuple[Moment, ...]]:
        return cast(tuple[float, ...], self.levels), cast(tuple[Moment, ...], self.at)

    def _bind(self, horizon: Horizon, origin: int) -> Bound:
        levels, at = self._resolved()
        changes = [horizon.end(time, origin) for time in at]
        if changes != sorted(changes):
            raise ValueError(f"{self}: the times must be in order, but are the steps {changes}")
        return lambda step: levels[bisect_right(changes, step)]


@dataclass(frozen=True)
class Early(Schedule):
    """A value at the start of training only: in steps [0, until), then 0.

    Args:
        value: the value in the first step.
        until: time from which the schedule is 0.
        shape: `"constant"`; `"linear"`, the published rule `numpy.linspace(value, 0, until)`, of
            which the last step before `until` is already 0 (Liu et al. 2023, "Dropout Reduces
            Underfitting", arXiv:2303.01500, `drop_scheduler` of their code); or `"cosine"`, half a
            cosine over the same steps.
    """

    kind = "early"
    arguments: ClassVar[dict[str, Role]] = {"value": "value", "until": "time", "shape": "shape"}

    value: float
    until: Time
    shape: Shape = "constant"

    def _bind(self, horizon: Horizon, origin: int) -> Bound:
        until = horizon.end(self.until, origin)
        return lambda step: early(step - origin, self.value, until - origin, self.shape)


@dataclass(frozen=True)
class Late(Schedule):
    """A value at the end of training only: 0 before step `start`.

    Args:
        value: the value at the end of training.
        start: time from which the schedule is not 0.
        shape: `"constant"`, the published rule (Liu et al. 2023, arXiv:2303.01500); or `"linear"`
            or `"cosine"`, a rise from 0 at `start` to `value` at 100% of training, as in
            `linear(0, value, after=start)`.
    """

    kind = "late"
    arguments: ClassVar[dict[str, Role]] = {"value": "value", "start": "time", "shape": "shape"}

    value: float
    start: Time
    shape: Shape = "constant"

    @property
    def _has_end(self) -> bool:
        return False

    def _bind(self, horizon: Horizon, origin: int) -> Bound:
        start = horizon.end(self.start, origin)
        # A constant needs no end, so it also serves a training of unknown length.
        total = start if self.shape == "constant" else horizon.steps("100%")
        return lambda step: late(step, self.value, start, total, self.shape)


@dataclass(frozen=True)
class During(Schedule):
    """A value during one named phase of training, 0 before and after it.

    Args:
        value: the value during the phase.
        phase: its name, as given to `Phases`.
    """

    kind = "during"
    arguments: ClassVar[dict[str, Role]] = {"value": "value", "phase": "phase"}

    value: float
    phase: str

    def _end(self, horizon: Horizon, origin: int) -> int:
        return horizon.end(Border(self.phase, "end"), origin)

    def _bind(self, horizon: Horizon, origin: int) -> Bound:
        first = horizon.end(Border(self.phase, "start"), origin)
        last = self._end(horizon, origin)
        return lambda step: self.value if first <= step < last else 0.0


@dataclass(frozen=True)
class Sum(Schedule):
    """The sum of schedules that all count from the same moment.

    Args:
        parts: schedules, or numbers and strings that stand for one.
    """

    kind = "sum"
    arguments: ClassVar[dict[str, Role]] = {"parts": "parts"}

    parts: SequenceOf[Schedule | str | float]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            raise ScheduleError("a sum needs at least one part", "parts")

    @property
    def _has_end(self) -> bool:
        return all(part._has_end for part in self._schedules())

    def _schedules(self) -> tuple[Schedule, ...]:
        return cast(tuple[Schedule, ...], self.parts)

    def _end(self, horizon: Horizon, origin: int) -> int:
        return max(part._end(horizon, origin) for part in self._schedules())

    def _bind(self, horizon: Horizon, origin: int) -> Bound:
        functions = [part._bind(horizon, origin) for part in self._schedules()]
        return lambda step: math.fsum(function(step) for function in functions)


@dataclass(frozen=True)
class Chain(Schedule):
    """Schedules one after the other, each beginning where the one before it ends.

    The times of a part count from the end of the part before; percent is always of the whole
    training. All parts but the last need an end, which is their `until`.

    Args:
        parts: schedules, or numbers and strings that stand for one.
    """

    kind = "chain"
    arguments: ClassVar[dict[str, Role]] = {"parts": "parts"}

    parts: SequenceOf[Schedule | str | float]

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = self._schedules()
        if not parts:
            raise ScheduleError("a chain needs at least one part", "parts")
        for index, part in enumerate(parts[:-1]):
            if not part._has_end:
                raise ScheduleError(
                    f"part {index + 1} of the chain, {part}, has no end, so only the last part may "
                    f"be one; a constant with an end is written constant(1, until=5ep)",
                    f"parts[{index}]",
                )

    @property
    def _has_end(self) -> bool:
        return self._schedules()[-1]._has_end

    def _schedules(self) -> tuple[Schedule, ...]:
        return cast(tuple[Schedule, ...], self.parts)

    def _end(self, horizon: Horizon, origin: int) -> int:
        for part in self._schedules():
            origin = part._end(horizon, origin)
        return origin

    def _bind(self, horizon: Horizon, origin: int) -> Bound:
        starts: list[int] = []
        functions: list[Bound] = []
        for part in self._schedules():
            starts.append(origin)
            functions.append(part._bind(horizon, origin))
            end = part._end(horizon, origin) if part._has_end else origin
            if end < origin:  # only the border of a phase can lie before
                raise ValueError(f"{self}: {part} ends at step {end}, before it begins ({origin})")
            origin = end
        return lambda step: functions[max(bisect_right(starts, step) - 1, 0)](step)


@dataclass(frozen=True)
class Epochwise(Schedule):
    """A schedule in steps of whole epochs: during an epoch, the value that it has at its end.

    In the last epoch of training that is the value of the end: ``epochwise(linear(0, 0.8))`` is
    0.8 · (e + 1)/E in epoch e (from 0) of E.

    Args:
        parts: the one schedule, or a number or string that stands for it.
    """

    kind = "epochwise"
    arguments: ClassVar[dict[str, Role]] = {"parts": "parts"}

    parts: SequenceOf[Schedule | str | float]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.parts) != 1:
            raise ScheduleError(
                f"epochwise holds one schedule, not {len(self.parts)}; several are one as a chain "
                f"or a sum",
                "parts",
            )

    @property
    def _part(self) -> Schedule:
        return cast(tuple[Schedule, ...], self.parts)[0]

    @property
    def _has_end(self) -> bool:
        return self._part._has_end

    def _end(self, horizon: Horizon, origin: int) -> int:
        return self._part._end(horizon, origin)

    def _bind(self, horizon: Horizon, origin: int) -> Bound:
        function, end = self._part._bind(horizon, origin), horizon.epoch_end
        last = horizon.total
        end(0)  # an error of the horizon is one of binding
        return lambda step: function(end(step) if last is None else min(end(step), last))


_KINDS: dict[str, type[Schedule]] = {
    cls.kind: cls
    for cls in (
        Constant,
        Linear,
        Cosine,
        Exponential,
        Steps,
        Early,
        Late,
        During,
        Sum,
        Chain,
        Epochwise,
    )
}
_DEFAULTS = {"after": Duration(0, "steps"), "shape": "constant"}


def _normal(name: str, role: Role, value: Any) -> Any:
    """Checks one argument and returns it in the one form in which a schedule keeps it."""
    if role == "value":
        return _number(name, value)
    if role == "values":
        return tuple(_number(name, item) for item in value)
    if role == "parts":
        return tuple(Schedule.parse(item) for item in value)
    if role in ("time", "end"):  # an end may be left open
        return None if value is None and role == "end" else _time(name, value)
    if role == "times":
        alone = isinstance(value, (Duration, Border, str)) or not isinstance(value, SequenceOf)
        return tuple(_time(name, item) for item in ((value,) if alone else value))
    if role == "phase":
        if not isinstance(value, str) or not value.isidentifier():
            raise ScheduleError(f"{name} is the name of a phase of training, not {value!r}", name)
        return value
    if value not in _SHAPES:
        hint = near(str(value), list(_SHAPES))
        raise ScheduleError(f"shape is one of {', '.join(_SHAPES)}, not {value!r}.{hint}", name)
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ScheduleError(f"{name} must be a finite number, not {value!r}", name)
    return float(value)


def _time(name: str, value: Any) -> Moment:
    try:
        return parse_moment(value)
    except ScheduleError as error:
        raise ScheduleError(f"{name}: {error}", name) from None


def _write(value: Any) -> str:
    """Writes an argument so that it parses back to the same value."""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    if isinstance(value, tuple):
        return _write(value[0]) if len(value) == 1 else f"[{', '.join(map(_write, value))}]"
    return str(value)
