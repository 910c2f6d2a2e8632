"""Reads the `metrics.csv` of Lightning's `CSVLogger`, as far as it can be read."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

METRICS_FILE = "metrics.csv"
_PLACES = ("step", "epoch")

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """What was logged under one name, in the order of the file.

    Attributes:
        steps: Optimizer steps before it was logged, as Lightning counts them.
        epochs: The epoch, from 0; NaN where the logger was not told, as by LearningRateMonitor.
        values: What was logged; may be NaN or infinite.
    """

    steps: Numbers
    epochs: Numbers
    values: Numbers


@dataclass(frozen=True)
class Log:
    """A run's log.

    Attributes:
        series: By name, in the order of the file's header.
        problems: What could not be read, in sentences.
    """

    series: dict[str, Series] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_log(directory: Path) -> Log:
    """The log of the run in a folder. What is missing or broken is said, not raised."""
    path = directory / METRICS_FILE
    if not path.is_file():
        return Log(problems=[f"{METRICS_FILE} is missing: nothing was logged, or not yet."])
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = [_fields(line) for line in text.splitlines()]
    if not lines:
        return Log(problems=[f"{METRICS_FILE} is empty: the run ended before anything was logged."])
    header, *rows = lines
    if not set(_PLACES) <= set(header):
        return Log(
            problems=[
                f"{METRICS_FILE} begins with {','.join(header)[:60]!r} and not with the names of "
                "its columns, step and epoch among them."
            ]
        )
    found: dict[str, list[tuple[float, float, float]]] = {
        name: [] for name in header if name not in _PLACES
    }
    broken = 0
    if rows and not text.endswith("\n"):  # its last number may be cut, and still be a number
        rows.pop()
        broken = 1
    for row in rows:
        numbers = _numbers(header, row)
        if numbers is None:
            broken += 1
            continue
        place = numbers["step"], numbers.get("epoch", math.nan)
        for name in found:
            if name in numbers:
                found[name].append((*place, numbers[name]))
    problems = []
    if broken:
        counted = "1 line" if broken == 1 else f"{broken} lines"
        problems.append(
            f"{METRICS_FILE}: {counted} cut off, or with something else than numbers; left out."
        )
    series = {name: Series(*np.array(points).T) for name, points in found.items() if points}
    if not series and not problems:
        problems.append(f"{METRICS_FILE} has the names of its columns and no values yet.")
    problems += _not_finite(series)
    return Log(series, problems)


def _fields(line: str) -> list[str]:
    """The fields of one line, read by itself: a stray quote would swallow those after it."""
    try:
        return next(csv.reader([line.replace("\0", "")]), [])
    except csv.Error:
        return []


def _numbers(header: list[str], row: list[str]) -> dict[str, float] | None:
    """The numbers of a line by name; None where the line is not whole."""
    if len(row) != len(header):
        return None
    try:
        numbers = {name: float(text) for name, text in zip(header, row, strict=True) if text}
    except ValueError:
        return None
    return numbers if math.isfinite(numbers.get("step", math.nan)) else None


def _not_finite(series: dict[str, Series]) -> list[str]:
    said = []
    for name, each in series.items():
        wrong = np.flatnonzero(~np.isfinite(each.values))
        if wrong.size:
            first = each.values[wrong[0]]
            shown = "NaN" if math.isnan(first) else "infinite"
            said.append(f"{name} is {shown} from step {each.steps[wrong[0]]:.0f} on.")
            if wrong.size < len(each.values) - wrong[0]:
                said[-1] = (
                    f"{name} is not finite {wrong.size} times, first at step "
                    f"{each.steps[wrong[0]]:.0f}."
                )
    return said
