"""Feature agreement and teacher dropping, against numpy loops from the paper's description."""

from __future__ import annotations

import numpy
import pytest
import torch

from lightning_aux.functional import feature_agreement, kept_teachers


def by_hand(s: numpy.ndarray, t: numpy.ndarray) -> float:
    cosine = s @ t / numpy.linalg.norm(s) / numpy.linalg.norm(t)
    away = numpy.abs(s - t)
    huber = numpy.where(away < 1, 0.5 * away**2, away - 0.5).mean()
    return float((1 - cosine) / 2 + huber / 2)


@pytest.mark.parametrize("shape", [(5, 7), (5, 3, 7)])
def test_agreement_is_half_cosine_half_smooth_l1(shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(0)
    s, t = (torch.randn(shape, generator=random, dtype=torch.float64) * 2 for _ in "st")
    expected = [
        numpy.mean([by_hand(a, b) for a, b in zip(x.reshape(-1, 7), y.reshape(-1, 7), strict=True)])
        for x, y in zip(s.numpy(), t.numpy(), strict=True)
    ]
    assert feature_agreement(s, t).tolist() == pytest.approx(expected)


def test_the_worst_learnt_teacher_is_always_kept_and_the_others_by_their_draw() -> None:
    losses = torch.tensor([[3.0, 1.0, 2.0], [0.1, 0.2, 0.3]])
    draws = torch.tensor([[0.0, 0.49, 0.5], [0.9, 0.1, 0.0]])
    assert kept_teachers(losses, draws, 0.5).tolist() == [[1, 0, 1], [1, 0, 1]]
    assert kept_teachers(losses, torch.zeros(2, 3), 0.5).tolist() == [[1, 0, 0], [0, 0, 1]]
    assert kept_teachers(losses, torch.zeros(2, 3), 0.0).sum() == 6


def test_features_of_different_shapes_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        feature_agreement(torch.zeros(2, 3), torch.zeros(2, 4))
