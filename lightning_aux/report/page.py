"""One HTML document that needs no other file, no network and, but for its switches, no script."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape

from lightning_aux.report.charts import NOTES, Chart, Group
from lightning_aux.report.drawing import css_variables, draw, swatch

REPORT_FILE = "report.html"

_LIGHT, _DARK = css_variables()
_DARK = f"""color-scheme: dark; --back: #0d1117; --card: #161b22; --text: #e6e9ef; --faint: #363d48;
  --soft: #a4adba; --good: #4fd6a5; --bad: #ff8e85; --mark: #222936; {_DARK};"""
_STYLE = (
    f"""
:root {{ color-scheme: light; --back: #f6f7f9; --card: #fff; --text: #1c2128; --faint: #d5d9e0;
  --soft: #57606a; --good: #0a6b45; --bad: #b3261e; --mark: #eef1f6; {_LIGHT}; }}
@media (prefers-color-scheme: dark) {{ :root:not([data-theme="light"]) {{ {_DARK} }} }}
:root[data-theme="dark"] {{ {_DARK} }}
"""
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
header { display: flex; gap: 1rem; justify-content: space-between; align-items: start; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .5rem; }
h3 { font-size: .95rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
p { margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--faint); border-radius: 10px;
  padding: 1.25rem; margin-top: 1.25rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
figure { margin: 0; min-width: 0; position: relative; }
figcaption { margin-top: .6rem; max-width: 46rem; }
svg { display: block; width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt; }
.narrow { display: none; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr));
  gap: 1.25rem 1.5rem; margin-top: 1rem; }
