"""From the logs of runs to charts: what is drawn where, averaged over seeds and thinned out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lightning_aux.report.logs import Log, Numbers, Series

POINTS = 200
"""Points of a line that a page holds at most, a lowest and a highest one of each stretch."""

LARGEST = 1e300
"""What is larger is drawn as a gap, as infinity is: an axis that holds it has no ticks."""

CURVES = "Learning curves"
TERMS = "Loss and terms"
WEIGHTS = "Weights of terms"
GRADIENTS = "Gradients"
TEACHERS = "Teachers"
SCHEDULES = "Schedules and other values"
NOTES = {
    CURVES: "What the module itself logged.",
    TERMS: "The user's loss, the total that is trained, and every term before its weight.",
    WEIGHTS: "The factor of each term.",
    GRADIENTS: "The gradient of the loss beside that of each weighted term: norms, their ratio, "
    "and the cosine between them. Below 0 the term pulls against the loss. "
    "Of two norms in one colour the dashed one is that of the loss.",
    TEACHERS: "How far the teacher's weights are from the model's: ‖θ_T − θ‖ / ‖θ‖.",
    SCHEDULES: "What schedules drove, learning rates, and what else callbacks measured.",
}


@dataclass(frozen=True)
class Line:
    """One line of a chart, with a band from the lowest to the highest seed.

    Attributes:
        label: What it is called in the legend.
        place: Its number in the legend, which decides its colour.
        x: Places.
        mean: Mean over seeds; NaN where the line has a gap.
        low: Lowest seed.
        high: Highest seed.
        seeds: How many there are.
        dashed: Whether it is what another line of its colour is to be compared with.
    """

    label: str
    place: int
    x: Numbers
    mean: Numbers
    low: Numbers
    high: Numbers
    seeds: int
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        title: What its values are.
        axis: What its places are: `epoch` or `step`.
        lines: What is drawn.
    """

    title: str
    axis: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Group:
    """Charts that belong together.

    Attributes:
        title: Their heading.
        charts: In order.
    """

    title: str
    charts: tuple[Chart, ...]


def charts_of_comparison(
    logs: Mapping[str, Mapping[int, Log]], first: Sequence[str] = ()
) -> list[Group]:
    """A chart for everything that was logged, with a line for each variant that logged it.

    Args:
        logs: By variant, in the order of the legend, and seed.
        first: Names that come first among the learning curves.
    """
    names = _names(log for runs in logs.values() for log in runs.values())
    grouped: dict[str, list[Chart]] = {}
    for name in _ordered(names, first):
        group = _group(name, names)
        if group is None:
            continue
        found = {
            (variant, place): _logged(runs, name)
            for place, (variant, runs) in enumerate(logs.items())
        }
        series = {key: each for key, each in found.items() if each}
        axis = _axis(name, [one for each in series.values() for one in each])
        lines = [_line(variant, place, axis, each) for (variant, place), each in series.items()]
        beside = _main_norm(name, group)
        if beside is not None:
            lines += [
                replace(_line(f"{variant}, loss", place, axis, each), dashed=True)
                for variant, place in series
                if (each := _logged(logs[variant], beside))
            ]
        grouped.setdefault(group, []).append(Chart(_title(name, names), axis, tuple(lines)))
    return [Group(title, tuple(grouped[title])) for title in NOTES if title in grouped]


def _logged(runs: Mapping[int, Log], name: str) -> list[Series]:
    return [log.series[name] for log in runs.values() if name in log.series]


def charts_of_run(log: Log) -> list[Group]:
    """The same of one run, where what has one unit is in one chart."""
    names = _ordered(_names([log]))
    grouped: dict[str, dict[tuple[str, str], list[str]]] = {}
    for name in names:
        group = _group(name, names)
        if group is not None:
            key = _together(name, group), _axis(name, [log.series[name]])
            grouped.setdefault(group, {}).setdefault(key, []).append(name)
    groups = []
    for title in NOTES:
        charts = []
        for (together, axis), members in grouped.get(title, {}).items():
            labels = [_title(name, names) for name in members]
            lines = [
                _line(label, place, axis, [log.series[name]])
                for place, (name, label) in enumerate(zip(members, labels, strict=True))
            ]
            heading = together if len(lines) > 1 else labels[0]
            charts.append(Chart(heading, axis, tuple(lines)))
        if charts:
            groups.append(Group(title, tuple(charts)))
    return groups


def last_values(log: Log) -> dict[str, float]:
    """The last value of everything, in the order of the log."""
    return {name: float(each.values[-1]) for name, each in log.series.items()}


# ------------------------------------------------------------------------------------- what is what
def _names(logs: Iterable[Log]) -> list[str]:
    return list(dict.fromkeys(name for log in logs for name in log.series))


def _ordered(names: Sequence[str], first: Sequence[str] = ()) -> list[str]:
    """With the metrics that matter and the loss before what is measured beside them."""
    ahead = [*first, "aux/main", "aux/total"]
    rest = sorted((n for n in names if n not in ahead), key=_kind)  # sorting is stable
    return [name for name in ahead if name in names] + rest


