"""What a comparison over a few seeds shows: paired differences, their intervals, a verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.stats import t as student_t

Verdict = Literal["better", "worse", "no difference shown", "one seed, no interval"]


@dataclass(frozen=True)
class PairedDifference:
    """Mean of the per-seed differences and its interval, in the metric's own unit.

    `low` and `high` are NaN when there is only one difference.
    """

    mean: float
    low: float
    high: float


def paired_difference(
    values: Sequence[float], reference: Sequence[float], level: float = 0.95
) -> PairedDifference:
    """Interval of the mean of `values[i] - reference[i]`, one pair per seed.

    A seed fixes data, order and initialisation for both sides, so the spread that seeds share
    cancels in the difference. With `n` differences `d` of standard deviation `s` the interval is
    `mean(d) ± t(n - 1) s / sqrt(n)`, `t` being the two-sided quantile of Student's distribution:
    the one of the paired t test. It assumes that the differences are about normal. A bootstrap
    would assume less, and with three seeds say nothing: it could only draw ten different means,
    none outside the range of the three values.

    Args:
        values: Metric of the variant, one per seed.
        reference: Metric of the baseline, for the same seeds in the same order.
        level: Probability that such an interval covers the true mean difference.

    Raises:
        ValueError: When the two lengths differ or are zero.
    """
    if len(values) != len(reference) or not values:
        raise ValueError(
            f"Paired values are one per seed on both sides; got {len(values)} and {len(reference)}."
        )
    differences = [a - b for a, b in zip(values, reference, strict=True)]
    mean, n = statistics.fmean(differences), len(differences)
    if n == 1:
        return PairedDifference(mean, math.nan, math.nan)
    quantile = float(student_t.ppf(0.5 + level / 2, n - 1))
    margin = quantile * statistics.stdev(differences) / math.sqrt(n)
    return PairedDifference(mean, mean - margin, mean + margin)


def verdict(difference: PairedDifference, mode: Literal["max", "min"]) -> Verdict:
    """Whether the interval lies wholly on one side of zero, and on which."""
    if math.isnan(difference.low):
        return "one seed, no interval"
    if difference.low <= 0.0 <= difference.high:
        return "no difference shown"
    return "better" if (difference.mean > 0) == (mode == "max") else "worse"


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation; NaN for a single value."""
    return statistics.stdev(values) if len(values) > 1 else math.nan
