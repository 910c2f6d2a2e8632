"""What the monitor of instability computes, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_aux.functional import instability, learning_rate_sensitivity, max_attention_logit
from lightning_aux.functional.instability import logit_size, root_mean_squares


@pytest.fixture(params=[2**24, 40], ids=["at once", "in blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(instability, "BLOCK", request.param)
    return int(request.param)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize(("length", "seen"), [(6, 6), (2, 6)])
@pytest.mark.usefixtures("block")
def test_the_largest_attention_logit_is_that_of_every_pair(
    causal: bool, key_heads: int, length: int, seen: int
) -> None:
    random = torch.Generator().manual_seed(key_heads + length)
    q = torch.randn(3, 4, length, 5, generator=random, dtype=torch.double)
    k = torch.randn(3, key_heads, seen, 5, generator=random, dtype=torch.double)
    pairs = [
        float(q[b, h, i] @ k[b, h // (4 // key_heads), j]) / math.sqrt(5)
        for b in range(3)
        for h in range(4)
        for i in range(length)
        for j in range(seen)
        if not causal or j <= i + seen - length
    ]
    assert float(max_attention_logit(q, k, causal)) == pytest.approx(max(pairs), rel=1e-12)


def test_attention_logits_are_float32_also_under_autocast() -> None:
    q, k = torch.full((1, 1, 1, 4), 1.001), torch.full((1, 1, 1, 4), 1.001)
    with torch.autocast("cpu", torch.bfloat16):
        assert float(max_attention_logit(q, k)) == pytest.approx(2 * 1.001**2, rel=1e-6)


@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.usefixtures("block")
def test_the_size_of_logits_is_their_maximum_and_the_mean_of_log_z(dim: int) -> None:
    z = torch.randn(5, 7, 3).bfloat16() * 20
    mask = torch.rand(z.select(dim, 0).shape) > 0.3
    rows = z.float().movedim(dim, -1)[mask].tolist()
    top, log_z = logit_size(z, mask, dim)
    assert float(top) == max(max(row) for row in rows)
    by_hand = [max(row) + math.log(sum(math.exp(x - max(row)) for x in row)) for row in rows]
    assert float(log_z) == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-6)


def test_root_mean_squares_are_of_each_tensor_and_of_all_elements() -> None:
    tensors = [torch.tensor([3.0, 4.0]), torch.zeros(3, 2), torch.tensor([1.0]).bfloat16()]
    each, together = root_mean_squares(tensors)
    assert each.tolist() == pytest.approx([math.sqrt(12.5), 0.0, 1.0])
    assert float(together) == pytest.approx(math.sqrt(26 / 9))


def test_a_gradient_whose_square_underflows_is_not_taken_for_none() -> None:
    each, _ = root_mean_squares([torch.full((16,), 1e-30), torch.zeros(0)])
    assert 1e-31 < float(each[0]) <= 1e-30
    assert each[1].isnan()


def test_learning_rate_sensitivity_caps_each_loss_at_that_of_the_beginning() -> None:
    """Wortsman et al. 2023, section 2.2; a run that diverged counts as one that learnt nothing."""
    losses = [2.0, 1.5, 4.0, math.nan, math.inf]
    assert learning_rate_sensitivity(losses, best=1.5, initial=3.0) == pytest.approx(
        (2.0 + 1.5 + 3.0 + 3.0 + 3.0) / 5 - 1.5
    )
    assert learning_rate_sensitivity([1.0, 1.0], best=1.0, initial=3.0) == 0.0
    with pytest.raises(ValueError, match="no final losses"):
        learning_rate_sensitivity([], 1.0, 3.0)
