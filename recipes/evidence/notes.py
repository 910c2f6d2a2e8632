"""What the runs of some comparisons say beyond paired differences, in a sentence each."""

import math
from collections.abc import Iterable, Mapping
from statistics import fmean

from lightning_aux.comparison.statistics import PairedDifference, paired_difference
from lightning_aux.report.units import Unit

Values = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Metrics by variant, seed and name."""


def recovered_gap(values: Values) -> str:
    """How much of the way from the supervisor to the ceiling a student goes (arXiv:2312.09390)."""
    students = {name: runs for name, runs in values.items() if name != "true_labels"}

    def share(variant: str, seed: int) -> float:
        weak = values["baseline"][seed]["test_supervisor"]
        ceiling = values["true_labels"][seed]["test_acc"]
        return (values[variant][seed]["test_acc"] - weak) / (ceiling - weak)

    shares = {name: [share(name, seed) for seed in runs] for name, runs in students.items()}
    zero = [0.0] * len(values["baseline"])
    said = [
        f"{name.replace('_', ' ')} {_with_interval(paired_difference(each, zero), Unit('%'))} %"
        for name, each in shares.items()
    ]
    return (
        "Performance gap recovered, (student − supervisor) / (ceiling − supervisor), mean with its "
        f"95 % interval: {'; '.join(said)}."
    )


def rate_sensitivity(values: Values) -> str:
    """Mean over learning rates of the distance to the loss of the best one (arXiv:2309.14322)."""

    def sensitivity(variants: Iterable[str], seed: int) -> float:
        guessing = math.log(10)
        found = [values[variant][seed].get("test_nll", math.nan) for variant in variants]
        losses = [min(each, guessing) if math.isfinite(each) else guessing for each in found]
        return fmean(losses) - min(losses)

    seeds = values["baseline"]
    term = [name for name in values if name.endswith("z_loss")]
    plain = [name for name in values if name not in term]
    without, beside = ([sensitivity(each, seed) for seed in seeds] for each in (plain, term))
    number = Unit().number
    return (
        "Sensitivity to the learning rate, the mean over the rates of the loss (at most log 10, "
        f"that of guessing) minus the best: {number(fmean(without))} without ZLoss, "
        f"{number(fmean(beside))} with it, difference "
        f"{_with_interval(paired_difference(beside, without), Unit())}."
    )


def _with_interval(found: PairedDifference, unit: Unit) -> str:
    return f"{unit.signed(found.mean)} [{unit.signed(found.low)}, {unit.signed(found.high)}]"
