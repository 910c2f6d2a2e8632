"""Named stretches of training, one after the other: `"warmup: 10%, main: 70%, cool: rest"`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .horizon import Duration, Horizon
from .parse import ScheduleError, one_line

__all__ = ["Division"]

EXAMPLE = "warmup: 10%, main: 70%, cool: rest"
REST = "rest"


class Division:
    """Phases of training by name, each as long as was written.

    Attributes:
        lengths: name to length; None is what the other phases leave.

    Args:
        spec: `"warmup: 10%, main: 70%, cool: rest"`, or a mapping of names to lengths: optimizer
            steps, `"500 steps"`, `"10ep"`, `"30%"`, or `"rest"` for the last one.

    Raises:
        ScheduleError: (a ValueError) for a name that is none or comes twice, a length that is no
            time or zero, a rest that is not the last, or more than 100 percent.

    Examples:
        >>> Division("warmup: 10%, main: rest").of(Horizon(total=50)).phases
        {'warmup': (0, 5), 'main': (5, 50)}
    """

    def __init__(self, spec: str | Mapping[str, str | int | Duration]) -> None:
        self.lengths: dict[str, Duration | None] = {}
        for name, length in _pairs(spec):
            if not name.isidentifier():
                raise _error(f"{name!r} cannot be the name of a phase: letters, digits and _")
            if name in self.lengths:
                raise _error(f"the phase {name!r} is there twice")
            if None in self.lengths.values():
                raise _error(f"{name!r} comes after the rest of training")
            parsed = None if length == REST else Duration.parse(length)
            if parsed is not None and parsed.amount == 0:
                raise _error(f"the phase {name!r} has no length")
            self.lengths[name] = parsed
        if not self.lengths:
            raise _error("there is no phase")
        parts = [each for each in self.lengths.values() if each is not None]
        percent = sum(each.amount for each in parts if each.unit == "percent")
        if percent > 100 + 1e-9:
            raise _error(f"the phases take {percent:g}% of training")

    def __repr__(self) -> str:
        return f"Division({str(self)!r})"

    def __str__(self) -> str:
        return ", ".join(
            f"{name}: {REST if length is None else length}" for name, length in self.lengths.items()
        )

    def of(self, horizon: Horizon) -> Horizon:
        """Returns the horizon with these phases in it.

        A phase ends where all lengths up to it end, so percentages are rounded once, not each.

        Raises:
            ValueError: when a length needs what the horizon does not know, a phase is less than
                one optimizer step, or the phases are longer than training.
        """
        found: dict[str, tuple[int, int]] = {}
        start, percent, origin = 0, 0.0, 0
        for name, length in self.lengths.items():
            if length is None:
                end = horizon.steps("100%")
            elif length.unit == "percent":
                percent += length.amount
                end = horizon.end(Duration(min(percent, 100.0), "percent"), origin)
            else:
                end = horizon.end(length, start)
                percent, origin = 0.0, end
            if end <= start:
                raise ValueError(
                    f"the phase {name!r} has no optimizer step: it would last from step {start} to "
                    f"{end}"
                )
            found[name] = (start, end)
            start = end
        if horizon.total is not None and start > horizon.total:
            raise ValueError(
                f"the phases take {start} optimizer steps, and this training has {horizon.total}"
            )
        return replace(horizon, phases=found)


def _pairs(
    spec: str | Mapping[str, str | int | Duration],
) -> list[tuple[str, str | int | Duration]]:
    if not isinstance(spec, str):
        return [(str(name), length) for name, length in spec.items()]
    pairs: list[tuple[str, str | int | Duration]] = []
    for part in one_line(spec).split(","):
        name, colon, length = part.partition(":")
        if not colon:
            raise _error(f"{part.strip()!r} is not a name and a length with a colon between")
        pairs.append((name.strip(), length.strip()))
    return pairs


def _error(message: str) -> ScheduleError:
    return ScheduleError(f"{message}\nexample: {EXAMPLE}")
