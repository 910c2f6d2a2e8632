"""The interval is the paired t test's, and the verdict follows from where it lies."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_rel

from lightning_aux.comparison.statistics import PairedDifference, paired_difference, spread, verdict


@pytest.mark.parametrize("seeds", [2, 3, 10])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_interval_is_that_of_the_paired_t_test(seeds, level):
    rng = np.random.default_rng(seeds)
    reference = rng.normal(size=seeds)
    values = reference + rng.normal(0.3, 0.5, size=seeds)
    expected = ttest_rel(values, reference).confidence_interval(level)

    difference = paired_difference(values.tolist(), reference.tolist(), level)

    assert difference.mean == pytest.approx((values - reference).mean())
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))


def test_spread_that_all_variants_share_cancels():
    reference = [0.2, 0.5, 0.9]
    values = [0.31, 0.60, 1.01]

    difference = paired_difference(values, reference)

    assert difference.high - difference.low < 0.04 < spread(values)


def test_one_seed_has_a_difference_but_no_interval():
    difference = paired_difference([0.7], [0.5])

    assert difference.mean == pytest.approx(0.2)
    assert math.isnan(difference.low)
    assert verdict(difference, "max") == "one seed, no interval"


@pytest.mark.parametrize(
    ("mean", "p", "mode", "expected"),
    [
        (0.2, 0.049, "max", "better"),
        (0.2, 0.049, "min", "worse"),
        (-0.2, 0.049, "max", "worse"),
        (-0.2, 0.049, "min", "better"),
        (0.2, 0.05, "max", "no difference shown"),
        (0.0, 1.0, "min", "no difference shown"),
    ],
)
def test_verdict_is_by_the_corrected_p_value(mean, p, mode, expected):
    found = PairedDifference(mean, mean - 1, mean + 1, p=0.001, p_adjusted=p)
    assert verdict(found, mode) == expected


def test_values_without_a_partner_are_refused():
    with pytest.raises(ValueError, match="got 2 and 3"):
        paired_difference([0.1, 0.2], [0.1, 0.2, 0.3])
