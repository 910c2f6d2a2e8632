"""The change of the target of a cross entropy, against torch's own."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lightning_aux.functional import target_change


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def test_the_mean_is_over_all_examples_and_those_without_a_label_count_zero() -> None:
    z, y, p = drawn(4, 3), torch.tensor([0, -100, 1, 2]), drawn(4, 3, seed=1).softmax(1)
    kept = torch.tensor([0, 2, 3])
    torch.testing.assert_close(
        target_change(z, y, p), 3 / 4 * target_change(z[kept], y[kept], p[kept])
    )


def test_with_weight_alpha_the_change_gives_the_mixed_target() -> None:
    z, y, p = drawn(6, 4), torch.randint(4, (6,)), drawn(6, 4, seed=1).softmax(1)
    mixed = 0.7 * F.one_hot(y, 4) + 0.3 * p
    changed = F.cross_entropy(z, y) + 0.3 * target_change(z, y, p)
    torch.testing.assert_close(changed, F.cross_entropy(z, mixed))


def test_an_excluded_class_costs_nothing_where_the_target_does_not_want_it() -> None:
    z = torch.tensor([[1.0, 2.0, -torch.inf]], requires_grad=True)
    change = target_change(z, torch.tensor([0]), torch.tensor([[0.5, 0.5, 0.0]]))
    change.backward()
    torch.testing.assert_close(change, torch.tensor(-0.5))
    assert z.grad is not None
    assert z.grad.isfinite().all()
