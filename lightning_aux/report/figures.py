"""The two pictures of a comparison: learning curves, and paired differences with intervals."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_aux.comparison import Comparison, RunResult, VariantSummary
from lightning_aux.report.charts import LARGEST
from lightning_aux.report.units import Unit

mpl.use("Agg")


@dataclass(frozen=True)
class Theme:
    """Colours of a picture. The series come from Okabe and Ito's palette for the colour-blind."""

    background: str
    text: str
    faint: str
    reference: str
    series: tuple[str, ...]


LIGHT = Theme(
    background="#ffffff",
    text="#1c2128",
    faint="#d5d9e0",
    reference="#5f6773",
    series=("#0072b2", "#d55e00", "#009e73", "#b5479b", "#b98200", "#2f9bd6"),
)
DARK = Theme(
    background="#161b22",
    text="#e6e9ef",
    faint="#363d48",
    reference="#a4adba",
    series=("#56b4e9", "#ff8a3d", "#2fd0a0", "#e29bc8", "#f0c040", "#8fa8ff"),
)
# Inches. A screen shows the letters of a narrow picture, which is for telephones, at full size.
WIDE = 8.6
NARROW = 4.7
DASHES = ("-", "--", ":")


def draw_curves(
    comparison: Comparison, results: Sequence[RunResult], theme: Theme, width: float = WIDE
) -> Figure | None:
    """The metric per epoch: mean over seeds, with a band from the lowest to the highest seed.

    Args:
        comparison: Names the metric (`curve`) and the unit.
        results: All runs; those that failed are left out.
        theme: Colours.
        width: Inches.

    Returns:
        The figure, or None when the comparison names no curve or no run logged it.
    """
    metric, unit = comparison.curve, Unit(comparison.decides.unit)
    lines = {name: _curve(results, name, metric) for name in comparison.variants}
    lines = {name: line for name, line in lines.items() if line.size}
    if metric is None or not lines:
        return None
    figure, axes = canvas(width, 4.8 if width >= WIDE else 3.9, theme)
    ends = []
    for name, line in lines.items():
        colour, dash = _style(comparison, name, theme)
        epochs, values = line[0], unit.factor * line[1:]
        values[~(np.abs(values) < LARGEST)] = np.nan
        mean = values.mean(axis=0)
        gid = gid_of(comparison, name)
        low, high = values.min(axis=0), values.max(axis=0)
        axes.fill_between(epochs, low, high, color=colour, alpha=0.16, linewidth=0, gid=gid)
        axes.plot(epochs, mean, dash, color=colour, linewidth=2.2, label=name, gid=gid)
        if (known := np.flatnonzero(np.isfinite(mean))).size:
            end = known[-1]
            ends.append(_End(float(epochs[end]), float(mean[end]), name, colour, gid))
    axes.set_xlabel("epoch")
    counts = sorted({len(line) - 1 for line in lines.values()})
    seeds = "one seed" if counts == [1] else f"mean of {' to '.join(map(str, counts))} seeds"
    _title(axes, f"{unit.label(metric)}: {seeds}", theme)
    axes.grid(axis="y", color=theme.faint, linewidth=0.8)
    axes.margins(x=0.02)
    if width >= WIDE:  # elsewhere there is no room for them, and a legend
        _label_ends(axes, ends)
    return figure


def draw_differences(
    comparison: Comparison,
    summaries: Sequence[VariantSummary],
    theme: Theme,
    width: float = WIDE,
) -> Figure | None:
    """Paired difference of each variant to the reference: mean, interval, a dot per seed.

    Returns:
        The figure, or None when no variant has a difference.
    """
    unit = Unit(comparison.decides.unit)
    rows = [row for row in summaries if row.paired is not None]
    if not rows:
        return None
    figure, axes = canvas(width, 1.5 + 0.62 * len(rows), theme)
    axes.axvline(0, color=theme.reference, linewidth=1.4, zorder=1)
    for height, row in enumerate(reversed(rows)):
        colour, _ = _style(comparison, row.name, theme)
        known = set(axes.get_children())
        _draw_difference(axes, height, row, unit, colour, theme)
        for drawn in set(axes.get_children()) - known:
            drawn.set_gid(gid_of(comparison, row.name))
    axes.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    axes.tick_params(axis="y", length=0, labelsize=10.5, labelcolor=theme.text)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=theme.faint, linewidth=0.8)
    axes.margins(x=0.08)
    axes.set_xlabel(unit.difference_label(comparison.decides.metric))
    better = f"better than {comparison.reference}"
    up = comparison.decides.mode == "max"
    _title(axes, f"{better} →" if up else f"← {better}", theme, "right" if up else "left")
    return figure


