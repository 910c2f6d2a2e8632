"""Early-learning regularisation equals the paper's equations and its published gradient."""

import math

import numpy as np
import pytest
import torch

from lightning_aux.functional import early_learning_regularization, early_learning_target


def batch(size: int = 8, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(size, classes, generator=generator, dtype=torch.float64)
    target = torch.rand(size, classes, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), target / target.sum(-1, keepdim=True)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_the_term_is_the_logarithm_of_equation_6() -> None:
    logits, target = batch()
    p = softmax(logits.detach().numpy())
    expected = np.mean([math.log(1 - p[i] @ target.numpy()[i]) for i in range(8)])
    assert early_learning_regularization(logits, target).item() == pytest.approx(expected)


def test_the_gradient_is_that_of_lemma_2() -> None:
    logits, target = batch()
    early_learning_regularization(logits, target).backward()
    p, t = softmax(logits.detach().numpy()), target.numpy()
    g = np.zeros_like(p)
    for i in range(8):
        for c in range(5):
            inner = sum((t[i, k] - t[i, c]) * p[i, k] for k in range(5))
            g[i, c] = p[i, c] / (1 - p[i] @ t[i]) * inner
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), g / 8, rtol=1e-12)


def test_the_gradient_strengthens_what_the_target_says() -> None:
    logits = torch.zeros(1, 3, requires_grad=True)
    early_learning_regularization(logits, torch.tensor([[0.8, 0.1, 0.1]])).backward()
    assert logits.grad is not None
    assert logits.grad[0, 0] < 0  # descent raises the logit of the target class
    assert (logits.grad[0, 1:] > 0).all()


def test_gradients_are_those_of_finite_differences_and_spare_the_target() -> None:
    logits, target = batch(3)
    target.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: early_learning_regularization(z, target), (logits,))
    early_learning_regularization(logits, target).backward()
    assert target.grad is None


def test_the_target_is_the_temporal_ensemble_of_equation_9() -> None:
    generator = torch.Generator().manual_seed(0)
    visits = torch.randn(4, 6, 3, generator=generator, dtype=torch.float64)
    target = torch.zeros(6, 3, dtype=torch.float64)
    for logits in visits:
        target = early_learning_target(target, logits, momentum=0.7)
    p = softmax(visits.numpy())
    expected = sum(0.3 * 0.7 ** (3 - k) * p[k] for k in range(4))
    np.testing.assert_allclose(target.numpy(), expected, rtol=1e-12)


def test_sure_predictions_are_clamped_and_normalised_as_by_the_authors() -> None:
    logits = torch.tensor([[100.0, 0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    clamped = np.clip([1.0, 0, 0, 0], 1e-4, 1 - 1e-4)
    target = early_learning_target(torch.zeros(1, 4), logits, momentum=0.0)
    np.testing.assert_allclose(target[0].numpy(), clamped / clamped.sum(), rtol=1e-6)
    assert not target.requires_grad
    term = early_learning_regularization(logits, torch.tensor([[1.0, 0, 0, 0]]))
    assert term.item() == pytest.approx(math.log(1e-4))
    assert (torch.autograd.grad(term, logits)[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_huge_half_precision_logits_stay_finite(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    target = early_learning_target(torch.zeros(1, 3), logits, momentum=0.7)
    term = early_learning_regularization(logits, target)
    term.backward()
    assert target.dtype == term.dtype == torch.float32
    assert term.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"target \(2, 3\) and logits \(2, 4\)"):
        early_learning_regularization(torch.zeros(2, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"target \(2, 3\) and logits \(2, 4\)"):
        early_learning_target(torch.zeros(2, 3), torch.zeros(2, 4), 0.7)
    with pytest.raises(ValueError, match="below 1, not 1"):
        early_learning_target(torch.zeros(2, 3), torch.zeros(2, 3), 1.0)
    with pytest.raises(ValueError, match="no examples"):
        early_learning_regularization(torch.zeros(0, 3), torch.zeros(0, 3))
