"""The table that a comparison ends with on the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lightning_aux.comparison import SIGNIFICANT, Comparison, VariantSummary
from lightning_aux.report.units import Unit
from lightning_aux.report.wording import cells

_COLOURS = {"better": "green", "worse": "red"}


def result_table(comparison: Comparison, summaries: Iterable[VariantSummary]) -> Table:
    """A row per variant: mean and spread, paired difference, verdict, relative cost.

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
    table.add_column("peak\nmemory", justify="right", no_wrap=True)
    for measure in comparison.also:
        table.add_column(Unit(measure.unit).label(measure.metric), justify="right")
    table.caption = (
        f"better, worse{' and *' if comparison.also else ''}: p < {SIGNIFICANT} in the paired t "
        "test, corrected for the number of variants (Holm); intervals are not corrected"
    )
    table.caption_justify = "left"
    for row in summaries:
        colour = _COLOURS.get(str(row.verdict), "")
        table.add_row(*cells(row, comparison), style=colour)
    return table
