"""Intervals and p values are those of other implementations; the verdict follows from them."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import bootstrap, ttest_rel

from lightning_aux.comparison.statistics import (
    PairedDifference,
    bootstrap_interval,
    holm,
    paired_difference,
    spread,
    verdict,
)
from tests.comparison.coverage import coverage


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


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_p_is_that_of_the_paired_t_test(seeds):
    rng = np.random.default_rng(seeds)
    reference = rng.normal(size=seeds)
    values = reference + rng.normal(0.3, 0.5, size=seeds)
    found = paired_difference(values.tolist(), reference.tolist())
    assert found.p == pytest.approx(ttest_rel(values, reference).pvalue)
    assert found.p_adjusted == found.p, "one variant needs no correction"


@pytest.mark.parametrize("difference", [0.0, 0.25, 0.1])
def test_equal_differences_are_no_evidence(difference):
    """Accuracies on a small test set have few values: equal differences come about by chance."""
    found = paired_difference(
        [0.7 + difference, 0.5 + difference, 0.6 + difference], [0.7, 0.5, 0.6]
    )
    assert math.isnan(found.p)
    assert found.low == pytest.approx(difference)
    assert found.boot_high == pytest.approx(difference)
    assert verdict(found, "max") == "no difference shown"


def test_a_metric_of_few_values_is_seldom_called_different_by_chance():
    """Three seeds of pure noise on 50 test samples, ten variants: at most about 5 % of tables."""
    rng = np.random.default_rng(0)
    false = 0
    for _ in range(300):
        scores = rng.binomial(50, 0.8, size=(11, 3)) / 50
        found = [paired_difference(row.tolist(), scores[0].tolist()) for row in scores[1:]]
        false += any(p < 0.05 for p in holm([each.p for each in found]))
    assert false / 300 < 0.08


@pytest.mark.parametrize(("n", "level"), [(2, 0.95), (3, 0.95), (3, 0.9), (4, 0.8)])
def test_bootstrap_of_few_seeds_is_that_of_all_resamples(n, level):
    """All of them, written out; the quantiles by counting."""
    differences = np.random.default_rng(n).normal(size=n).tolist()
    means = sorted(sum(resample) / n for resample in itertools.product(differences, repeat=n))
    outside = (1 - level) / 2
    low = next(m for i, m in enumerate(means, 1) if i / len(means) >= outside)
    high = next(m for i, m in enumerate(means, 1) if i / len(means) >= 1 - outside)
    assert bootstrap_interval(differences, level) == pytest.approx((low, high))


def test_bootstrap_of_many_seeds_is_that_of_scipy():
    differences = np.random.default_rng(0).exponential(size=12)
    expected = bootstrap(
        (differences,), np.mean, method="percentile", n_resamples=50_000, rng=1
    ).confidence_interval
    found = bootstrap_interval(differences.tolist())
    assert found == pytest.approx((expected.low, expected.high), abs=0.02)
    assert bootstrap_interval(differences.tolist()) == found


def by_hand(p_values):
    """Holm's procedure as it is written: reject step by step, at every level that is asked."""
    adjusted = dict.fromkeys(range(len(p_values)), 1.0)
    order = sorted(adjusted, key=lambda i: p_values[i])
    for level in np.linspace(0.999, 0.001, 999):
        for step, i in enumerate(order):
            if p_values[i] > level / (len(order) - step):
                break
            adjusted[i] = level
    return [adjusted[i] for i in range(len(p_values))]


@pytest.mark.parametrize(
    "p_values", [[0.01], [0.04, 0.01, 0.03, 0.005], [0.02, 0.02, 0.9], [0.5, 0.4]]
)
def test_holm_rejects_at_a_level_what_the_procedure_rejects(p_values):
    assert holm(p_values) == pytest.approx(by_hand(p_values), abs=0.0011)


def test_holm_does_not_count_what_is_no_test():
    found = holm([math.nan, 0.02, 0.03])
    assert math.isnan(found[0])
    assert found[1:] == holm([0.02, 0.03]) == [0.04, 0.04]


def test_the_t_interval_covers_what_it_promises_and_the_bootstrap_less():
    student, bootstrap_share = coverage("normal", 3, 1500)
    assert student == pytest.approx(0.95, abs=0.02)
    assert bootstrap_share == pytest.approx(0.75, abs=0.04), "1 - 2 / 2^3: the range of three"


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
