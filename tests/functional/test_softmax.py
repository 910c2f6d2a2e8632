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
    return 5 * found


@pytest.mark.parametrize(
    ("shape", "dim"), [((9, 5), -1), ((9, 5), 0), ((4, 3, 7), -1), ((4, 3, 7), 1), ((5,), 0)]
)
@pytest.mark.parametrize(("ours", "native"), BOTH)
def test_values_are_those_of_torch(
    ours: Callable[..., Tensor], native: Callable[..., Tensor], shape: tuple[int, ...], dim: int
) -> None:
    logits = numbers(*shape)
    torch.testing.assert_close(ours(logits, dim), native(logits, dim), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("ours", "native"), BOTH)
def test_numbers_that_are_large_excluded_or_none(
    ours: Callable[..., Tensor], native: Callable[..., Tensor]
) -> None:
    logits = torch.tensor([[1e4, -1e4, 0], [-math.inf, 1, 2], [math.nan, 1, 2], [3, 3, 3]])
    torch.testing.assert_close(ours(logits, -1), native(logits, -1), equal_nan=True)


def test_ten_classes_are_computed_side_by_side_and_many_as_torch_does() -> None:
    assert module.softmax(numbers(8, 7), -1).stride() == (1, 8)
    assert module.softmax(numbers(8, 8), -1).stride() == (8, 1)  # a whole vector
    assert module.softmax(numbers(8, 15).float(), -1).stride() == (1, 8)


def test_a_gradient_has_the_layout_of_the_logits() -> None:
    logits = numbers(8, 7).requires_grad_()
    (gradient,) = torch.autograd.grad(module.log_softmax(logits, -1)[:, 0].sum(), logits)
    assert gradient.stride() == (7, 1)
