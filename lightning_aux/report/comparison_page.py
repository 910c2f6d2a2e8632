"""The report of a comparison: one HTML file that needs no other file and no network."""

from __future__ import annotations

import base64
import os
import platform
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import lightning
import torch
import yaml
from matplotlib.figure import Figure

from lightning_aux.comparison import Comparison, RunResult, VariantSummary
from lightning_aux.report.figures import DARK, LIGHT, NARROW, WIDE, Theme, svg
from lightning_aux.report.units import Unit
from lightning_aux.report.wording import cells

_STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --text: #1c2128; --faint: #d5d9e0;
  --soft: #57606a; --good: #0a6b45; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --card: #161b22; --text: #e6e9ef;
  --faint: #363d48; --soft: #a4adba; --good: #4fd6a5; --bad: #ff8e85; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 0 0 .75rem; }
p { margin: .5rem 0; max-width: 44rem; }
section { background: var(--card); border: 1px solid var(--faint); border-radius: 10px;
  padding: 1.25rem; margin-top: 1.25rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
figure { margin: 0; } figcaption { margin-top: .6rem; max-width: 44rem; }
img { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .75rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--faint); }
th { font-size: .85rem; color: var(--soft); font-weight: 600; vertical-align: bottom; }
thead th { white-space: normal; }
tbody tr:last-child > * { border-bottom: 0; }
th:first-child, td:nth-child(4), th:nth-child(4) { text-align: left; }
th:first-child { padding-left: 0; } td:last-child, th:last-child { padding-right: 0; }
tbody th { font-size: 1rem; color: var(--text); }
.better { color: var(--good); font-weight: 600; } .worse { color: var(--bad); font-weight: 600; }
.failed { color: var(--bad); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
pre { margin: 0; overflow-x: auto; font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; }
details { margin-top: 1rem; } summary { cursor: pointer; }
@media (max-width: 40rem) {
  main { padding: 1.25rem .6rem 3rem; } section { padding: .9rem; } h1 { font-size: 1.45rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  thead { display: none; } table, tbody { display: block; }
  tbody tr { display: grid; grid-template-columns: 1fr auto; padding: .6rem 0;
    border-bottom: 1px solid var(--faint); }
  tbody tr:last-child { border-bottom: 0; }
  tbody th { grid-column: 1 / -1; padding: 0 0 .15rem; text-align: left; border: 0; }
  tbody td, tbody td:nth-child(4) { display: contents; white-space: normal; text-align: left; }
  tbody td > span { text-align: right; }
  tbody td::before { content: attr(data-label); color: var(--soft); font-size: .9rem;
    padding-right: .75rem; }
}
"""

Draw = Callable[[Theme, float], Figure | None]


def write_report(
    path: Path,
    comparison: Comparison,
    results: Sequence[RunResult],
    summaries: Sequence[VariantSummary],
    curves: Draw,
    differences: Draw,
) -> None:
    """Write the report.

    Args:
        path: The HTML file.
        comparison: What was compared.
        results: All runs.
        summaries: One per variant.
        curves: Draws the learning curves in a theme.
        differences: Draws the paired differences in a theme.
    """
    unit = Unit(comparison.decides.unit)
    n = len(comparison.seeds)
    seeds = f"{n} seeds" if n > 1 else "one seed"
    parts = [
        f"<h1>{escape(comparison.title)}</h1>",
        f"<p>{escape(comparison.description)}</p>" if comparison.description else "",
        "".join(f"<p>{escape(line)}</p>" for line in _findings(comparison, summaries)),
        _picture(
            "Differences",
            differences,
            f"Each dot is one seed: {unit.difference_label(comparison.decides.metric)} to "
            f"{comparison.reference}, which had the same data, initialisation and batches. "
            "The line is their mean, the bar its 95 % interval.",
        ),
        _table(comparison, summaries),
        _picture(
            "Learning curves",
            curves,
            f"{comparison.curve} after each epoch: mean of {seeds}, band from the lowest to the "
            "highest seed.",
        ),
        _failures(summaries),
        _settings(comparison, results),
    ]
    path.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(comparison.title)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n",
        encoding="utf-8",
    )


def _findings(comparison: Comparison, summaries: Sequence[VariantSummary]) -> list[str]:
    """What the intervals show, in a sentence per kind of verdict."""
    unit = Unit(comparison.decides.unit)
    reference = next(row for row in summaries if row.name == comparison.reference)
    suffix = f" {unit.text}" if unit.text else ""
    lines = [
        f"{reference.name} has {comparison.decides.metric} {unit.number(reference.mean)} ± "
        f"{unit.number(reference.sd)}{suffix} (mean ± sd over {len(reference.values)} seeds)."
    ]
    for kind in ("better", "worse", "no difference shown"):
        rows = [row for row in summaries if row.verdict == kind]
        if rows:
            said = ", ".join(f"{row.name} ({cells(row, comparison)[2]})" for row in rows)
            lines.append(f"{kind[0].upper()}{kind[1:]}: {said}.")
    return lines


def _table(comparison: Comparison, summaries: Sequence[VariantSummary]) -> str:
    metric = Unit(comparison.decides.unit).label(comparison.decides.metric)
    others = [Unit(measure.unit).label(measure.metric) for measure in comparison.also]
    heads = ["variant", metric, "difference", "verdict", "time per step", "peak memory", *others]
    rows = []
    for row in summaries:
        name, *texts = cells(row, comparison)
        css = "failed" if row.errors else row.verdict if row.verdict in ("better", "worse") else ""
        columns = "".join(
            f'<td data-label="{escape(head)}"><span class="{css if head == "verdict" else ""}">'
            f"{escape(text)}</span></td>"
            for head, text in zip(heads[1:], texts, strict=True)
        )
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{columns}</tr>')
    header = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    return (
        '<section><h2>Results</h2><div class="wide"><table>'
        f"<thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="soft">Mean ± standard deviation over seeds, difference with its 95 % interval. '
        "Intervals are Student’s t over the per-seed differences, not corrected for the number of "
        "variants. Better, worse and a star beside another metric mean that the p value of the "
        "paired t test is below 0.05 after Holm’s correction for it. Time per step is the median "
        "over batches, relative to the reference; loading the data is not in it.</p></section>"
    )


def _picture(heading: str, draw: Draw, caption: str) -> str:
    """The picture in four versions, of which the browser takes the one that fits."""
    phone, dark = "(max-width: 40rem)", "(prefers-color-scheme: dark)"
    light = draw(LIGHT, WIDE)
    if light is None:
        return ""
    versions = {
        f"{phone} and {dark}": draw(DARK, NARROW),
        phone: draw(LIGHT, NARROW),
        dark: draw(DARK, WIDE),
    }
    sources = "".join(
        f'<source media="{media}" srcset="{_data_uri(figure)}">'
        for media, figure in versions.items()
        if figure is not None
    )
    return (
        f"<section><h2>{heading}</h2><figure><picture>{sources}"
        f'<img alt="{escape(caption)}" src="{_data_uri(light)}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure></section>"
    )


def _data_uri(figure: Figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg(figure)).decode()


def _failures(summaries: Sequence[VariantSummary]) -> str:
    failed = [
        f"<dt>{escape(row.name)}, seed {seed}</dt><dd>{escape(error)}</dd>"
        for row in summaries
        for seed, error in row.errors.items()
    ]
    return f"<section><h2>Failed runs</h2><dl>{''.join(failed)}</dl></section>" if failed else ""


def _settings(comparison: Comparison, results: Sequence[RunResult]) -> str:
    base = comparison.variants[comparison.reference].config
    seconds = sum(run.seconds for run in results)
    overrides = [f"{key} = {value}" for key, value in comparison.overrides.items()]
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    facts = {
        "seeds": ", ".join(map(str, comparison.seeds)),
        "metric": f"{comparison.decides.metric} ({comparison.decides.mode})",
        "also": ", ".join(f"{each.metric} ({each.mode})" for each in comparison.also) or "nothing",
        "set for all": ", ".join(overrides) or "nothing",
        "training time": f"{seconds / 60:.1f} min for {len(results)} runs, one after the other",
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, torch on {cores}",
    }
    entries = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    variants = {name: variant.changes for name, variant in comparison.variants.items()}
    return (
        f"<section><h2>Settings</h2><dl>{entries}</dl>"
        f"<details open><summary>what each variant adds</summary>"
        f"<pre>{escape(_yaml(variants))}</pre></details>"
        f"<details><summary>config of {escape(comparison.reference)}</summary>"
        f"<pre>{escape(_yaml(base))}</pre></details></section>"
    )


def _yaml(value: object) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True)).strip()
