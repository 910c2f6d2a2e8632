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
    """A row per variant: mean and spread, paired difference, verdict, relative time per step."""
    unit = Unit(comparison.unit)
    table = Table(title=comparison.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("variant", no_wrap=True)
    table.add_column(f"{unit.label(comparison.metric)}\nmean ± sd", justify="right", no_wrap=True)
    table.add_column("difference\n[95 % interval]", justify="right", no_wrap=True)
    table.add_column("verdict", min_width=10)
    table.add_column("time\nper step", justify="right", no_wrap=True)
    for row in summaries:
        colour = _COLOURS.get(str(row.verdict), "")
        table.add_row(*cells(row, comparison), style=colour)
    return table


def cells(row: VariantSummary, comparison: Comparison) -> list[str]:
    """The texts of one row: name, value, difference, verdict, time."""
    unit = Unit(comparison.unit)
    value = f"{unit.number(row.mean)} ± {unit.number(row.sd)}" if row.values else MISSING
    difference = MISSING
    if row.paired is not None:
        low, high = unit.signed(row.paired.low), unit.signed(row.paired.high)
        difference = f"{unit.signed(row.paired.mean)} [{low}, {high}]"
    said = row.verdict or ("reference" if row.name == comparison.reference else MISSING)
    if row.errors:
        failed = f"failed: {len(row.errors)} of {len(row.errors) + len(row.values)} seeds"
        said = f"{said}; {failed}" if row.values else failed
    ratio = f"× {row.step_ratio:.2f}" if row.step_ratio else ""
    if row.name == comparison.reference and row.step_seconds:
        ratio = f"{1000 * row.step_seconds:.2f} ms"
    return [row.name, value, difference, said, ratio or MISSING]
