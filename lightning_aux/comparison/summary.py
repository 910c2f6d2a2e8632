"""From the runs of a comparison to one summary per variant, and both as CSV files."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Literal

from lightning_aux.comparison.comparison import Comparison, Measure
from lightning_aux.comparison.results import RunResult
from lightning_aux.comparison.statistics import (
    PairedDifference,
    Verdict,
    holm,
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
        verdict: What the p value says, corrected for the number of variants; None as above.
        step_seconds: Median over seeds of the time per training step.
        step_ratio: Median over seeds of the ratio of that time to the reference's.
        peak_bytes: Median over seeds of the peak memory of training.
        peak_ratio: Median over seeds of the ratio of that memory to the reference's.
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
    peak_bytes: float | None
    peak_ratio: float | None
    errors: dict[int, str]
    also: tuple[VariantSummary, ...] = ()


def summarise(comparison: Comparison, results: Iterable[RunResult]) -> list[VariantSummary]:
    """One summary per variant, in the order of the compare file."""
    by_variant: dict[str, dict[int, RunResult]] = {name: {} for name in comparison.variants}
    for result in results:
        by_variant[result.variant][result.seed] = result
    reference = by_variant[comparison.reference]
    by_measure = [
        _corrected(
            [
                _summarise(measure, name, runs, reference if name != comparison.reference else {})
                for name, runs in by_variant.items()
            ]
        )
        for measure in comparison.measures
    ]
    return [replace(row, also=tuple(also)) for row, *also in zip(*by_measure, strict=True)]


def _corrected(rows: list[VariantSummary]) -> list[VariantSummary]:
    """The same of all variants, with p values corrected for their number, and the verdicts."""
    adjusted = iter(holm([row.paired.p for row in rows if row.paired]))
    corrected = []
    for row in rows:
        if row.paired:
            paired = replace(row.paired, p_adjusted=next(adjusted))
            row = replace(row, paired=paired, verdict=verdict(paired, row.measure.mode))
        corrected.append(row)
    return corrected


def _summarise(
    measure: Measure,
    name: str,
    runs: Mapping[int, RunResult],
    reference: Mapping[int, RunResult],
) -> VariantSummary:
    values = _values(runs, measure.metric)
    errors = {seed: _error(run, measure.metric) for seed, run in runs.items() if seed not in values}
    against = _values(reference, measure.metric)
    common = [seed for seed in values if seed in against]
    paired = None
    if common:
        paired = paired_difference([values[s] for s in common], [against[s] for s in common])
    step_seconds, step_ratio = _cost("step_seconds", runs, reference)
    peak_bytes, peak_ratio = _cost("peak_bytes", runs, reference)
    return VariantSummary(
        name=name,
        measure=measure,
        values=values,
        mean=statistics.fmean(values.values()) if values else math.nan,
        sd=spread(list(values.values())),
        differences={seed: values[seed] - against[seed] for seed in common},
        paired=paired,
        verdict=None,
        step_seconds=step_seconds,
        step_ratio=step_ratio,
        peak_bytes=peak_bytes,
        peak_ratio=peak_ratio,
        errors=errors,
    )


def _cost(
    name: Literal["step_seconds", "peak_bytes"],
    runs: Mapping[int, RunResult],
    reference: Mapping[int, RunResult],
) -> tuple[float | None, float | None]:
    """Median over seeds, and median over seeds of the ratio to the reference's."""
    costs: dict[int, float] = {seed: cost for seed, r in runs.items() if (cost := getattr(r, name))}
    ratios = [
        cost / base
        for seed, cost in costs.items()
        if seed in reference and (base := getattr(reference[seed], name))
    ]
    return (
        statistics.median(costs.values()) if costs else None,
        statistics.median(ratios) if ratios else None,
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
        [
            *("variant", "seed", *metrics, "ms_per_step", "seconds", "error"),
            *("peak_bytes", "device", "alone"),
        ],
        (
            [
                *(run.variant, run.seed, *map(run.metrics.get, metrics)),
                *(_milliseconds(run.step_seconds), round(run.seconds, 2), run.error),
                *(run.peak_bytes, run.device, run.alone),
            ]
            for run in results
        ),
    )
    _write(
        directory / "summary.csv",
        [
            *("variant", "metric", "seeds", "mean", "sd"),
            *("difference", "low95", "high95", "bootstrap_low95", "bootstrap_high95"),
            *("p", "p_holm", "verdict"),
            *("ms_per_step", "step_time_ratio", "peak_bytes", "peak_ratio", "failed"),
        ],
        (
            [
                *(row.name, row.measure.metric, len(row.values), row.mean, row.sd),
                *(astuple(row.paired) if row.paired else [None] * len(fields(PairedDifference))),
                *(row.verdict, _milliseconds(row.step_seconds), row.step_ratio),
                *(None if row.peak_bytes is None else round(row.peak_bytes), row.peak_ratio),
                len(row.errors),
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
