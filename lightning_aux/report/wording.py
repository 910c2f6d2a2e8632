"""How a summary is put into words and numbers, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_aux.comparison import Comparison, RunResult, VariantSummary
from lightning_aux.report.units import MISSING, Unit, size


def cells(row: VariantSummary, comparison: Comparison) -> list[str]:
    """The texts of one row: name, value, difference, verdict, time, memory, each other metric.

    Time per step and peak memory are relative to the reference, which has its own. The other
    metrics are short: the mean and in brackets the difference, with a star where its corrected p
    value is below 0.05.
    """
    value, difference = value_and_difference(row)
    said = row.verdict or ("reference" if row.name == comparison.reference else MISSING)
    if row.errors:
        failed = f"failed: {len(row.errors)} of {len(row.errors) + len(row.values)} seeds"
        said = f"{said}; {failed}" if row.values else failed
    time, memory = (_ratio(row.step_ratio), _ratio(row.peak_ratio))
    if row.name == comparison.reference:
        time = f"{1000 * row.step_seconds:.2f} ms" if row.step_seconds else MISSING
        memory = size(row.peak_bytes) if row.peak_bytes else MISSING
    return [row.name, value, difference, said, time, memory, *map(_short, row.also)]


def remarks(results: Iterable[RunResult]) -> list[str]:
    """What must be known about the runs to read their times and their memory."""
    finished = [result for result in results if not result.error]
    said = []
    if not all(result.alone for result in finished):
        said.append("Some runs went on side by side: times per step are rough.")
    devices = sorted({result.device for result in finished if result.device})
    if len(devices) > 1:
        said.append(
            f"Runs were on different devices ({', '.join(devices)}): neither times per step nor "
            "memory can be compared."
        )
    return said


def _ratio(ratio: float | None) -> str:
    return f"× {ratio:.2f}" if ratio else MISSING


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
