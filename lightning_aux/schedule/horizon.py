"""Units of time: `Duration` (a length of training as the user wrote it) and `Horizon`.

A `Horizon` knows how long training is and turns durations into optimizer steps.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate
from typing import Literal, TypeAlias, cast

from .parse import (
    EDGES,
    TIME_EXAMPLE,
    Quantity,
    ScheduleError,
    Unit,
    Word,
    near,
    one_line,
    parse_time,
    pointed,
)

_SUFFIX: dict[Unit, str] = {"steps": " steps", "epochs": "ep", "percent": "%"}


@dataclass(frozen=True)
class Duration:
    """A length of training: an amount of optimizer steps, of epochs or of percent of the whole.

    Attributes:
        amount: not negative; a whole number for steps, at most 100 for percent.
        unit: `"steps"` (optimizer steps), `"epochs"` or `"percent"`.

    Raises:
        ScheduleError: (a ValueError) for an amount outside these bounds.

    Examples:
        >>> Duration.parse("10ep")
        Duration(amount=10.0, unit='epochs')
    """

    amount: float
    unit: Unit

    def __post_init__(self) -> None:
        if self.unit not in _SUFFIX:
            raise ScheduleError(f"unit must be one of {', '.join(_SUFFIX)}, not {self.unit!r}")
        if isinstance(self.amount, bool) or not math.isfinite(self.amount):
            raise ScheduleError(f"a time must be a finite number, not {self.amount!r}")
        if self.amount < 0:
            raise ScheduleError(f"a time cannot be negative: {self.amount:g}")
        if self.unit == "percent" and self.amount > 100:
            raise ScheduleError(f"{self.amount:g}% is more than the whole training (100%)")
        if self.unit == "steps" and self.amount != int(self.amount):
            raise ScheduleError(f"steps are whole optimizer steps, not {self.amount!r}")
        object.__setattr__(self, "amount", float(self.amount))

    @classmethod
    def parse(cls, spec: int | str | Duration) -> Duration:
        """Reads a duration.

        Args:
            spec: an int (optimizer steps), a string (`"500"`, `"500 steps"`, `"10ep"`,
                `"2.5 epochs"`, `"30%"`) or a Duration, which is returned as it is.

        Returns:
            The duration.

        Raises:
            ScheduleError: (a ValueError) for negative amounts, more than 100 %, a bool, and a
                fraction without a unit.
        """
        if isinstance(spec, Duration):
            return spec
        if isinstance(spec, int) and not isinstance(spec, bool):
            if spec < 0:
                raise pointed(str(spec), 0, "a time cannot be negative", TIME_EXAMPLE)
            return cls(spec, "steps")
        if isinstance(spec, float):
            text = repr(spec)
            raise pointed(text, len(text), f"{text} has no unit of time", TIME_EXAMPLE)
        if not isinstance(spec, str):
            kind = type(spec).__name__
            raise pointed(repr(spec), 0, f"a time cannot be a {kind}", TIME_EXAMPLE)
        text = one_line(spec)
        parsed = parse_time(text)
        if isinstance(parsed, Word):
            message = f"{parsed.text} is a moment, and here a length of time is needed"
            raise pointed(text, parsed.start, message, TIME_EXAMPLE)
        return cls.from_quantity(parsed, text)

    @classmethod
    def from_quantity(cls, node: Quantity, text: str) -> Duration:
        """Makes a duration of a parsed number; `text` is what the node's positions refer to."""
        if node.unit is None and not node.integral:
            number = text[node.start : node.end]
            raise pointed(text, node.end, f"{number} has no unit of time", TIME_EXAMPLE)
        try:
            return cls(node.value, node.unit or "steps")
        except ScheduleError as error:
            raise pointed(text, node.start, str(error), TIME_EXAMPLE) from None

    def __str__(self) -> str:
        whole = self.amount.is_integer() and self.amount < 1e15
        return f"{int(self.amount) if whole else self.amount!r}{_SUFFIX[self.unit]}"


@dataclass(frozen=True)
class Border:
    """The moment at which a named phase of training begins or ends.

    Attributes:
        phase: its name.
        edge: `"start"` or `"end"`.
    """

    phase: str
    edge: Literal["start", "end"]

    def __post_init__(self) -> None:
        if self.edge not in EDGES:
            raise ScheduleError(f"a phase has a start and an end, not {self.edge!r}")

    @classmethod
    def from_word(cls, node: Word) -> Border:
        """Makes a border of a parsed `main.start`."""
        phase, _, edge = node.text.partition(".")
        return cls(phase, cast(Literal["start", "end"], edge))

    def __str__(self) -> str:
        return f"{self.phase}.{self.edge}"


Moment: TypeAlias = Duration | Border


def parse_moment(spec: int | str | Moment) -> Moment:
    """Reads a moment: a `Duration` counted from the start of training, or a `Border`.

    Raises:
        ScheduleError: (a ValueError) as `Duration.parse`.
    """
    if isinstance(spec, Border):
        return spec
    if isinstance(spec, str):
        parsed = parse_time(spec)
        if isinstance(parsed, Word):
            return Border.from_word(parsed)
    return Duration.parse(spec)


