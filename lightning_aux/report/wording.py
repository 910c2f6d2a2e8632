"""How a summary is put into words and numbers, for the terminal and for the page."""

from __future__ import annotations

from lightning_aux.comparison import Comparison, VariantSummary
from lightning_aux.report.units import MISSING, Unit


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
