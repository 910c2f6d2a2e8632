"""The report of a comparison, made of what its folder holds."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

import lightning
import torch
import yaml
from matplotlib.figure import Figure

from lightning_aux.comparison import (
    ERROR_FILE,
    RESULT_FILE,
    Comparison,
    RunResult,
    VariantSummary,
    read_comparison_of,
    read_result,
    run_directory,
    summarise,
)
from lightning_aux.report.charts import Chart, Group, charts_of_comparison
from lightning_aux.report.drawing import PAGE, inline
from lightning_aux.report.figures import NARROW, WIDE, draw_curves, draw_differences
from lightning_aux.report.logs import Log, read_log
from lightning_aux.report.page import Page, details, facts, table
from lightning_aux.report.units import MISSING, Unit
from lightning_aux.report.wording import cells, remarks

_Draw = Callable[[float], Figure | None]


def comparison_page(folder: Path) -> str:
    """The page of the comparison in a folder, finished or not.

    Raises:
        OSError: When the folder has no `comparison.json`.
        ValueError: When it cannot be read.
    """
    comparison = read_comparison_of(folder)
    places = [(name, seed) for name in comparison.variants for seed in comparison.seeds]
    found = {place: _result(folder, comparison, *place) for place in places}
    results = [result for result in found.values() if isinstance(result, RunResult)]
    logs = {
        name: {
            seed: read_log(run_directory(folder, name, seed))
            for seed in comparison.seeds
            if not _left_out(folder, name, seed, found[name, seed])
        }
        for name in comparison.variants
    }
    summaries = summarise(comparison, results)
    names = list(comparison.variants)
    page = Page(comparison.title, names, names.index(comparison.reference))
    page.text([comparison.description, *_findings(comparison, summaries)])
    page.problems(_problems(comparison, found, logs))
    page.section("Failed runs", _failures(folder, results))
    unit = Unit(comparison.decides.unit)
    page.section("Results", _table(comparison, summaries, results))
    page.chips()
    page.section(
        "Differences",
        _picture(
            lambda width: draw_differences(comparison, summaries, PAGE, width),
            "differences",
            f"Each dot is one seed: {unit.difference_label(comparison.decides.metric)} to "
            f"{comparison.reference}, which had the same data, initialisation and batches. "
            "The line is their mean, the bar its 95 % interval.",
        ),
    )
    drawn = {name: _drawn(runs, name, found) for name, runs in logs.items()}
    groups = charts_of_comparison(drawn, [measure.metric for measure in comparison.measures])
    curve = _picture(
        lambda width: draw_curves(comparison, results, PAGE, width),
        "learning curves",
        f"{comparison.curve} after each epoch: mean of the seeds that finished, band from the "
        "lowest to the highest.",
    )
    if curve:
        page.section(str(comparison.curve), curve)
    page.groups(_without(groups, comparison.curve if curve else None))
    page.section("Settings", _settings(comparison, results))
    return page.html()


def _result(folder: Path, comparison: Comparison, name: str, seed: int) -> RunResult | str:
    """What a run left, or why there is nothing that may be compared."""
    directory = run_directory(folder, name, seed)
    file = (directory / RESULT_FILE).relative_to(folder)
    if not (directory / RESULT_FILE).is_file():
        begun = "begun and not finished" if directory.is_dir() else "not begun"
        return f"{begun}, there is no {file}."
    result = read_result(directory)
    if result is None:
        return f"{file} cannot be read."
    if (result.variant, result.seed) != (name, seed):
        return f"{file} is that of {result.variant}, seed {result.seed}; left out."
    if result.fingerprint != comparison.variants[name].fingerprint(seed):
        return f"{file} is that of another configuration than {name} has now; left out."
    return result


def _left_out(folder: Path, name: str, seed: int, found: RunResult | str) -> bool:
    """Whether there is a result that is not of this run, and so a log that is not either."""
    return isinstance(found, str) and (run_directory(folder, name, seed) / RESULT_FILE).is_file()


def _drawn(
    runs: Mapping[int, Log], name: str, found: Mapping[tuple[str, int], RunResult | str]
) -> dict[int, Log]:
    """The logs of the finished runs, which one that stopped would cut short; else all."""
    finished = {
        seed
        for seed in runs
        if isinstance(result := found[name, seed], RunResult) and not result.error
    }
    return {seed: log for seed, log in runs.items() if seed in finished or not finished}


def _failures(folder: Path, results: Sequence[RunResult]) -> str:
    """The error of each failed run, and the traceback that it left."""
    shown = []
    for run in results:
        if run.error:
            shown.append(facts([(f"{run.variant}, seed {run.seed}", run.error)]))
            path = run_directory(folder, run.variant, run.seed) / ERROR_FILE
            if path.is_file():
                text = path.read_text(encoding="utf-8", errors="replace").strip()
                shown.append(details(str(path.relative_to(folder)), text))
    return "".join(shown)


def _lack(result: RunResult, metric: str) -> str:
    return f"is {result.metrics[metric]}." if metric in result.metrics else "was not logged."


def _findings(comparison: Comparison, summaries: Sequence[VariantSummary]) -> list[str]:
    """What the intervals show, in a sentence per kind of verdict."""
    unit = Unit(comparison.decides.unit)
    reference = next(row for row in summaries if row.name == comparison.reference)
    suffix = f" {unit.text}" if unit.text else ""
    lines = [f"No run of {reference.name} has finished."]
    if reference.values:
        seeds = "one seed" if len(reference.values) == 1 else f"{len(reference.values)} seeds"
        spread = f" ± {unit.number(reference.sd)}" if len(reference.values) > 1 else ""
        kind = "mean ± sd over " if spread else ""
        lines = [
            f"{reference.name} has {comparison.decides.metric} {unit.number(reference.mean)}"
            f"{spread}{suffix} ({kind}{seeds})."
        ]
    for verdict in ("better", "worse", "no difference shown", "one seed, no interval"):
        rows = [row for row in summaries if row.verdict == verdict]
        if rows:
            said = ", ".join(f"{row.name} ({cells(row, comparison)[2]})" for row in rows)
            lines.append(f"{verdict[0].upper()}{verdict[1:]}: {said}.")
    return lines


def _problems(
    comparison: Comparison,
    found: Mapping[tuple[str, int], RunResult | str],
    logs: Mapping[str, Mapping[int, Log]],
) -> list[str]:
    lines = []
    if len(comparison.seeds) == 1:
        lines.append("There is one seed only: differences have no interval, and may be chance.")
    for (name, seed), result in found.items():
        if isinstance(result, str):
            lines.append(f"{name}, seed {seed}: {result}")
        elif result.error:
            lines.append(f"{name}, seed {seed} failed: {result.error}")
        else:
            lines += [
                f"{name}, seed {seed}: {measure.metric} {_lack(result, measure.metric)}"
                for measure in comparison.measures
                if not math.isfinite(result.metrics.get(measure.metric, math.nan))
            ]
    for name, runs in logs.items():
        for seed, log in runs.items():
            if log.series or isinstance(found[name, seed], RunResult):
                lines += [f"{name}, seed {seed}: {problem}" for problem in log.problems]
    logged = {key for runs in logs.values() for log in runs.values() for key in log.series}
    if logged and not any(key.startswith("val") for key in logged):
        lines.append("Nothing was logged in validation (no name that begins with val).")
    return lines


def _table(
    comparison: Comparison, summaries: Sequence[VariantSummary], results: Sequence[RunResult]
) -> str:
    unit = Unit(comparison.decides.unit)
    heads = [
        *("variant", unit.label(comparison.decides.metric), "difference [95 %]", "bootstrap 95 %"),
        *("p, corrected", "verdict", "time per step", "peak memory"),
    ]
    rows, others = [], []
    for row in summaries:
        name, value, difference, verdict, time, memory, *also = map(escape, cells(row, comparison))
        others.append([name, *also])
        css = "failed" if row.errors else row.verdict if row.verdict in ("better", "worse") else ""
        rows.append(
            [
                *(name, value, difference, escape(_bootstrap(row, unit)), _p_value(row)),
                *(f'<span class="{css}">{verdict}</span>', time, memory),
            ]
        )
    notes = [
        "Mean ± standard deviation over seeds; the paired difference with its 95 % interval of "
        "Student’s t, and that of the bootstrap, which with few seeds is too narrow. Better and "
        "worse: the p value of the paired t test is below 0.05 after Holm’s correction for the "
        "number of variants. Time per step (median over batches, loading apart) and peak memory "
        "are relative to the reference.",
        *remarks(results),
    ]
    said = "".join(f'<p class="soft">{escape(note)}</p>' for note in notes)
    # A cost that no run measured is no column; a statistic that there is not is worth a dash.
    costs = ("time per step", "peak memory")
    kept = [
        place
        for place, head in enumerate(heads)
        if head not in costs or any(row[place] != MISSING for row in rows)
    ]
    shown = table(
        [heads[place] for place in kept],
        [[row[place] for place in kept] for row in rows],
        left=("verdict",),
    )
    shown += said
    if comparison.also:
        measures = [Unit(measure.unit).label(measure.metric) for measure in comparison.also]
        shown += "<h2>Other metrics</h2>" + table(["variant", *measures], others)
        shown += (
            '<p class="soft">Mean, and in brackets the paired difference; a star where its p '
            "value, corrected in the same way, is below 0.05.</p>"
        )
    return shown


def _bootstrap(row: VariantSummary, unit: Unit) -> str:
    if row.paired is None or row.paired.boot_low != row.paired.boot_low:  # NaN for one seed
        return MISSING
    return f"[{unit.signed(row.paired.boot_low)}, {unit.signed(row.paired.boot_high)}]"


def _p_value(row: VariantSummary) -> str:
    if row.paired is None or row.paired.p_adjusted != row.paired.p_adjusted:
        return MISSING
    return "&lt; 0.001" if row.paired.p_adjusted < 0.001 else f"{row.paired.p_adjusted:.3f}"


def _picture(draw: _Draw, label: str, caption: str) -> str:
    """The picture for screens and for telephones."""
    wide, narrow = draw(WIDE), draw(NARROW)
    if wide is None or narrow is None:
        return ""
    return (
        f'<figure><div class="wide">{inline(wide, label)}</div>'
        f'<div class="narrow">{inline(narrow, label)}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _without(groups: Sequence[Group], title: str | None) -> list[Group]:
    """The groups without the chart that is drawn large."""

    def left(charts: Sequence[Chart]) -> tuple[Chart, ...]:
        return tuple(chart for chart in charts if chart.title != title)

    return [Group(group.title, left(group.charts)) for group in groups if left(group.charts)]


def _settings(comparison: Comparison, results: Sequence[RunResult]) -> str:
    seconds = sum(run.seconds for run in results)
    overrides = [f"{key} = {value}" for key, value in comparison.overrides.items()]
    devices = sorted({run.device for run in results if run.device})
    entries = {
        "seeds": ", ".join(map(str, comparison.seeds)),
        "metric": f"{comparison.decides.metric} ({comparison.decides.mode})",
        "also": ", ".join(f"{each.metric} ({each.mode})" for each in comparison.also) or "nothing",
        "set for all": ", ".join(overrides) or "nothing",
        "training time": f"{seconds / 60:.1f} min for {len(results)} runs",
        "device": ", ".join(devices) or MISSING,
        "page made with": f"torch {torch.__version__}, lightning {lightning.__version__}, Python "
        f"{platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores",
    }
    variants = {name: variant.changes for name, variant in comparison.variants.items()}
    base = comparison.variants[comparison.reference].config
    return (
        facts(entries.items())
        + details("what each variant adds", _yaml(variants), is_open=True)
        + details(f"config of {comparison.reference}", _yaml(base))
    )


def _yaml(value: object) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True)).strip()
