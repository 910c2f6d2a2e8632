"""Generations of kernel ridge regression: the closed form against a search, and the limit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_aux.functional import optimal_target_weight


def kernel(x: Tensor, y: Tensor) -> Tensor:
    return torch.exp(-4 * (x[:, None] - y[None]) ** 2)


@pytest.fixture
def fitted():
    x = torch.linspace(0, 3, 20, dtype=torch.float64)
    noise = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y = torch.sin(2 * x) + 0.3 * noise
    held_out = torch.linspace(0.05, 2.95, 40, dtype=torch.float64)
    gram = kernel(x, x)

    def fit(targets: Tensor, strength: float, at: Tensor) -> Tensor:
        ridge = torch.linalg.solve(gram + strength * torch.eye(20, dtype=torch.float64), targets)
        return kernel(at, x) @ ridge

    return x, y, held_out, torch.sin(2 * held_out), fit


def test_the_weight_is_the_one_that_a_search_finds(fitted):
    x, y, held_out, truth, fit = fitted
    taught = fit(y, 0.5, x)
    g1, g0 = fit(y, 0.5, held_out), fit(taught, 0.5, held_out)
    found = float(optimal_target_weight(truth, g1, g0))

    def error(alpha: float) -> float:
        mixed = fit(alpha * y + (1 - alpha) * taught, 0.5, held_out)
        return float((mixed - truth).square().sum())

    grid = [found + step / 1000 for step in range(-500, 501)]
    assert min(grid, key=error) == pytest.approx(found, abs=1e-9)
    assert error(found) < min(error(found - 0.01), error(found + 0.01))


def test_endless_generations_are_ridge_regression_with_a_larger_strength(fitted):
    x, y, held_out, _, fit = fitted
    alpha, strength = 0.3, 0.2
    taught = y
    for _ in range(200):
        taught = fit(alpha * y + (1 - alpha) * taught, strength, x)
    limit = fit(alpha * y + (1 - alpha) * taught, strength, held_out)
    assert torch.allclose(limit, fit(y, strength / alpha, held_out), atol=1e-8)


def test_what_has_no_answer_is_refused():
    with pytest.raises(ValueError, match="predict the same"):
        optimal_target_weight(torch.ones(3), torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="shapes differ"):
        optimal_target_weight(torch.ones(3), torch.zeros(3), torch.zeros(3, 1))
