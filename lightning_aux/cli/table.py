"""The table that a comparison ends with on the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lightning_aux.cli.specification import Comparison
from lightning_aux.cli.summary import VariantSummary
from lightning_aux.cli.units import MISSING, Unit

_COLOURS = {"better": "green", "worse": "red"}


def result_table(comparison: Comparison, summaries: Iterable[VariantSummary]) -> Table:
    """A row per variant: mean and spread, paired difference, verdict, relative time per step.

    The other metrics follow, with the mean and the difference of each in a column.
    """
    decides = Unit(comparison.decides.unit)
    table = Table(title=comparison.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("variant", no_wrap=True)
    label = decides.label(comparison.decides.metric)
    table.add_column(f"{label}\nmean ± sd", justify="right", no_wrap=True)
    table.add_column("difference\n[95 % interval]", justify="right", no_wrap=True)
    table.add_column("verdict", min_width=10)
    table.add_column("time\nper step", justify="right", no_wrap=True)
    for measure in comparison.also:
        table.add_column(Unit(measure.unit).label(measure.metric), justify="right")
    if comparison.also:
        table.caption = "* the 95 % interval of this difference leaves out zero"
        table.caption_justify = "left"
    for row in summaries:
        colour = _COLOURS.get(str(row.verdict), "")
        table.add_row(*cells(row, comparison), style=colour)
    return table


def cells(row: VariantSummary, comparison: Comparison) -> list[str]:
    """The texts of one row: name, value, difference, verdict, time, and each other metric.

    The last are short: the mean and in brackets the difference, with a star where its interval
    leaves out zero.
    """
    value, difference = value_and_difference(row)
    said = row.verdict or ("reference" if row.name == comparison.reference else MISSING)
    if row.errors:
        failed = f"failed: {len(row.errors)} of {len(row.errors) + len(row.values)} seeds"
        said = f"{said}; {failed}" if row.values else failed
    ratio = f"× {row.step_ratio:.2f}" if row.step_ratio else ""
    if row.name == comparison.reference and row.step_seconds:
        ratio = f"{1000 * row.step_seconds:.2f} ms"
    return [row.name, value, difference, said, ratio or MISSING, *map(_short, row.also)]


def _short(row: VariantSummary) -> str:
    unit = Unit(row.measure.unit)
    if row.paired is None:
        return unit.number(row.mean)
    star = "*" if row.verdict in ("better", "worse") else ""
    return f"{unit.number(row.mean)} ({unit.signed(row.paired.mean)}{star})"


def value_and_difference(row: VariantSummary) -> tuple[str, str]:
    """The mean with its spread, and the paired difference with its interval."""
    unit = Unit(row.measure.unit)
    value = f"{unit.number(row.mean)} ± {unit.number(row.sd)}" if row.values else MISSING
    if row.paired is None:
        return value, MISSING
    low, high = unit.signed(row.paired.low), unit.signed(row.paired.high)
    return value, f"{unit.signed(row.paired.mean)} [{low}, {high}]"
