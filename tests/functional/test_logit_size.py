"""Spectral decoupling and the z-loss, against loops and their gradients in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_aux.functional import spectral_decoupling, z_loss


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_spectral_decoupling_is_half_the_mean_squared_norm() -> None:
    z = drawn(6, 4)
    by_hand = sum(float(each) ** 2 for row in z for each in row) / 2 / 6
    assert spectral_decoupling(z).item() == pytest.approx(by_hand)
    by_hand = sum((float(each) - 0.3) ** 2 for row in z for each in row) / 2 / 6
    assert spectral_decoupling(z, 0.3).item() == pytest.approx(by_hand)


def test_offset_per_class_on_one_margin_is_the_papers_form_for_two_classes() -> None:
    margin, y = drawn(7, 1), torch.tensor([0, 1, 1, 0, 0, 1, -100])
    gamma = (0.44, 2.5)
    by_hand = sum((float(margin[i, 0]) - gamma[int(y[i])]) ** 2 for i in range(6)) / 2 / 7
    assert spectral_decoupling(margin, gamma, y).item() == pytest.approx(by_hand)


def test_offset_per_class_needs_class_indices() -> None:
    with pytest.raises(ValueError, match="needs a target"):
        spectral_decoupling(drawn(3, 1), (0.0, 1.0))
    with pytest.raises(ValueError, match="not probabilities"):
        spectral_decoupling(drawn(3, 2), (0.0, 1.0), torch.rand(3, 2))
    with pytest.raises(ValueError, match="2 offsets for 3 classes"):
        spectral_decoupling(drawn(3, 3), (0.0, 1.0), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="class 2"):
        spectral_decoupling(drawn(3, 1), (0.0, 1.0), torch.tensor([0, 1, 2]))


def test_gradient_of_the_z_loss_is_twice_log_z_times_softmax() -> None:
    z = drawn(5, 7).requires_grad_()
    z_loss(z).backward()
    log_z = z.detach().exp().sum(1, keepdim=True).log()
    torch.testing.assert_close(z.grad, 2 * log_z * z.detach().softmax(1) / 5)


def test_z_loss_of_large_logits_in_half_precision_is_finite() -> None:
    z = torch.full((2, 3), 1e4, dtype=torch.bfloat16, requires_grad=True)
    loss = z_loss(z)
    loss.backward()
    expected = (z[0, 0].item() + math.log(3)) ** 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_masked_positions_of_a_sequence_count_zero() -> None:
    z, mask = drawn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    kept = z[mask.bool()]
    assert z_loss(z, mask).item() == pytest.approx(float((kept.exp().sum(1).log() ** 2).sum()) / 6)