@dataclass(frozen=True)
class Horizon:
    """How long training is, in optimizer steps.

    Attributes:
        total: optimizer steps of the whole training; None where it has no end.
        epoch_steps: optimizer steps of each epoch, because gradient accumulation may change from
            epoch to epoch. The last value holds for all later epochs; None where it is unknown.
        phases: first and last step (the latter not included) of each named phase of training.

    Raises:
        ValueError: for a negative total or an epoch of less than one step.
    """

    total: int | None = None
    epoch_steps: tuple[int, ...] | None = None
    phases: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.total is not None and self.total < 0:
            raise ValueError(f"total must be at least 0 optimizer steps or None, not {self.total}")
        if self.epoch_steps is None:
            return
        object.__setattr__(self, "epoch_steps", tuple(self.epoch_steps))
        if not self.epoch_steps or min(self.epoch_steps) < 1:
            raise ValueError(
                f"epoch_steps must hold at least one optimizer step per epoch: {self.epoch_steps}"
            )

    def steps(self, duration: Moment | int | str) -> int:
        """Returns the duration, counted from the start of training, in optimizer steps.

        Epochs are the steps of these epochs, a fraction being interpolated inside its epoch;
        percent is of `total`. Both are rounded half up.

        Raises:
            ValueError: when the unit needs `total` or `epoch_steps` and it is None.
        """
        return self.end(duration, 0)

    def end(self, duration: Moment | int | str, origin: int) -> int:
        """Returns the step at which a duration ends that starts at step `origin`.

        It differs from `origin + steps(duration)` for epochs of unequal length. Percent is always
        of the whole training. The border of a phase is where it is, whatever the origin.
        """
        duration = parse_moment(duration)
        if isinstance(duration, Border):
            return self._border(duration)
        # Through the decimal form: 0.1 epoch of 5 steps is exactly half a step, not a hair more.
        amount = Fraction(repr(duration.amount))
        if duration.unit == "steps":
            return origin + int(amount)
        if duration.unit == "percent":
            if self.total is None:
                raise ValueError(_unknown(duration, "the length of the training"))
            return origin + _round_half_up(amount * self.total / 100)
        ends = self._epoch_ends(f"{duration}")
        return _round_half_up(self._position(self._epoch(origin, ends) + amount, ends))

    def epoch(self, step: int) -> float:
        """Returns the epoch (with its fraction) after `step` completed optimizer steps.

        Raises:
            ValueError: when `epoch_steps` is None.
        """
        return float(self._epoch(step, self._epoch_ends("the epoch of a step")))

    def epoch_end(self, step: int) -> int:
        """Returns the step at which the epoch ends that step `step` (from 0) belongs to.

        Raises:
            ValueError: when `epoch_steps` is None.
        """
        ends = self._epoch_ends("the end of an epoch")
        index = bisect_right(ends, step)
        if index < len(ends):
            return ends[index]
        length = self._length(index)
        return ends[-1] + ((step - ends[-1]) // length + 1) * length

    def fraction(self, step: int) -> float | None:
        """Returns the share of training, 0 to 1, done after `step` steps; None without `total`."""
        if self.total is None:
            return None
        return min(step / self.total, 1.0) if self.total else 1.0

    def _border(self, border: Border) -> int:
        if border.phase not in self.phases:
            known = ", ".join(self.phases)
            raise ValueError(
                f"{border}: no phase of training is called {border.phase!r}."
                + near(border.phase, list(self.phases))
                + (f" There are {known}." if known else " Name them: Phases('warmup: 10%, ...').")
            )
        return self.phases[border.phase][EDGES.index(border.edge)]

    def _epoch_ends(self, asked: str) -> list[int]:
        if self.epoch_steps is None:
            raise ValueError(_unknown(asked, "the number of optimizer steps in an epoch"))
        return list(accumulate(self.epoch_steps))

    def _epoch(self, step: int, ends: list[int]) -> Fraction:
        index = bisect_right(ends, step)
        start = ends[index - 1] if index else 0
        return index + Fraction(step - start, self._length(index))

    def _position(self, epoch: Fraction, ends: list[int]) -> Fraction:
        index = min(math.floor(epoch), len(ends))
        start = ends[index - 1] if index else 0
        return start + (epoch - index) * self._length(index)

    def _length(self, index: int) -> int:
        assert self.epoch_steps is not None
        return self.epoch_steps[min(index, len(self.epoch_steps) - 1)]


def _round_half_up(number: Fraction) -> int:
    return math.floor(number + Fraction(1, 2))


def _unknown(asked: object, what: str) -> str:
    return (
        f"{asked} cannot be turned into optimizer steps, because {what} is unknown: "
        "give max_steps/max_epochs or write the time in steps, such as '500 steps'"
    )
