"""Softmax in another layout is the softmax."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_aux.functional import softmax as module

BOTH = [(module.softmax, torch.softmax), (module.log_softmax, torch.log_softmax)]


@pytest.fixture(autouse=True)
def wide_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with vectors of 64 bytes, and worth it for few numbers."""
    monkeypatch.setattr(module, "_VECTOR", 64)
    monkeypatch.setattr(module, "_WORTH", 1)


def numbers(*shape: int) -> Tensor:
    found = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (5 * found).requires_grad_()


@pytest.mark.parametrize(
    ("shape", "dim"), [((9, 5), -1), ((9, 5), 0), ((4, 3, 7), -1), ((4, 3, 7), 1), ((5,), 0)]
)
@pytest.mark.parametrize(("ours", "native"), BOTH)
def test_values_and_two_derivatives_are_those_of_torch(
    ours: Callable[..., Tensor], native: Callable[..., Tensor], shape: tuple[int, ...], dim: int
) -> None:
    logits, direction = numbers(*shape), numbers(*shape).detach().flip(0)
    found = []
    for each in (ours, native):
        result = each(logits, dim)
        (first,) = torch.autograd.grad((result * direction).sum(), logits, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), logits)
        found.append((result, first, second))
    assert found[0][0].shape == logits.shape
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("ours", "native"), BOTH)
def test_numbers_that_are_large_excluded_or_none(
    ours: Callable[..., Tensor], native: Callable[..., Tensor]
) -> None:
    logits = torch.tensor([[1e4, -1e4, 0], [-math.inf, 1, 2], [math.nan, 1, 2], [3, 3, 3]])
    torch.testing.assert_close(ours(logits, -1), native(logits, -1), equal_nan=True)


def test_ten_classes_are_computed_side_by_side_and_many_as_torch_does() -> None:
    assert module.softmax(numbers(8, 7).detach(), -1).stride() == (1, 8)
    assert module.softmax(numbers(8, 8).detach(), -1).stride() == (8, 1)  # a whole vector
    assert module.softmax(numbers(8, 15).detach().float(), -1).stride() == (1, 8)


def test_the_logits_may_be_overwritten_afterwards() -> None:
    leaf = numbers(6, 5)
    logits = leaf * 1.0
    result = module.log_softmax(logits, -1)
    logits.zero_()
    (found,) = torch.autograd.grad(result[:, 0].sum(), leaf)
    expected = torch.autograd.grad(torch.log_softmax(leaf, -1)[:, 0].sum(), leaf)[0]
    torch.testing.assert_close(found, expected)
