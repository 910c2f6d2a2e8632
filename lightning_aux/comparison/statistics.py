"""What a comparison over a few seeds shows: paired differences, intervals, p values, a verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import t as student_t

Verdict = Literal["better", "worse", "no difference shown", "one seed, no interval"]

SIGNIFICANT = 0.05
# Up to here all n^n resamples are enumerated (46 656 of six), beyond it some are drawn.
_ENUMERATED = 6
_DRAWN = 10_000


@dataclass(frozen=True)
class PairedDifference:
    """Mean of the per-seed differences and what it is worth, in the metric's own unit.

    Attributes:
        mean: Mean of the differences.
        low: Lower end of the interval of Student's t; NaN for a single difference, as all others.
        high: Upper end.
        boot_low: Lower end of the bootstrap interval.
        boot_high: Upper end.
        p: Two-sided p value of the paired t test; NaN where all differences are equal, of which
            the test says nothing.
        p_adjusted: The same, corrected for the number of variants by Holm's method.
    """

    mean: float
    low: float
    high: float
    boot_low: float = math.nan
    boot_high: float = math.nan
    p: float = math.nan
    p_adjusted: float = math.nan


def paired_difference(
    values: Sequence[float], reference: Sequence[float], level: float = 0.95
) -> PairedDifference:
    """Mean of `values[i] - reference[i]`, one pair per seed, with its intervals and p value.

    A seed fixes data, order and initialisation for both sides, so the spread that seeds share
    cancels in the difference. With `n` differences `d` of standard deviation `s` the interval is
    `mean(d) ± t(n - 1) s / sqrt(n)`, `t` being the two-sided quantile of Student's distribution,
    and `p` that of the paired t test, which assumes that the differences are about normal.

    The bootstrap interval assumes less: it lies between the quantiles of the means of all `n^n`
    resamples (of 10,000 drawn ones above six seeds, always the same). With few seeds it promises
    too much: at three seeds it is the range of the three differences, which leaves out the mean of
    a symmetric distribution once in four times. How often the 95 % intervals cover the true
    mean, as `python -m tests.comparison.coverage` measures it (10,000 repetitions; skewed is
    exponential):

    | differences | seeds | Student's t | bootstrap |
    |---|---:|---:|---:|
    | normal | 3 | 94.9 % | 75.2 % |
    | normal | 5 | 95.2 % | 84.3 % |
    | normal | 10 | 95.4 % | 91.0 % |
    | skewed | 3 | 88.5 % | 70.3 % |
    | skewed | 5 | 87.4 % | 78.1 % |
    | skewed | 10 | 89.7 % | 86.2 % |

    So the verdict rests on the t test, and the bootstrap interval is there to be looked at beside
    it: with ten seeds or more, ends that differ much say that the differences are skewed.

    Args:
        values: Metric of the variant, one per seed.
        reference: Metric of the baseline, for the same seeds in the same order.
        level: Probability that such an interval is meant to cover the true mean difference.

    Returns:
        The difference by itself: `p_adjusted` is `p`. `holm` corrects those of several variants.

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
    error = statistics.stdev(differences) / math.sqrt(n)
    margin = float(student_t.ppf(0.5 + level / 2, n - 1)) * error
    # Equal differences say nothing of how much they vary: on a small test set, where a metric has
    # few values, they come about by chance. Rounding may keep them from being quite equal.
    equal = error <= 1e-12 * max(map(abs, (*values, *reference)))
    p = math.nan if equal else 2 * float(student_t.sf(abs(mean) / error, n - 1))
    return PairedDifference(
        mean, mean - margin, mean + margin, *bootstrap_interval(differences, level), p, p
    )


def bootstrap_interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean: quantiles of the means of resamples with replacement.

    Args:
        differences: One per seed.
        level: How much of the resamples' means the interval holds.
    """
    values, n = np.asarray(differences, dtype=float), len(differences)
    if n <= _ENUMERATED:
        chosen = np.indices((n,) * n).reshape(n, -1)
    else:
        chosen = np.random.default_rng(0).integers(n, size=(n, _DRAWN))
    outside = (1 - level) / 2
    low, high = np.quantile(
        values[chosen].mean(axis=0), [outside, 1 - outside], method="inverted_cdf"
    )
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: the chance of a single false find among all stays below the level.

    The smallest of `m` values is multiplied by `m`, the next by `m - 1` and so on, none becomes
    smaller than the one before it, and none larger than 1. NaN is no test: it stays and does not
    count.

    Source: Holm (1979), A simple sequentially rejective multiple test procedure.
    """
    adjusted = list(p_values)
    tested = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    largest = 0.0
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = largest
    return adjusted


def verdict(difference: PairedDifference, mode: Literal["max", "min"]) -> Verdict:
    """Whether the corrected p value is below 0.05, and on which side of zero the mean is then."""
    if math.isnan(difference.low):
        return "one seed, no interval"
    if not difference.p_adjusted < SIGNIFICANT:  # NaN where all differences are equal
        return "no difference shown"
    return "better" if (difference.mean > 0) == (mode == "max") else "worse"


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation; NaN for a single value."""
    return statistics.stdev(values) if len(values) > 1 else math.nan
