"""`lightning-aux schedule`: what a schedule does, as a chart and a picture, before it runs."""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_aux import AuxiliaryError
from lightning_aux.schedule import (
    Border,
    Chain,
    Division,
    Duration,
    During,
    Epochwise,
    Horizon,
    Moment,
    Schedule,
    ScheduleError,
    Sum,
)

EPOCHS = 100
STEPS_PER_EPOCH = 100
MOST_STEPS = 10_000_000  # every step is looked at, so that none is missed: about half a minute
WIDTH = 72
HEIGHT = 10
MOST_EVENTS = 8
# Points of the picture's line: more than its pixels.
_POINTS = 2000
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_PLAIN = str.maketrans("▁▂▃▄▅▆▇█▒", "___ooo##:")
_COLOURS = ("bright_blue", "red", "green", "magenta", "yellow", "cyan")


@dataclass(frozen=True)
class Curve:
    """A schedule and its value in each optimizer step of the training."""

    name: str
    values: Sequence[float]


def schedule(args: Sequence[str]) -> int:
    """Run the subcommand.

    Args:
        args: Arguments without the subcommand's name.

    Returns:
        Exit status 0, without matplotlib too: the chart is there, and a line says what to install.

    Raises:
        SystemExit: With status 2 when the arguments are wrong.
        AuxiliaryError: When a schedule or the phases do not parse or do not fit the training, or
            the picture cannot be written.
    """
    parser = _parser()
    given = parser.parse_args(args)
    if given.out.suffix.lower() != ".png":
        parser.error(f"argument --out: the picture is a PNG, so name it .png: {str(given.out)!r}")
    horizon = _horizon(given)
    curves = [_curve(spec, horizon) for spec in given.specs]
    console = Console(highlight=False)
    _print_length(given, horizon, console)
    for index, curve in enumerate(curves):
        _print_curve(curve, horizon, console, _COLOURS[index % len(_COLOURS)])
    try:
        picture = _picture(curves, horizon)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("matplotlib", "scipy"):
            raise
        _line(console, f"no picture, which needs '{missing}': pip install 'lightning-aux[recipes]'")
        return 0
    try:
        given.out.write_bytes(picture)
    except OSError as error:
        raise AuxiliaryError(f"schedule: cannot write {given.out}: {error.strerror}") from error
    _line(console, f"wrote {given.out}")
    return 0


def chart_rows(
    values: Sequence[float], width: int, height: int = HEIGHT, plain: bool = False
) -> list[str]:
    """The area under the values, from the lowest to the highest, as rows of block characters.

    A column stands for one or more steps. It is filled up to their mean where they lie within the
    height of a character, else up to the lowest of them, with a shade from there to the highest:
    a spike of a single step is seen however many steps there are. The lowest value is an eighth of
    a character, so it is seen as well. A constant fills the lower half.

    Args:
        values: The value of each step, at least one.
        width: Columns.
        height: Rows.
        plain: ASCII only, for an output that can show no more.

    Returns:
        The rows, from the top, each of `width` characters.
    """
    low, high = min(values), max(values)

    def level(value: float) -> int:
        if high == low:
            return 4 * height
        share = (value - low) / (high - low)
        return 1 + round(share * (8 * height - 1))

    columns = []
    for first, last in _parts(len(values), width):
        part = values[first:last]
        solid, shade = level(min(part)), level(max(part))
        if shade - solid <= 8:
            solid = shade = level(math.fsum(part) / len(part))
        columns.append((solid, shade))
    rows = []
    for floor in range(8 * (height - 1), -1, -8):
        cells = [_cell(solid - floor, shade - floor) for solid, shade in columns]
        rows.append("".join(cells).translate(_PLAIN) if plain else "".join(cells))
    return rows


def _cell(solid: int, shade: int) -> str:
    """One character, with the levels in eighths above its lower edge."""
    if solid <= 0 < shade:
        return "▒" if shade >= 4 else " "
    return _EIGHTHS[min(max(solid, 0), 8)]


