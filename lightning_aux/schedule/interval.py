"""`Interval`: a time that comes again and again, such as the end of every epoch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import TypeAlias

from .horizon import Border, Duration, Horizon, Moment, parse_moment
from .parse import ScheduleError

Time: TypeAlias = int | str | Moment


class Interval:
    """Every so often, counted from a start.

    Attributes:
        every: from one time to the next.
        start: the first time. At step 0 nothing has happened yet: the times after it count.

    Args:
        every: optimizer steps, `"500 steps"`, `"1ep"` or `"5%"`.
        start: likewise, or the border of a phase (`"main.start"`).

    Raises:
        ScheduleError: (a ValueError) for what is not a time, or an `every` of zero.

    Examples:
        >>> due = Interval("1ep").bind(Horizon(total=9, epoch_steps=(3,)))
        >>> [step for step in range(1, 10) if due(step)]
        [3, 6, 9]
    """

    def __init__(self, every: Time, start: Time = 0) -> None:
        if isinstance(every, Border):
            raise ScheduleError(f"every={every} is a moment, and a length of time is needed")
        self.every = Duration.parse(every)
        self.start = parse_moment(start)
        if self.every.amount == 0:
            raise ScheduleError("every is the time from one to the next, so it is more than zero")

    def __repr__(self) -> str:
        return f"Interval({str(self.every)!r}, start={str(self.start)!r})"

    def bind(self, horizon: Horizon) -> Callable[[int], bool]:
        """Returns whether it is time, as a function of the completed optimizer steps.

        Raises:
            ValueError: when a time needs a length that the horizon does not know, or is less than
                an optimizer step.
        """
        every = self.every
        first = horizon.steps(self.start)
        if every.unit == "steps":
            steps = int(every.amount)
            return lambda step: step >= first and (step - first) % steps == 0

        def time(number: int) -> int | None:
            amount = number * every.amount
            if every.unit == "percent" and amount > 100:
                return None  # training is over by then
            return horizon.end(Duration(amount, every.unit), first)

        second = time(1)
        if second is not None and second <= first:
            raise ValueError(f"every={every} is less than one optimizer step of this training")
        times = [first]  # as far as anybody has asked

        def due(step: int) -> bool:
            if step < first:
                return False
            while times[-1] < step:
                following = time(len(times))
                if following is None:
                    return False
                times.append(following)
            return times[bisect_left(times, step)] == step

        return due
