"""From the runs of a comparison to one summary per variant, and both as CSV files."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning_aux.comparison.comparison import Comparison, Measure
from lightning_aux.comparison.results import RunResult
from lightning_aux.comparison.statistics import (
    PairedDifference,
    Verdict,
    paired_difference,
    spread,
    verdict,
)


@dataclass(frozen=True)
class VariantSummary:
    """What all seeds of one variant show. Metrics are raw, times in seconds.

    Attributes:
        name: Name of the variant.
        measure: The metric that this is about: the one that decides, except in `also`.
        values: The metric by seed, of the runs that finished with a finite value.
        mean: Mean over seeds, NaN when no run finished.
        sd: Sample standard deviation over seeds, NaN below two.
        differences: Difference to the reference by seed; empty for the reference itself.
        paired: Their mean and interval; None without a common seed.
        verdict: What the interval says; None as above.
        step_seconds: Median over seeds of the time per training step.
        step_ratio: Median over seeds of the ratio of that time to the reference's.
        errors: Error by seed, of the runs that failed.
        also: The same of each of the comparison's other metrics.
    """

    name: str
    measure: Measure
    values: dict[int, float]
    mean: float
    sd: float
    differences: dict[int, float]
    paired: PairedDifference | None
    verdict: Verdict | None
    step_seconds: float | None
    step_ratio: float | None
    errors: dict[int, str]
    also: tuple[VariantSummary, ...] = ()


def summarise(comparison: Comparison, results: Iterable[RunResult]) -> list[VariantSummary]:
    """One summary per variant, in the order of the compare file."""
    by_variant: dict[str, dict[int, RunResult]] = {name: {} for name in comparison.variants}
    for result in results:
        by_variant[result.variant][result.seed] = result
    reference = by_variant[comparison.reference]
    summaries = []
    for name, runs in by_variant.items():
        against = reference if name != comparison.reference else {}
        also = tuple(_summarise(measure, name, runs, against) for measure in comparison.also)
        summaries.append(_summarise(comparison.decides, name, runs, against, also))
    return summaries


def _summarise(
    measure: Measure,
    name: str,
    runs: Mapping[int, RunResult],
    reference: Mapping[int, RunResult],
    also: tuple[VariantSummary, ...] = (),
) -> VariantSummary:
    values = _values(runs, measure.metric)
    errors = {seed: _error(run, measure.metric) for seed, run in runs.items() if seed not in values}
    against = _values(reference, measure.metric)
    common = [seed for seed in values if seed in against]
    paired = None
    if common:
        paired = paired_difference([values[s] for s in common], [against[s] for s in common])
    times = {seed: run.step_seconds for seed, run in runs.items() if run.step_seconds}
    ratios = [
        seconds / base
        for seed, seconds in times.items()
        if seed in reference and (base := reference[seed].step_seconds)
    ]
    return VariantSummary(
        name=name,
        measure=measure,
        values=values,
        mean=statistics.fmean(values.values()) if values else math.nan,
        sd=spread(list(values.values())),
        differences={seed: values[seed] - against[seed] for seed in common},
        paired=paired,
        verdict=verdict(paired, measure.mode) if paired else None,
        step_seconds=statistics.median(times.values()) if times else None,
        step_ratio=statistics.median(ratios) if ratios else None,
        errors=errors,
        also=also,
    )


def _values(runs: Mapping[int, RunResult], metric: str) -> dict[int, float]:
    finished = {seed: run.metrics.get(metric) for seed, run in runs.items() if not run.error}
    return {s: value for s, value in finished.items() if value is not None and math.isfinite(value)}


def _error(run: RunResult, metric: str) -> str:
    return run.error or f"{metric} is {run.metrics.get(metric, 'missing')}"


def write_tables(
    directory: Path,
    comparison: Comparison,
    results: Iterable[RunResult],
    summaries: Iterable[VariantSummary],
) -> None:
    """Write `results.csv`, `summary.csv` and `curves.csv`; metrics raw, times in milliseconds.

    `results.csv` has a row per variant and seed, `summary.csv` one per variant and metric that is
    compared, `curves.csv` one per variant, seed, epoch and metric.
    """
    results = list(results)
    metrics = [measure.metric for measure in comparison.measures]
    _write(
        directory / "results.csv",
        ["variant", "seed", *metrics, "ms_per_step", "seconds", "error"],
        (
            [
                *(run.variant, run.seed, *map(run.metrics.get, metrics)),
                *(_milliseconds(run.step_seconds), round(run.seconds, 2), run.error),
            ]
            for run in results
        ),
    )
    _write(
        directory / "summary.csv",
        [
            *("variant", "metric", "seeds", "mean", "sd"),
            *("difference", "low95", "high95", "verdict"),
            *("ms_per_step", "step_time_ratio", "failed"),
        ],
        (
            [
                *(row.name, row.measure.metric, len(row.values), row.mean, row.sd),
                *((row.paired.mean, row.paired.low, row.paired.high) if row.paired else 3 * [None]),
                *(row.verdict, _milliseconds(row.step_seconds), row.step_ratio, len(row.errors)),
            ]
            for summary in summaries
            for row in (summary, *summary.also)
        ),
    )
    _write(
        directory / "curves.csv",
        ["variant", "seed", "epoch", "metric", "value"],
        (
            [run.variant, run.seed, int(entry["epoch"]), metric, value]
            for run in results
            for entry in run.history
            for metric, value in entry.items()
            if metric != "epoch"
        ),
    )


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 4)


def _write(path: Path, header: list[str], rows: Iterable[Iterable[object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([_plain(value) for value in row] for row in rows)


def _plain(value: object) -> object:
    """Seven digits, what a float32 metric has; more would only show its rounding."""
    return f"{value:.7g}" if isinstance(value, float) else value
