"""Votes: against probabilities counted and averaged by hand."""

from __future__ import annotations

import pytest
import torch

from lightning_aux.functional import kl_divergence, majority_vote, mean_vote


def softmax(z: torch.Tensor, dim: int) -> torch.Tensor:
    return z.exp() / z.exp().sum(dim, keepdim=True)


@pytest.mark.parametrize(("shape", "dim"), [((5, 4), -1), ((5, 4), 1), ((2, 3, 6), 1)])
def test_the_mean_vote_has_the_mean_of_the_probabilities(shape, dim):
    logits = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    expected = sum(softmax(each, dim) for each in logits) / 3
    assert torch.allclose(softmax(mean_vote(logits, dim), dim), expected, atol=1e-12)


def test_the_majority_vote_has_the_share_of_votes():
    votes = [[0, 2], [0, 1], [1, 1]]  # three predictions for two examples
    logits = [torch.nn.functional.one_hot(torch.tensor(each), 3).float() * 5 for each in votes]
    expected = torch.tensor([[2 / 3, 1 / 3, 0.0], [0.0, 2 / 3, 1 / 3]])
    assert torch.allclose(softmax(majority_vote(logits), 1), expected, atol=1e-6)


def test_a_class_without_votes_adds_nothing_to_a_divergence():
    logits = [torch.tensor([[5.0, 0.0]]), torch.tensor([[4.0, 1.0]])]
    student = torch.tensor([[1.0, 2.0]], requires_grad=True)
    divergence = kl_divergence(student, majority_vote(logits))
    expected = -torch.log_softmax(student, 1)[0, 0]
    assert torch.allclose(divergence, expected, atol=1e-6)


def test_half_precision_votes_are_counted_in_float32():
    logits = [torch.full((1, 2), 1e4, dtype=torch.bfloat16) for _ in range(3)]
    assert mean_vote(logits).dtype == torch.float32
    assert torch.allclose(mean_vote(logits).exp(), torch.full((1, 2), 0.5))


def test_predictions_that_cannot_vote_are_refused():
    with pytest.raises(ValueError, match="no predictions"):
        mean_vote([])
    with pytest.raises(ValueError, match=r"\(2, 3\), \(2, 4\)"):
        majority_vote([torch.zeros(2, 3), torch.zeros(2, 4)])
