"""The divergence of dual-head distillation, against its definition."""

from __future__ import annotations

import pytest
import torch

from lightning_aux.functional import sigmoid_divergence


def test_it_is_the_divergence_from_a_fair_coin_to_the_sigmoid_of_the_difference() -> None:
    random = torch.Generator().manual_seed(0)
    s, t = (torch.randn(6, 5, generator=random, dtype=torch.float64) * 3 for _ in "st")
    s.requires_grad_()
    tau = 2.0
    sigma = torch.sigmoid((s.detach() - t) / tau)
    by_hand = (0.5 * (0.5 / sigma).log() + 0.5 * (0.5 / (1 - sigma)).log()).sum(1).mean() * tau**2
    loss = sigmoid_divergence(s, t, tau)
    torch.testing.assert_close(loss.detach(), by_hand)
    (slope,) = torch.autograd.grad(loss, s)
    expected = tau / 2 * torch.tanh((s.detach() - t) / (2 * tau)) / 6
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_apart_logits_overflow_nowhere(dtype: torch.dtype) -> None:
    s = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    loss = sigmoid_divergence(s, torch.zeros(1, 3, dtype=dtype))
    loss.backward()
    assert loss.item() == pytest.approx(1e4, rel=1e-2)
    torch.testing.assert_close(s.grad, torch.tensor([[0.5, -0.5, 0.0]], dtype=dtype))


def test_shapes_that_differ_are_an_error() -> None:
    with pytest.raises(ValueError, match="same shape"):
        sigmoid_divergence(torch.zeros(2, 3), torch.zeros(2, 4))
