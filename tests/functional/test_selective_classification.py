"""Risk and coverage: against loops over orders and thresholds, closed forms and numpy."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from lightning_aux.functional import (
    area_under_risk_coverage,
    coverage_at_risk,
    max_softmax_score,
    normalized_max_logit,
    risk_at_coverage,
    risk_coverage_curve,
)


def risks_in_order(errors: list[int]) -> list[Fraction]:
    """Share of errors among the first k, for k = 1 … n."""
    return [Fraction(sum(errors[:k]), k) for k in range(1, len(errors) + 1)]


def risks_by_all_orders(confidence: list[float], errors: list[int]) -> list[float]:
    """The mean over every order of the examples in which confidence does not increase."""
    n = len(errors)
    orders = [
        order
        for order in itertools.permutations(range(n))
        if all(confidence[a] >= confidence[b] for a, b in itertools.pairwise(order))
    ]
    curves = [risks_in_order([errors[i] for i in order]) for order in orders]
    return [float(sum(curve[k] for curve in curves) / len(curves)) for k in range(n)]


@pytest.mark.parametrize(
    ("confidence", "errors"),
    [
        ([0.9, 0.8, 0.7, 0.6, 0.5], [0, 1, 0, 0, 1]),
        ([0.5, 0.9, 0.9, 0.1, 0.9, 0.5], [1, 0, 1, 0, 0, 1]),
        ([0.3] * 6, [1, 0, 0, 1, 0, 1]),
        ([0.1, 0.2, 0.2, 0.2, 0.3], [0, 0, 0, 1, 1]),
        ([1.0], [1]),
    ],
)
def test_equal_confidences_are_averaged_over_all_their_orders(
    confidence: list[float], errors: list[int]
) -> None:
    expected = risks_by_all_orders(confidence, errors)
    curve = risk_coverage_curve(torch.tensor(confidence), torch.tensor(errors))
    assert curve.tolist() == pytest.approx(expected, abs=1e-12)
    area = area_under_risk_coverage(torch.tensor(confidence), torch.tensor(errors))
    assert float(area) == pytest.approx(sum(expected) / len(expected), abs=1e-12)


def test_the_order_of_the_examples_changes_nothing() -> None:
    random = torch.Generator().manual_seed(0)
    confidence = torch.randint(20, (500,), generator=random).float()
    errors = torch.randint(2, (500,), generator=random)
    curve = risk_coverage_curve(confidence, errors)
    order = torch.randperm(500, generator=random)
    shuffled = risk_coverage_curve(confidence[order], errors[order])
    assert torch.allclose(curve, shuffled, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n", "m"), [(10, 0), (10, 3), (7, 7)])
def test_a_perfect_order_has_the_area_of_the_closed_form(n: int, m: int) -> None:
    """(1/n) Σ_{j=1..m} j/(n − m + j): all errors come last."""
    errors = torch.tensor([0] * (n - m) + [1] * m)
    expected = sum(j / (n - m + j) for j in range(1, m + 1)) / n
    assert float(area_under_risk_coverage(-errors, errors)) == pytest.approx(expected, abs=1e-12)
    assert float(area_under_risk_coverage(-torch.arange(n), errors)) == pytest.approx(expected)


def test_confidence_that_says_nothing_has_the_error_rate_at_every_coverage() -> None:
    errors = torch.tensor([1, 0, 0, 1, 0])
    assert risk_coverage_curve(torch.zeros(5), errors).tolist() == pytest.approx([0.4] * 5)


def test_coverage_and_risk_are_read_off_the_curve() -> None:
    risks = torch.tensor([0.0, 0.0, 1 / 3, 1 / 4, 2 / 5], dtype=torch.float64)
    wanted = {0.0: 0.4, 0.25: 0.8, 0.3: 0.8, 1 / 3: 0.8, 0.4: 1.0, 0.1: 0.4}
    for risk, coverage in wanted.items():
        assert float(coverage_at_risk(risks, risk)) == pytest.approx(coverage)
    assert float(coverage_at_risk(risks + 0.1, 0.05)) == 0.0
    for coverage, risk in {0.4: 0.0, 0.41: 1 / 3, 0.6: 1 / 3, 0.8: 1 / 4, 1.0: 2 / 5}.items():
        assert float(risk_at_coverage(risks, coverage)) == pytest.approx(risk)
    assert float(risk_at_coverage(risks, 0.01)) == 0.0


def test_the_softmax_score_is_the_log_odds_of_the_probability() -> None:
    z = torch.randn(50, 7, dtype=torch.double) * 4
    p = z.softmax(-1).amax(-1)
    assert torch.allclose(max_softmax_score(z), (p / (1 - p)).log(), atol=1e-9)
    moved = max_softmax_score(z.movedim(-1, 0), dim=0)
    assert torch.allclose(moved, max_softmax_score(z), atol=1e-12)


def test_confident_examples_keep_their_order_where_the_probability_is_1() -> None:
    z = torch.tensor([[60.0, 0.0, 1.0], [50.0, 0.0, 1.0], [1e4, 0.0, 1.0]])
    assert torch.equal(z.softmax(-1).amax(-1), torch.ones(3))
    score = max_softmax_score(z)
    assert score.argsort(descending=True).tolist() == [2, 0, 1]
    assert float(score[0]) == pytest.approx(60 - math.log(1 + math.e), rel=1e-6)


def test_half_precision_is_computed_in_float32() -> None:
    z = (torch.randn(20, 5) * 1e4).bfloat16()
    for score in (max_softmax_score(z), normalized_max_logit(z, p=9.0)):
        assert score.dtype == torch.float32
        assert score.isfinite().all()
    assert torch.equal(max_softmax_score(z), max_softmax_score(z.float()))


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 4.0, 9.0])
@pytest.mark.parametrize("centre", [False, True])
def test_the_normalised_maximum_is_the_largest_logit_over_the_norm(p: float, centre: bool) -> None:
    z = torch.randn(30, 6, dtype=torch.double) * 3 + 1

    def by_hand(row: Tensor) -> float:
        values = row.tolist()
        mean = sum(values) / len(values) if centre else 0.0
        values = [each - mean for each in values]
        return max(values) / sum(abs(each) ** p for each in values) ** (1 / p)

    expected = [by_hand(row) for row in z]
    assert normalized_max_logit(z, p, centre).tolist() == pytest.approx(expected, rel=1e-9)


def test_the_normalised_maximum_does_not_know_the_scale_and_centred_not_the_offset() -> None:
    z = torch.randn(30, 6, dtype=torch.double)
    assert torch.allclose(normalized_max_logit(z), normalized_max_logit(1e30 * z))
    assert torch.allclose(
        normalized_max_logit(z, centre=True), normalized_max_logit(z + 5, centre=True)
    )
    assert not torch.allclose(normalized_max_logit(z), normalized_max_logit(z + 5))
    assert float(normalized_max_logit(torch.zeros(1, 3))) == 0.0
    large = normalized_max_logit(torch.tensor([[1e30, -1e30, 0.0]]), p=9.0)  # 1e270 is no float32
    assert float(large) == pytest.approx(2 ** (-1 / 9), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: normalized_max_logit(torch.randn(4, 2), centre=True), "two centred logits"),
        (lambda: normalized_max_logit(torch.randn(4, 3), p=0), "p=0"),
        (lambda: max_softmax_score(torch.randn(4, 1)), "no two classes"),
        (lambda: max_softmax_score(torch.randn(4)[:0], dim=1), "no two classes"),
    ],
)
def test_scores_that_would_say_nothing_are_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_a_confidence_that_is_nan_makes_the_curve_nan_and_not_a_rank() -> None:
    curve = risk_coverage_curve(torch.tensor([0.5, math.nan, 0.1]), torch.tensor([0, 1, 0]))
    assert curve.isnan().all()