def events(values: Sequence[float]) -> dict[int, str]:
    """The steps at which a schedule jumps, or begins or ends to rise or to fall, and which it is.

    A change counts as a jump when it is more than four times the change before and the one after
    it in the same direction. What is smaller than the rounding of the numbers is no change.
    """
    found: dict[int, str] = {}
    total = len(values)

    def change(step: int) -> float:
        if not 0 < step < total:
            return 0.0
        before, after = values[step - 1], values[step]
        rounding = 16 * sys.float_info.epsilon * max(abs(before), abs(after))
        return after - before if abs(after - before) > rounding else 0.0

    earlier, now = 0.0, change(1)
    jumped = False  # in the step before
    for step in range(1, total):
        following = change(step + 1)
        likewise = [abs(other) for other in (earlier, following) if other * now > 0]
        jumps = now != 0 and abs(now) > 4 * max(likewise, default=0.0)
        if jumps:
            text = f"jumps from {_short(values[step - 1])}"
            found[step] = text
        elif not jumped and _sign(earlier) != _sign(now):
            found[step - 1] = _TURNS[_sign(now)]
        elif jumped and now:
            found[step - 1] += f", then {'rises' if now > 0 else 'falls'}"
        earlier, now, jumped = now, following, jumps
    return found


_TURNS = {1: "starts to rise", -1: "starts to fall", 0: "stays"}


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-aux schedule",
        description="Show schedules before they run: a chart and the values at some steps in the "
        "terminal, and a picture.",
        epilog="example: lightning-aux schedule 'early(0.1, until=50ep)' --epochs 300",
    )
    parser.add_argument(
        "specs",
        metavar="SPEC",
        nargs="+",
        help="a schedule as in a config, such as 'cosine(1, 0, until=50%%)'; each gets its line",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs", metavar="N", type=_count, help=f"length of the training; {EPOCHS} by default"
    )
    length.add_argument(
        "--steps",
        metavar="N",
        type=_count,
        help="length of the training in optimizer steps; times in epochs then need "
        "--steps-per-epoch",
    )
    parser.add_argument(
        "--steps-per-epoch",
        metavar="N",
        type=_count,
        help=f"optimizer steps in an epoch; {STEPS_PER_EPOCH} by default",
    )
    parser.add_argument(
        "--phases",
        metavar="PHASES",
        help="of the training, for schedules that name them: 'warmup: 10%%, main: rest'",
    )
    parser.add_argument(
        "--out",
        metavar="FILE.png",
        type=Path,
        default=Path("schedule.png"),
        help="the picture; schedule.png by default",
    )
    return parser


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, not {text!r}")
    return number


def _horizon(given: argparse.Namespace) -> Horizon:
    per_epoch = given.steps_per_epoch
    total = given.steps
    if total is None:
        per_epoch = per_epoch or STEPS_PER_EPOCH
        total = (given.epochs or EPOCHS) * per_epoch
    if total > MOST_STEPS:
        raise AuxiliaryError(
            f"schedule: looks at each of {total} optimizer steps, and at most at {MOST_STEPS}. "
            "Fewer steps in an epoch show the same shape."
        )
    horizon = Horizon(total, per_epoch and (per_epoch,))
    if given.phases is None:
        return horizon
    times: Iterable[Moment | None] = ()
    try:
        division = Division(given.phases)
        times = division.lengths.values()
        return division.of(horizon)
    except ValueError as error:
        raise AuxiliaryError(f"--phases: {error}{_here(horizon, times)}") from error


def _curve(spec: str, horizon: Horizon) -> Curve:
    try:
        parsed = Schedule.parse(spec)
    except ScheduleError as error:
        raise AuxiliaryError(str(error)) from error
    assert horizon.total is not None
    try:
        function = parsed.bind(horizon)
        values = array("d", map(function, range(horizon.total)))
    except ValueError as error:
        here = _here(horizon, parsed.durations, _names_phase(parsed))
        named = "" if str(parsed) in str(error) else f"{parsed}: "
        raise AuxiliaryError(f"{named}{error}{here}") from error
    if not all(map(math.isfinite, values)):
        raise AuxiliaryError(f"{parsed}: has values that are too large for a number.")
    return Curve(str(parsed), values)


def _here(horizon: Horizon, times: Iterable[Moment | None], names_phase: bool = False) -> str:
    """The option of this command that tells what the times need and the horizon lacks."""
    epochs = any(isinstance(time, Duration) and time.unit == "epochs" for time in times)
    if epochs and horizon.epoch_steps is None:
        return "\nhere: --steps-per-epoch N"
    if names_phase and not horizon.phases:
        return "\nhere: --phases 'warmup: 10%, main: rest'"
    return ""


