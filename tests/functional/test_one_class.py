"""One logit has no softmax: formulas of one say so, where they would be 0 without a gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_aux import functional as F

LABELS = torch.zeros(4, dtype=torch.long)
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "label_smoothing": lambda z: F.label_smoothing(z, LABELS),
    "max_suppression": lambda z: F.max_suppression(z, LABELS),
    "confidence_penalty": F.confidence_penalty,
    "confidence_penalty_below": lambda z: F.confidence_penalty(z, 0.5),
    "coverage_loss": lambda z: F.coverage_loss(z, LABELS, 4),
    "early_learning_regularization": lambda z: F.early_learning_regularization(z, z.detach()),
    "entropy": F.entropy,
    "soft_cross_entropy": lambda z: F.soft_cross_entropy(z, torch.ones(4, 1)),
    "target_change": lambda z: F.target_change(z, LABELS, torch.ones(4, 1)),
    "kl_divergence": lambda z: F.kl_divergence(z, z.detach() + 1),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_one_class_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="one class"):
        FORMULAS[name](torch.randn(4, 1, requires_grad=True))


@pytest.mark.parametrize("formula", [F.z_loss, F.spectral_decoupling])
def test_formulas_of_the_logits_themselves_do_not_mind(formula: Callable[[Tensor], Tensor]) -> None:
    z = torch.randn(4, 1, requires_grad=True)
    formula(z).backward()
    assert z.grad is not None
    assert z.grad.count_nonzero() == 4
