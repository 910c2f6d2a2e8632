"""The same tables as HTML: a page that needs no other file and no network, or a notebook's cell."""

from __future__ import annotations

from html import escape

from lightning_aux.inspection.found import Inspection
from lightning_aux.inspection.sections import Section, headline, sections

__all__ = ["fragment", "page"]

# Under one class, so that a notebook keeps its own looks.
_STYLE = """
.aux-inspection { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --text: #1c2128;
  --faint: #d5d9e0; --soft: #57606a; --bad: #b3261e; --mark: #eef1f6; }
@media (prefers-color-scheme: dark) { .aux-inspection { --back: #0d1117; --card: #161b22;
  --text: #e6e9ef; --faint: #363d48; --soft: #a4adba; --bad: #ff8e85; --mark: #222936; } }
.aux-inspection, .aux-inspection * { box-sizing: border-box; }
.aux-inspection { background: var(--back); color: var(--text); padding: 2rem 1rem 4rem;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.aux-inspection > div { max-width: 72rem; margin: 0 auto; }
.aux-inspection h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .5rem; }
.aux-inspection h2 { font-size: 1.15rem; margin: 0 0 .75rem; }
.aux-inspection p { margin: .5rem 0; max-width: 52rem; overflow-wrap: anywhere; }
.aux-inspection section { background: var(--card); border: 1px solid var(--faint);
  border-radius: 10px; padding: 1.25rem; margin-top: 1.25rem; }
.aux-inspection .soft { color: var(--soft); font-size: .9rem; }
.aux-inspection .bad { color: var(--bad); }
.aux-inspection .wide { overflow-x: auto; }
.aux-inspection table { border-collapse: collapse; width: 100%; font-size: .95rem;
  font-variant-numeric: tabular-nums; background: none; color: inherit; }
.aux-inspection tr { background: none; }
.aux-inspection th, .aux-inspection td { padding: .4rem .75rem .4rem 0; text-align: left;
  vertical-align: top; border: 0; border-bottom: 1px solid var(--faint); overflow-wrap: anywhere; }
.aux-inspection thead th { color: var(--soft); font-size: .85rem; font-weight: 600;
  overflow-wrap: normal; }
.aux-inspection tbody th { font-weight: 600; }
.aux-inspection tbody tr:last-child > * { border-bottom: 0; }
.aux-inspection .path { font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; }
.aux-inspection .tag { background: var(--mark); border-radius: 6px; padding: .05rem .4rem; }
@media (max-width: 40rem) {
  .aux-inspection { padding: 1.25rem .6rem 3rem; } .aux-inspection section { padding: .9rem; }
  .aux-inspection h1 { font-size: 1.45rem; }
  .aux-inspection thead { display: none; }
  .aux-inspection table, .aux-inspection tbody { display: block; }
  .aux-inspection tbody tr { display: block; padding: .5rem 0;
    border-bottom: 1px solid var(--faint); }
  .aux-inspection tbody tr:last-child { border-bottom: 0; }
  .aux-inspection tbody th, .aux-inspection tbody td { display: block; border: 0; padding: 0; }
  .aux-inspection tbody td:empty { display: none; }
  .aux-inspection tbody td::before { content: attr(data-label) "  "; color: var(--soft);
    font-size: .85rem; }
}
"""


def page(found: Inspection) -> str:
    """A whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(found.name)}, inspected</title>"
        "<style>body { margin: 0; }</style></head>"
        f"<body>{fragment(found)}</body></html>\n"
    )


def fragment(found: Inspection) -> str:
    """What stands in a page, or in the output of a notebook's cell, with its style."""
    first, *others = headline(found)
    lines = [f"<p>{escape(first)}</p>"]
    for line in others:
        bad = ' class="bad"' if _is_bad(line) else ' class="soft"'
        lines.append(f"<p{bad}>{escape(line)}</p>")
    tables = "".join(_table(each) for each in sections(found))
    return (
        f'<style>{_STYLE}</style><main class="aux-inspection"><div><h1>{escape(found.name)}</h1>'
        f"{''.join(lines)}{tables}</div></main>"
    )


def _is_bad(line: str) -> bool:
    return line.startswith(("Fails:", "Each callback works, but")) or " would fail: " in line


def _table(section: Section) -> str:
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in section.heads)
    rows = []
    for place, (first, *cells) in enumerate(section.rows):
        depth = first.count(".") if section.tree else 0
        indent = f' style="padding-left: {depth * 0.9:g}rem"' if depth else ""
        columns = "".join(
            f'<td data-label="{escape(head)}">{escape(cell)}</td>'
            for head, cell in zip(section.heads[1:], cells, strict=True)
        )
        bad = ' class="bad"' if place in section.failed else ""
        rows.append(
            f'<tr{bad}><th scope="row" class="path"{indent}>{escape(first)}</th>{columns}</tr>'
        )
    return (
        f'<section><h2>{escape(section.title)}</h2><div class="wide"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="soft">{escape(section.note)}</p></section>'
    )