def _names_phase(schedule: Schedule) -> bool:
    parts = schedule.parts if isinstance(schedule, Chain | Sum | Epochwise) else ()
    return (
        isinstance(schedule, During)
        or any(isinstance(time, Border) for time in schedule.durations)
        or any(_names_phase(Schedule.parse(part)) for part in parts)
    )


def _print_length(given: argparse.Namespace, horizon: Horizon, console: Console) -> None:
    per_epoch = horizon.epoch_steps[0] if horizon.epoch_steps else None
    if given.steps is None:
        epochs = given.epochs or EPOCHS
        length = f"{_times(epochs, 'epoch')} of {_times(per_epoch or 0, 'optimizer step')}"
        length += f": {_times(horizon.total or 0, 'step')}"
    else:
        length = _times(given.steps, "optimizer step")
        length += f", {per_epoch} in an epoch" if per_epoch else ""
    _line(console, length)
    assumed = []
    if given.steps is None and given.epochs is None:
        assumed.append(f"{EPOCHS} epochs (--epochs N)")
    if given.steps is None and given.steps_per_epoch is None:
        assumed.append(f"{STEPS_PER_EPOCH} optimizer steps per epoch (--steps-per-epoch N)")
    if assumed:
        _line(console, f"assumed: {' and '.join(assumed)}", "dim")
    for name, (first, last) in horizon.phases.items():
        _line(console, f"phase {name}: steps {first} to {last}", "dim")


def _print_curve(curve: Curve, horizon: Horizon, console: Console, colour: str) -> None:
    console.print()
    console.print(Text(curve.name, style="bold"))
    plain = console.options.ascii_only
    for line in _chart(curve.values, horizon, min(WIDTH, console.width), colour, plain):
        line.rstrip()
        console.print(line, no_wrap=True, overflow="crop", crop=True)
    found = events(curve.values)
    listed = found if len(found) <= MOST_EVENTS else {}
    console.print(_table(curve.values, horizon, listed))
    if len(found) > MOST_EVENTS:
        _line(console, f"  It changes course at {len(found)} steps, which are not listed.", "dim")