def gid_of(comparison: Comparison, variant: str) -> str:
    """The group that everything drawn of a variant is in, in an SVG."""
    return f"v{list(comparison.variants).index(variant)}"


def png(figure: Figure) -> bytes:
    """The figure as a PNG of 160 dots per inch."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=160, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def _draw_difference(
    axes: Axes, height: int, row: VariantSummary, unit: Unit, colour: str, theme: Theme
) -> None:
    paired = row.paired
    assert paired is not None
    mean = unit.factor * paired.mean
    if not math.isnan(paired.low):
        low, high = unit.factor * paired.low, unit.factor * paired.high
        axes.plot(
            [low, high],
            [height, height],
            color=colour,
            linewidth=6,
            alpha=0.35,
            solid_capstyle="butt",
            zorder=2,
        )
    seeds = [unit.factor * value for value in row.differences.values()]
    axes.plot(
        seeds,
        [height] * len(seeds),
        "o",
        color=colour,
        markersize=5,
        markeredgecolor=theme.background,
        markeredgewidth=0.8,
        zorder=3,
    )
    axes.plot([mean, mean], [height - 0.2, height + 0.2], color=colour, linewidth=2.6, zorder=4)
    axes.annotate(
        unit.signed(paired.mean),
        (mean, height + 0.2),
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
        color=colour,
        fontsize=10,
        fontweight="bold",
    )


def _curve(results: Sequence[RunResult], name: str, metric: str | None) -> np.ndarray:
    """Row 0 the epochs (from 1), then a row per seed, cut to the shortest; empty when none."""
    runs = [
        {int(entry["epoch"]) + 1: entry[metric] for entry in run.history if metric in entry}
        for run in results
        if run.variant == name and run.error is None and metric is not None
    ]
    runs = [run for run in runs if run]
    common = sorted(set.intersection(*map(set, runs))) if runs else []
    if not common:
        return np.empty((0, 0))
    return np.array([common, *([run[epoch] for epoch in common] for run in runs)], dtype=float)


def _style(comparison: Comparison, name: str, theme: Theme) -> tuple[str, str]:
    names = list(comparison.variants)
    return style_of(names.index(name), names.index(comparison.reference), theme)


def style_of(place: int, reference: int | None, theme: Theme) -> tuple[str, str]:
    """Colour and dash of a line: the reference is grey, the others keep their place."""
    if place == reference:
        return theme.reference, "-"
    others = place if reference is None or place < reference else place - 1
    rounds, position = divmod(others, len(theme.series))
    return theme.series[position], DASHES[rounds % len(DASHES)]


class _End(NamedTuple):
    """Where a line ends, and whose it is."""

    x: float
    y: float
    name: str
    colour: str
    gid: str


def _label_ends(axes: Axes, ends: list[_End]) -> None:
    """Write each line's name at its end, moved apart where the lines end close together."""
    low, high = axes.get_ylim()
    ordered = sorted(ends, key=lambda end: end.y)
    heights = _spaced([end.y for end in ordered], gap=0.055 * (high - low))
    for height, (x, y, name, colour, gid) in zip(heights, ordered, strict=True):
        label = axes.annotate(
            f"{name}  {y:.1f}" if abs(y) >= 10 else f"{name}  {y:.3g}",
            xy=(x, y),
            xytext=(1.02, height),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            color=colour,
            fontsize=10.5,
            fontweight="bold",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.8,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 1,
            },
            annotation_clip=False,
            gid=gid,
        )
        assert label.arrow_patch is not None
        label.arrow_patch.set_gid(gid)


def _spaced(heights: list[float], gap: float) -> list[float]:
    """The nearest heights, in least squares, of which each is `gap` or more above the last.

    With `i * gap` taken off, that is isotonic regression: neighbours in the wrong order are
    pooled and replaced by their mean.
    """
    pools: list[tuple[float, int]] = []
    for index, height in enumerate(heights):
        mean, size = height - index * gap, 1
        while pools and pools[-1][0] > mean:
            other, count = pools.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        pools.append((mean, size))
    flat = [mean for mean, size in pools for _ in range(size)]
    return [mean + index * gap for index, mean in enumerate(flat)]


def _title(axes: Axes, text: str, theme: Theme, side: Literal["left", "right"] = "left") -> None:
    axes.set_title(text, loc=side, color=theme.text, fontsize=11, pad=12)


def canvas(width: float, height: float, theme: Theme) -> tuple[Figure, Axes]:
    """An empty picture in the colours of a theme; width and height in inches."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=theme.background)
    axes = figure.add_subplot(facecolor=theme.background)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(theme.faint)
    axes.tick_params(colors=theme.text, labelcolor=theme.text, color=theme.faint)
    axes.xaxis.label.set_color(theme.text)
    axes.set_axisbelow(True)
    return figure, axes