def _kind(name: str) -> int:
    """Norms before ratios before cosines, so that what is compared stands side by side."""
    kinds = ("main_norm", "norm", "ratio", "cosine")
    if name.endswith("/main_norm"):
        return 0
    kind = name.rpartition("_")[2] if name.count("/") > 1 else ""
    return kinds.index(kind) if kind in kinds else -1


def _main_norm(name: str, group: str) -> str | None:
    """The norm of the loss's gradient, beside which that of a term is drawn."""
    main = f"{name.rpartition('/')[0]}/main_norm"
    return main if group == GRADIENTS and name.endswith("_norm") and name != main else None


def _group(name: str, names: Sequence[str]) -> str | None:
    """Where a logged value belongs; None for what is measured once, after training."""
    if not name.startswith("aux/"):
        if name.startswith("lr-") or name.rpartition("/")[2] == "lr":
            return SCHEDULES
        return None if name.startswith("test") else CURVES
    _, owner, *rest = name.split("/")
    if not rest:
        return TERMS
    if rest == ["weight"]:
        return WEIGHTS
    if rest == ["distance"]:
        return TEACHERS
    return GRADIENTS if f"aux/{owner}/main_norm" in names else SCHEDULES


def _title(name: str, names: Sequence[str]) -> str:
    group = _group(name, names)
    if not name.startswith("aux/"):
        return name
    _, owner, *rest = name.split("/")
    if group == TERMS:
        return {"main": "main loss", "total": "total loss"}.get(owner, owner)
    if group == WEIGHTS:
        return f"weight of {owner}"
    if group == TEACHERS:
        return f"distance of {owner}"
    value = "/".join(rest)
    if group == GRADIENTS:
        of, _, kind = value.rpartition("_")
        said = {"norm": "gradient norm of", "ratio": "ratio to the loss of", "cosine": "cosine of"}
        if kind in said and of:
            return f"{said[kind]} {'the loss' if of == 'main' else of}"
    return f"{owner}: {value}"


def _together(name: str, group: str) -> str:
    """The heading of the chart that a value shares with others in the report of one run."""
    if group in (TERMS, WEIGHTS, TEACHERS):
        return {TERMS: "loss and terms", WEIGHTS: "weights", TEACHERS: "distances"}[group]
    if group == GRADIENTS:
        kind = name.rpartition("_")[2]
        return {"norm": "gradient norms", "ratio": "ratios to the loss"}.get(kind, f"{kind}s")
    if group == CURVES:
        return name.rpartition("/")[2].partition("_")[2].removesuffix("_step") or name
    return name


# ------------------------------------------------------------------------------------------- lines
def _axis(name: str, series: Sequence[Series]) -> str:
    """Epochs for what was logged once in each, else optimizer steps."""
    if name.startswith("aux/"):
        return "step"
    once = all(
        np.isfinite(each.epochs).all() and len(np.unique(each.epochs)) == len(each.epochs)
        for each in series
    )
    return "epoch" if once else "step"


def _line(label: str, place: int, axis: str, series: Sequence[Series]) -> Line:
    """Mean and band at the places that all seeds have; the longest run where there are none."""
    by_place = []
    for each in series:
        places = (each.epochs if axis == "epoch" else each.steps) + 1
        by_place.append(dict(zip(places.tolist(), each.values.tolist(), strict=True)))
    common = sorted(set.intersection(*map(set, by_place)))
    if not common:
        by_place = [max(by_place, key=len)]
        common = sorted(by_place[0])
    values = np.array([[run[x] for x in common] for run in by_place])
    values[~(np.abs(values) < LARGEST)] = np.nan
    # Where one seed is not finite there is a gap: the mean of the others would be a mean of few.
    mean, low, high = values.mean(axis=0), values.min(axis=0), values.max(axis=0)
    x = np.array(common)
    return Line(label, place, *thinned(x, mean, low, high), seeds=len(by_place))


def thinned(
    x: Numbers, mean: Numbers, low: Numbers, high: Numbers
) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """At most `POINTS` points: of each stretch the lowest and the highest, so that spikes stay.

    The band of a stretch reaches from its lowest to its highest value; the last point stays.
    """
    if len(x) <= POINTS:
        return x, mean, low, high
    kept: list[int] = []
    lowest, highest = low.copy(), high.copy()
    for stretch in np.array_split(np.arange(len(x) - 1), (POINTS - 1) // 2):
        part = mean[stretch]
        if np.isnan(part).all():
            kept.append(int(stretch[0]))
            continue
        ends = sorted({int(stretch[np.nanargmin(part)]), int(stretch[np.nanargmax(part)])})
        lowest[ends] = _of(np.nanmin, low[stretch])
        highest[ends] = _of(np.nanmax, high[stretch])
        kept += ends
    kept.append(len(x) - 1)
    return x[kept], mean[kept], lowest[kept], highest[kept]


def _of(reduce: Callable[[Numbers], float], values: Numbers) -> float:
    return float(reduce(values))