def _chart(
    values: Sequence[float], horizon: Horizon, width: int, colour: str, plain: bool
) -> Iterator[Text]:
    """The lines of the chart with its axes, at most `width` characters each."""
    low, high = min(values), max(values)
    labels = (
        {0: _short(high), HEIGHT - 1: _short(low)} if high > low else {HEIGHT // 2: _short(low)}
    )
    gutter = max(map(len, labels.values()))
    columns = max(width - gutter - 2, 10)
    total = len(values)
    starts = {first * columns // total: name for name, (first, _) in horizon.phases.items()}
    margin = " " * (gutter + 2)
    if starts:
        yield Text(margin + _names(starts, columns), style="dim")
    border, tick, bar, corner, dash, down = "|+|+-+" if plain else "┊┤│└─┴"
    for row, cells in enumerate(chart_rows(values, columns, plain=plain)):
        label = labels.get(row, "")
        start = f"{label:>{gutter}} {tick if label else bar}"
        line = Text(start).append(cells, style=colour)
        for column in starts.keys() - {0}:
            if cells[column] == " ":
                place = len(start) + column
                line = Text.assemble(line[:place], (border, "dim"), line[place + 1 :])
        yield line
    axis = [dash] * columns
    for column in starts.keys() - {0}:
        axis[column] = down
    yield Text(f"{'':{gutter}} {corner}{''.join(axis)}")
    yield Text(margin + _scale(total, horizon, columns))


def _names(starts: Mapping[int, str], columns: int) -> str:
    """Each phase's name from where it starts, cut off where the next one starts."""
    places = sorted(starts)
    ends = [*places[1:], columns]
    row = ""
    for place, end in zip(places, ends, strict=True):
        room = end - place - (end < columns)
        row = row.ljust(place) + starts[place][:room]
    return row


def _scale(total: int, horizon: Horizon, columns: int) -> str:
    """Start, middle (given room) and end of the training, in epochs where these are known."""
    unit, name = _unit(horizon)
    middle, end = (_short(round(total * share / unit, 2)) for share in (0.5, 1.0))
    end = f"{end} {name}{'s' * (end != '1')}"
    left = "0".ljust(max(columns // 2 - len(middle) // 2, 2)) + middle
    if len(left) + len(end) >= columns:
        left = "0"
    return left + end.rjust(columns - len(left))


def _unit(horizon: Horizon) -> tuple[int, str]:
    """Optimizer steps in what the axes count, and its name."""
    return (1, "step") if horizon.epoch_steps is None else (horizon.epoch_steps[0], "epoch")


def _table(values: Sequence[float], horizon: Horizon, found: Mapping[int, str]) -> Table:
    """The value at a few moments and at the events `found`."""
    last = len(values) - 1
    said: dict[int, list[str]] = {0: ["first step"]}
    for share in (25, 50, 75):
        said.setdefault(min(horizon.steps(f"{share}%"), last), []).append(f"{share}%")
    said.setdefault(last, []).append("last step")
    for step, text in found.items():
        said.setdefault(step, []).append(text)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("step", justify="right", no_wrap=True)
    if horizon.epoch_steps is not None:
        table.add_column("epoch", justify="right", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("")
    for step in sorted(said):
        epoch = [] if horizon.epoch_steps is None else [f"{round(horizon.epoch(step), 2):g}"]
        table.add_row(str(step), *epoch, _short(values[step]), "; ".join(said[step]))
    return table


def _picture(curves: Sequence[Curve], horizon: Horizon) -> bytes:
    """All schedules over one axis, with the borders of the phases."""
    from lightning_aux.report.figures import DASHES, LIGHT, WIDE, canvas, png

    total, (unit, unit_name) = len(curves[0].values), _unit(horizon)
    names = [textwrap.fill(curve.name, 90) for curve in curves]
    figure, axes = canvas(WIDE, 4.2 + 0.22 * "\n".join([*names, ""]).count("\n"), LIGHT)
    for index, curve in enumerate(curves):
        rounds, place = divmod(index, len(LIGHT.series))
        steps = _shown(curve.values)
        axes.plot(
            [step / unit for step in (*steps, total)],
            [curve.values[step] for step in (*steps, steps[-1])],
            DASHES[rounds % len(DASHES)],
            color=LIGHT.series[place],
            linewidth=2.2,
            drawstyle="steps-post",
            label=names[index],
        )
    low = min(min(curve.values) for curve in curves)
    high = max(max(curve.values) for curve in curves)
    if low == high:  # the line in the middle, and 0 in sight
        axes.set_ylim(low - (abs(low) or 1), low + (abs(low) or 1))
    for name, (first, last) in horizon.phases.items():
        for border in {first, last} - {0, total}:
            axes.axvline(border / unit, color=LIGHT.reference, linewidth=0.8, zorder=1)
        axes.annotate(
            name,
            ((first + last) / 2 / unit, 1.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color=LIGHT.reference,
            fontsize=9.5,
        )
    axes.set_xlim(0, total / unit)
    axes.set_xlabel("optimizer step" if unit_name == "step" else unit_name)
    axes.grid(axis="y", color=LIGHT.faint, linewidth=0.8)
    figure.legend(
        loc="outside upper left", frameon=False, labelcolor=LIGHT.text, fontsize=10.5, ncols=1
    )
    return png(figure)


def _shown(values: Sequence[float]) -> list[int]:
    """Steps that draw the same line as all of them: of each part its ends and its extremes."""
    shown: set[int] = set()
    for first, last in _parts(len(values), _POINTS):
        part = range(first, last)
        lowest = min(part, key=values.__getitem__)
        highest = max(part, key=values.__getitem__)
        shown |= {first, lowest, highest, last - 1}
    return sorted(shown)


def _parts(total: int, count: int) -> Iterator[tuple[int, int]]:
    """`count` ranges that together hold every step, and each at least one."""
    for index in range(count):
        first = index * total // count
        yield first, max((index + 1) * total // count, first + 1)


def _times(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _short(number: float) -> str:
    return f"{number:.6g}"


def _line(console: Console, text: str, style: str = "") -> None:
    """One line that a narrow terminal does not break, so that it can be copied and searched."""
    console.print(Text(text, style=style), soft_wrap=True)
