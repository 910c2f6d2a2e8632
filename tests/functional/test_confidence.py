"""Terms about how sure a model is, against closed forms and the entropies of scipy."""

from __future__ import annotations

import math

import numpy
import pytest
import scipy.stats
import torch
from torch.nn import functional as F

from lightning_aux.functional import (
    confidence_penalty,
    confidences,
    confident_labels,
    coverage_loss,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=torch.float64) * 2


def test_confidence_penalty_is_the_negative_entropy() -> None:
    z = drawn(6, 5)
    entropies = [scipy.stats.entropy(row) for row in z.softmax(1).numpy()]
    assert confidence_penalty(z).item() == pytest.approx(-numpy.mean(entropies))
    hinge = numpy.mean([max(0.0, 1.0 - each) for each in entropies])
    assert confidence_penalty(z, threshold=1.0).item() == pytest.approx(hinge)


def test_confidence_penalty_has_the_gradient_in_closed_form() -> None:
    z = drawn(4, 5).requires_grad_()
    confidence_penalty(z).backward()
    p = z.detach().softmax(1)
    entropy = -(p * p.log()).sum(1, keepdim=True)
    torch.testing.assert_close(z.grad, -p * (-p.log() - entropy) / 4)


def test_a_certain_prediction_has_entropy_zero_and_a_finite_gradient() -> None:
    z = torch.tensor([[1e4, 0.0, -torch.inf]], requires_grad=True)
    confidence_penalty(z).backward()
    assert confidence_penalty(z).item() == 0.0
    assert z.grad is not None
    assert z.grad.isfinite().all()


# ------------------------------------------------------------------------------------- coverage
def test_one_sample_is_the_cross_entropy() -> None:
    z, y = drawn(8, 5).requires_grad_(), torch.randint(5, (8,))
    (ours,) = torch.autograd.grad(coverage_loss(z, y, 1), z)
    (theirs,) = torch.autograd.grad(F.cross_entropy(z, y), z)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("samples", [2, 16, 256, 1e4])
def test_value_and_gradient_are_those_of_the_paper(samples: float) -> None:
    z, y = drawn(16, 4).requires_grad_(), torch.randint(4, (16,))
    p = z.detach().softmax(1)[torch.arange(16), y]
    loss = coverage_loss(z, y, samples)
    assert loss.item() == pytest.approx(float((-(1 - (1 - p) ** samples).log()).mean()), rel=1e-6)
    factor = samples * p * (1 - p) ** (samples - 1) / (1 - (1 - p) ** samples)
    onehot = F.one_hot(y, 4)
    expected = factor[:, None] * (z.detach().softmax(1) - onehot) / 16
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], expected, atol=1e-12, rtol=1e-5)


@pytest.mark.parametrize("gap", [20.0, 60.0, 90.0, 500.0, 1e4])
def test_a_tiny_probability_neither_underflows_nor_loses_its_gradient(gap: float) -> None:
    z = torch.tensor([[0.0, gap]], requires_grad=True)
    loss = coverage_loss(z, torch.tensor([0]), 16)
    loss.backward()
    assert loss.item() == pytest.approx(gap - math.log(16), rel=1e-6)
    assert z.grad is not None
    torch.testing.assert_close(z.grad, torch.tensor([[-1.0, 1.0]]))


def test_a_certain_right_answer_costs_nothing_and_has_a_finite_gradient() -> None:
    z = torch.tensor([[1e4, 0.0]], requires_grad=True)
    loss = coverage_loss(z, torch.tensor([0]), 16)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert z.grad is not None
    assert z.grad.abs().max() < 1e-6


def test_of_a_sequence_p_is_the_product_over_its_labelled_positions() -> None:
    z, y = drawn(3, 4, 5), torch.randint(5, (3, 4))
    y[0, 2:] = -100
    log_p = torch.stack(
        [sum(z[i, j].log_softmax(0)[y[i, j]] for j in range(4) if y[i, j] >= 0) for i in range(3)]
    )
    expected = -(1 - (1 - log_p.exp()) ** 8).log().mean()
    torch.testing.assert_close(coverage_loss(z, y, 8, sequence=True), expected)


