"""The cross entropy with probabilities is that of torch, averaged over all examples."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_aux.functional import entropy, kl_divergence, soft_cross_entropy


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return both[0].requires_grad_(), both[1].softmax(-1)


def test_it_is_the_cross_entropy_of_torch() -> None:
    logits, p = pair(6, 5)
    result, expected = soft_cross_entropy(logits, p), F.cross_entropy(logits, p)
    torch.testing.assert_close(result, expected)
    (gradient,) = torch.autograd.grad(result, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


def test_indices_are_probabilities_of_one() -> None:
    logits, _ = pair(2, 6, 5)
    labels = torch.tensor([0, 4, 2, 1, 1, 3])
    expected = F.cross_entropy(logits[0], labels)
    torch.testing.assert_close(soft_cross_entropy(logits[0], F.one_hot(labels, 5)), expected)


def test_it_is_the_divergence_and_the_entropy_of_the_targets() -> None:
    logits, p = pair(2, 3, 5)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    teacher = p.log()
    expected = kl_divergence(logits, teacher, mask=mask) + entropy(teacher, mask=mask)
    torch.testing.assert_close(soft_cross_entropy(logits, p, mask), expected)
    moved = soft_cross_entropy(logits.movedim(-1, 1), p.movedim(-1, 1), mask, dim=1)
    torch.testing.assert_close(moved, expected)


def test_targets_are_taken_as_they_are() -> None:
    logits, p = pair(4, 5)
    weight = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    result = soft_cross_entropy(logits, weight[:, None] * p)
    each = torch.stack([F.cross_entropy(z, target) for z, target in zip(logits, p, strict=True)])
    torch.testing.assert_close(result, (weight * each).mean())
    assert torch.autograd.gradcheck(lambda z: soft_cross_entropy(z, weight[:, None] * p), logits)
    assert torch.autograd.gradgradcheck(lambda z: soft_cross_entropy(z, p), logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_huge_and_excluded_logits(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4, -math.inf]], dtype=dtype, requires_grad=True)
    result = soft_cross_entropy(logits, torch.tensor([[0.25, 0.75, 0.0]]))
    result.backward()
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(0.75 * 2 * logits[0, 0].item(), rel=1e-6)
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.75, -0.75, 0.0]]


def test_bad_input_is_named() -> None:
    zeros = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"same shape, but are \(2, 3\) and \(2,\)"):
        soft_cross_entropy(zeros, torch.zeros(2))
    with pytest.raises(ValueError, match=r"mask must have the shape of the examples \(2,\)"):
        soft_cross_entropy(zeros, zeros, torch.ones(3))
    with pytest.raises(ValueError, match="no class dimension dim=2"):
        soft_cross_entropy(zeros, zeros, dim=2)
    with pytest.raises(ValueError, match="no examples"):
        soft_cross_entropy(zeros[:0], zeros[:0])