.readout { position: absolute; z-index: 2; left: 0; right: 0; margin: 0; padding: .4rem .6rem;
  background: var(--mark); border-radius: 8px; font-size: .82rem; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
.readout:empty { display: none; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem .9rem; margin: 0 0 .3rem; padding: 0;
  list-style: none; font-size: .85rem; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 3px;
  margin-right: .45em; vertical-align: -.05em; background: var(--colour); }
.chips { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .4rem;
  margin: 1.25rem -1rem 0; padding: .5rem 1rem; background: var(--back); }
button { font: inherit; font-size: .9rem; color: var(--text); background: var(--card);
  border: 1px solid var(--faint); border-radius: 99px; padding: .25rem .8rem; cursor: pointer; }
button:focus-visible, summary:focus-visible { outline: 2px solid var(--text); outline-offset: 2px; }
.chips button[aria-pressed="false"] { color: var(--soft); text-decoration: line-through; }
.chips button[aria-pressed="false"] .swatch { background: var(--faint); }
[hidden] { display: none; }
.scrolls { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .94rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .4rem; text-align: right; border-bottom: 1px solid var(--faint); }
td, tbody th { white-space: nowrap; }
th { font-size: .85rem; color: var(--soft); font-weight: 600; vertical-align: bottom; }
tbody tr:last-child > * { border-bottom: 0; }
th:first-child, .left { text-align: left; }
th:first-child { padding-left: 0; } td:last-child, th:last-child { padding-right: 0; }
tbody th { font-size: .94rem; color: var(--text); }
.better { color: var(--good); font-weight: 600; }
.worse { color: var(--bad); font-weight: 600; } .failed { color: var(--bad); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
ul.problems { margin: .5rem 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
pre { margin: .5rem 0 0; overflow-x: auto;
  font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; }
details { margin-top: 1rem; } summary { cursor: pointer; }
@media (max-width: 40rem) {
  main { padding: 1.25rem .6rem 3rem; } section { padding: .9rem; } h1 { font-size: 1.45rem; }
  .wide { display: none; } .narrow { display: block; }
  .charts { grid-template-columns: 1fr; }
  .chips { margin: 1.25rem -.6rem 0; padding: .5rem .6rem; flex-wrap: nowrap; overflow-x: auto; }
  .chips button { flex: none; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  thead { display: none; } table, tbody { display: block; }
  tbody tr { display: grid; grid-template-columns: 1fr auto; padding: .6rem 0;
    border-bottom: 1px solid var(--faint); }
  tbody tr:last-child { border-bottom: 0; }
  tbody th { grid-column: 1 / -1; padding: 0 0 .15rem; text-align: left; border: 0;
    white-space: normal; overflow-wrap: anywhere; }
  tbody td, tbody td.left { display: contents; }
  tbody td > span { text-align: right; white-space: normal; }
  tbody td::before { content: attr(data-label); color: var(--soft); font-size: .9rem;
    padding-right: .75rem; text-align: left; }
}
@media print { .chips, .theme { display: none; } section { break-inside: avoid; } }
"""
)
_SCRIPT = """
const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");
const theme = document.querySelector(".theme");
const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
const say = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
theme.hidden = false;
theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; say(); });
dark.addEventListener("change", say);
say();
const hidden = new Set();
for (const chips of document.querySelectorAll(".chips")) chips.hidden = false;
for (const chip of document.querySelectorAll(".chips button")) {
  const place = Number(chip.dataset.place);
  chip.addEventListener("click", () => {
    const shown = hidden.has(place);
    if (shown) hidden.delete(place); else hidden.add(place);
    chip.setAttribute("aria-pressed", String(shown));
    for (const each of document.querySelectorAll(`svg .v${place}`)) {
      each.style.display = shown ? "" : "none";
    }
  });
}
const charts = JSON.parse(document.getElementById("charts").textContent);
const chips = document.querySelector(".chips") !== null;
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const chart = charts[figure.dataset.chart];
  const svg = figure.querySelector("svg"), readout = figure.querySelector(".readout");
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const [left, right] = chart.sides, [low, high] = chart.limits;
    const share = ((event.clientX - box.left) / box.width - left) / (right - left);
    const at = low + share * (high - low);
    let nearest = null;
    const said = [];
    for (const line of chart.lines) {
      if (chips && hidden.has(line.place)) continue;
      let best = 0;
      line.x.forEach((x, i) => {
        if (Math.abs(x - at) < Math.abs(line.x[best] - at)) best = i;
      });
      nearest = nearest === null ? line.x[best] : nearest;
      said.push(`${line.label} ${line.y[best] === null ? "–" : line.y[best]}`);
    }
    readout.textContent = nearest === null ? "" : `${chart.axis} ${nearest}: ${said.join(" · ")}`;
  });
  svg.addEventListener("pointerleave", () => { readout.textContent = ""; });
}
"""


class Page:
    """Collects what the page shows; `html` is the document.

    Args:
        title: Heading.
        variants: What the chips show and hide, in the order of the colours; none for no chips.
        reference: The place of the variant that is grey.
    """

    def __init__(
        self, title: str, variants: Sequence[str] = (), reference: int | None = None
    ) -> None:
        self.title = title
        self.variants = variants
        self.reference = reference
        self.parts: list[str] = []
        self.data: list[dict[str, object]] = []

    def text(self, lines: Iterable[str]) -> None:
        """Paragraphs below the heading."""
        self.parts += [f"<p>{escape(line)}</p>" for line in lines if line]

    def section(self, heading: str, inner: str) -> None:
        """A card."""
        if inner:
            self.parts.append(f"<section><h2>{escape(heading)}</h2>{inner}</section>")

    def problems(self, lines: Sequence[str]) -> None:
        """What is missing or broken; nothing where all is well."""
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        self.section("What is missing", f'<ul class="problems">{items}</ul>' if items else "")

    def chips(self) -> None:
        """The legend, whose entries show and hide the lines of all charts."""
        buttons = "".join(
            f'<button data-place="{place}" aria-pressed="true">{self._swatch(place)}'
            f"{escape(name)}</button>"
            for place, name in enumerate(self.variants)
        )
        self.parts.append(
            f'<div class="chips" role="group" aria-label="Variants that are shown">{buttons}</div>'
        )

    def groups(self, groups: Iterable[Group]) -> None:
        """A card for each group of charts."""
        for group in groups:
            charts = "".join(map(self._chart, group.charts))
            note = f'<p class="soft">{escape(NOTES[group.title])}</p>'
            self.section(group.title, f'{note}<div class="charts">{charts}</div>')

    def _chart(self, chart: Chart) -> str:
        place = len(self.data)
        drawn = draw(chart, self.reference)
        lines = [
            {
                "label": line.label,
                "place": line.place,
                "x": _rounded(line.x),
                "y": _rounded(line.mean),
            }
            for line in chart.lines
        ]
        self.data.append(
            {"axis": chart.axis, "limits": drawn.limits, "sides": drawn.sides, "lines": lines}
        )
        legend = ""
        if not self.variants and len(chart.lines) > 1:
            entries = "".join(
                f"<li>{self._swatch(line.place)}{escape(line.label)}</li>" for line in chart.lines
            )
            legend = f'<ul class="legend">{entries}</ul>'
        return (
            f'<figure data-chart="{place}"><h3>{escape(chart.title)}</h3>{legend}{drawn.svg}'
            '<p class="readout"></p></figure>'
        )

    def _swatch(self, place: int) -> str:
        return f'<span class="swatch" style="--colour: {swatch(place, self.reference)}"></span>'

    def html(self) -> str:
        """The document."""
        data = json.dumps(self.data, separators=(",", ":")).replace("<", "\\u003c")
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{_STYLE}</style></head><body><main>"
            f'<header><h1>{escape(self.title)}</h1><button class="theme" hidden>Dark</button>'
            f"</header>{''.join(self.parts)}</main>"
            f'<script type="application/json" id="charts">{data}</script>'
            f"<script>{_SCRIPT}</script></body></html>\n"
        )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[str] = ()) -> str:
    """A table, whose cells stand below each other on a telephone.

    Args:
        heads: Of the columns, as text.
        rows: Cells as HTML; the first is the heading of its row.
        left: Heads of columns that are aligned left.
    """
    shown = []
    for first, *cells in rows:
        columns = "".join(
            f'<td data-label="{escape(head)}"{_left(head, left)}><span>{cell}</span></td>'
            for head, cell in zip(heads[1:], cells, strict=True)
        )
        shown.append(f'<tr><th scope="row">{first}</th>{columns}</tr>')
    header = "".join(f'<th scope="col"{_left(head, left)}>{escape(head)}</th>' for head in heads)
    return (
        f'<div class="scrolls"><table><thead><tr>{header}</tr></thead>'
        f"<tbody>{''.join(shown)}</tbody></table></div>"
    )


def facts(entries: Iterable[tuple[str, str]]) -> str:
    """Names and values below each other."""
    shown = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries)
    return f"<dl>{shown}</dl>" if shown else ""


def details(summary: str, text: str, is_open: bool = False) -> str:
    """Text that can be unfolded."""
    state = " open" if is_open else ""
    return (
        f"<details{state}><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
    )


def _left(head: str, left: Sequence[str]) -> str:
    return ' class="left"' if head in left else ""


def _rounded(values: Iterable[float]) -> list[float | None]:
    """Five digits; JSON knows no NaN."""
    return [None if math.isnan(value) else float(f"{value:.5g}") for value in map(float, values)]