def test_fewer_than_one_sample_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"0\.5"):
        coverage_loss(drawn(2, 3), torch.zeros(2, dtype=torch.long), 0.5)


# ------------------------------------------------------------------------- the model's own labels
def test_with_two_classes_as_many_are_predicted_as_the_weak_labels_have() -> None:
    z, y = drawn(11, 2), torch.tensor([0, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1])
    found = confident_labels(confidences(z, y))
    p = z.softmax(1)[:, 1]
    expected = torch.zeros(11, dtype=torch.long)
    expected[p.argsort(descending=True)[:4]] = 1
    assert found.tolist() == expected.tolist()


def test_soft_weak_labels_count_with_their_probability() -> None:
    z, soft = drawn(10, 2), torch.full((10, 2), 0.5, dtype=torch.float64)
    assert confident_labels(confidences(z, soft)).sum() == 5


@pytest.mark.parametrize("label", [0, 1])
def test_weak_labels_of_one_class_give_predictions_of_that_class(label: int) -> None:
    rows = confidences(drawn(6, 2), torch.full((6,), label))
    assert confident_labels(rows).tolist() == [label] * 6


def test_examples_without_a_weak_label_do_not_move_the_threshold() -> None:
    z = torch.tensor([[0.0, 9.0], [0.0, 8.0], [0.0, 1.0], [0.0, 0.5]])
    y = torch.tensor([-100, -100, 1, 0])
    assert confident_labels(confidences(z, y))[2:].tolist() == [1, 0]


def test_what_a_mask_leaves_out_is_nowhere_also_where_it_is_not_a_number() -> None:
    for classes in (2, 4):
        z, y = drawn(10, classes), torch.randint(classes, (10,))
        mask = torch.arange(10) < 7
        expected = confident_labels(confidences(z[:7], y[:7])).tolist()
        z[7:], y[7:] = torch.nan, 255
        assert confident_labels(confidences(z, y, mask))[:7].tolist() == expected
        z[7:], y[7:] = torch.nan, -100
        assert confident_labels(confidences(z, y))[:7].tolist() == expected


def test_a_sequence_with_unlabelled_places_that_are_not_a_number_has_a_finite_gradient() -> None:
    z, y = drawn(2, 3, 4), torch.tensor([[0, 1, -100], [2, -100, -100]])
    z[y == -100] = torch.nan
    z.requires_grad_()
    (slope,) = torch.autograd.grad(coverage_loss(z, y, 4, sequence=True), z)
    assert slope.isfinite().all()
    assert slope[y == -100].eq(0).all()


def test_a_sequence_needs_positions() -> None:
    with pytest.raises(ValueError, match="positions"):
        coverage_loss(drawn(2, 3), torch.zeros(2, dtype=torch.long), 4, sequence=True)


def test_parts_of_a_batch_are_labelled_as_the_whole_batch_is() -> None:
    for classes in (2, 5):
        z, y = drawn(12, classes), torch.randint(classes, (12,))
        rows = confidences(z, y)
        halves = [confident_labels(each, rows) for each in (rows[:5], rows[5:])]
        assert torch.cat(halves).tolist() == confident_labels(rows).tolist()


def test_with_more_classes_predictions_are_weighted_by_the_share_in_the_labels() -> None:
    z, y = drawn(30, 4), torch.randint(4, (30,))
    q = z.softmax(1)
    share = torch.bincount(y, minlength=4) / q.sum(0)
    assert confident_labels(confidences(z, y)).tolist() == (q * share).argmax(1).tolist()


def test_one_class_is_an_error() -> None:
    with pytest.raises(ValueError, match="two"):
        confidences(drawn(3, 1), torch.zeros(3, dtype=torch.long))
