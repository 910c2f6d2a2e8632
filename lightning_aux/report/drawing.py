"""Draws charts as SVG that is part of a page: its text is text, its colours are the page's."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from html import escape

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_aux.report.charts import Chart
from lightning_aux.report.figures import DARK, LIGHT, Theme, canvas, style_of

# Colours that stand for variables of the stylesheet until the drawing is done.
_COLOURS = {
    "background": "#0a0b01",
    "text": "#0a0b02",
    "faint": "#0a0b03",
    "reference": "#0a0b04",
}
_SERIES = tuple(f"#0a0c{place:02x}" for place in range(len(LIGHT.series)))
PAGE = Theme(**_COLOURS, series=_SERIES)
_STEPS = [1, 2, 2.5, 5, 10]  # round ticks
SMALL = (4.4, 2.7)
"""Width and height of a chart in inches."""


@dataclass(frozen=True)
class Drawn:
    """A chart as SVG, and where its plot is in it.

    Attributes:
        svg: The element.
        limits: First and last place on the axis.
        sides: Left and right end of the plot, as shares of the width.
    """

    svg: str
    limits: tuple[float, float]
    sides: tuple[float, float]


def variables(theme: Theme) -> str:
    """The colours of a theme as variables of a stylesheet."""
    return "; ".join(f"--chart-{name}: {colour}" for name, colour in _named(theme).items())


def css_variables() -> tuple[str, str]:
    """Those of the light and of the dark theme."""
    return variables(LIGHT), variables(DARK)


def swatch(place: int, reference: int | None = None) -> str:
    """The colour of a line, as a value in a stylesheet."""
    return _as_variables(style_of(place, reference, PAGE)[0])


def draw(chart: Chart, reference: int | None = None) -> Drawn:
    """Draw a chart.

    Args:
        chart: Its lines.
        reference: The place of the line that is grey; None for none.
    """
    figure, axes = canvas(*SMALL, PAGE)
    for line in chart.lines:
        colour, dash = style_of(line.place, reference, PAGE)
        dash = "--" if line.dashed else dash
        if line.seeds > 1 and not line.dashed:
            band = axes.fill_between(
                line.x, line.low, line.high, color=colour, alpha=0.16, linewidth=0
            )
            band.set_gid(f"v{line.place}")
        # A single point is no line.
        marker = "o" if np.isfinite(line.mean).sum() == 1 else ""
        (drawn,) = axes.plot(line.x, line.mean, dash, color=colour, linewidth=1.8, marker=marker)
        drawn.set_gid(f"v{line.place}")
    axes.set_xlabel(chart.axis, fontsize=10.5)
    axes.tick_params(labelsize=10.5)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    axes.grid(axis="y", color=PAGE.faint, linewidth=0.7)
    axes.margins(x=0.02)
    label = f"{chart.title} over {chart.axis}s"
    svg = inline(figure, label)
    box = axes.get_position()
    low, high = axes.get_xlim()
    return Drawn(svg, (low, high), (box.x0, box.x1))


def inline(figure: Figure, label: str) -> str:
    """A figure drawn in the colours of `PAGE` as an SVG element that takes those of the page."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lightning-aux"}):
        figure.savefig(
            buffer, format="svg", facecolor=figure.get_facecolor(), metadata={"Date": None}
        )
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="v(\d+)"', r'class="v\1"', text)
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)
    # Places only: a number that is text is read.
    text = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d+\.\d{2})\d+", r"\1", tag[0]), text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", text)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>',
        rf'<svg role="img" viewBox="\1" aria-label="{escape(label)}">',
        text,
        count=1,
    )
    return _as_variables(re.sub(r">\s+<", "><", text).strip())


def _as_variables(text: str) -> str:
    """With the variables of the stylesheet for the colours of `PAGE`."""
    for name, colour in _named(PAGE).items():
        text = text.replace(colour, f"var(--chart-{name})")
    return text


def _named(theme: Theme) -> dict[str, str]:
    """The colours of a theme by the names of their variables."""
    named = {name: getattr(theme, name) for name in _COLOURS}
    return named | {f"series-{place}": colour for place, colour in enumerate(theme.series)}
