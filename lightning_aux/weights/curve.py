"""Scores along a line between two sets of weights: the best of them, a table and a picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from lightning_aux.engine import AuxiliaryError

__all__ = ["COEFFICIENTS", "best_of", "write_curve"]

COEFFICIENTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def best_of(scores: Mapping[float, float], mode: Literal["min", "max"], asked_by: str) -> float:
    """The coefficient with the best score; one that is NaN is never the best.

    Raises:
        AuxiliaryError: all are NaN.
    """
    known = {each: score for each, score in scores.items() if not math.isnan(score)}
    if not known:
        raise AuxiliaryError(
            f"{asked_by}: the score of every coefficient ({', '.join(f'{x:g}' for x in scores)}) "
            f"is NaN, so there is none to choose. Look at the validation data and metric; nothing "
            f"that was trained is lost."
        )
    choose = max if mode == "max" else min
    return choose(known, key=known.__getitem__)


def write_curve(scores: Mapping[float, float], best: float, monitor: str, out: Path) -> None:
    """Write ``out`` with the ending ``.csv`` and, if matplotlib is installed, ``.png``.

    Args:
        scores: by coefficient.
        best: the coefficient to mark.
        monitor: what the scores are.
        out: the checkpoint beside which they go.
    """
    with out.with_suffix(".csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["coefficient", monitor])
        rows.writerows(scores.items())
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    points = sorted(scores.items())
    axes.plot([x for x, _ in points], [y for _, y in points], marker="o", color="#3b6ea8")
    axes.plot([best], [scores[best]], marker="o", markersize=12, color="#c8553d", fillstyle="none")
    axes.annotate(f"α = {best:g}", (best, scores[best]), textcoords="offset points", xytext=(8, 8))
    axes.set_xlabel("α: 0 before fine-tuning, 1 after it")
    axes.set_ylabel(monitor)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    figure.savefig(out.with_suffix(".png"), dpi=150)
