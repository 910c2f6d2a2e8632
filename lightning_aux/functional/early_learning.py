"""Early-learning regularisation (ELR): a term that holds on to what was learnt before the noise.

Liu, Niles-Weed, Razavian and Fernandez-Granda 2020, "Early-Learning Regularization Prevents
Memorization of Noisy Labels", arXiv:2007.00151, and the authors' code (`elr_loss` in
`ELR/model/loss.py`, repository shengliu66/ELR). The equation numbers are those of arXiv version 2,
taken from a transcription of it; the code was read itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .examples import checked_classes
from .precision import at_least_float32
from .softmax import softmax

# The authors' code clamps p, so that the logarithm stays away from 0 however sure the model is.
_SMALLEST = 1e-4


@torch.no_grad()
def early_learning_target(target: Tensor, logits: Tensor, momentum: float) -> Tensor:
    """Temporal ensembling of the predictions: t ← β·t + (1 − β)·p (eq. 9).

    p = softmax(logits), clamped to [1e-4, 1 − 1e-4] and divided by its sum as in the authors' code.

    Args:
        target: t of these examples, `(batch, classes)`, zeros before their first visit.
        logits: `(batch, classes)`; no gradient.
        momentum: β, 0 ≤ β < 1.

    Returns:
        The new target; a new tensor in the dtype of `target`.

    Raises:
        ValueError: for different shapes or a momentum outside [0, 1).
    """
    _check(target, logits)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, not {momentum}")
    p = _clamped_probabilities(logits)
    p = p / p.sum(-1, keepdim=True)
    return (momentum * at_least_float32(target) + (1 - momentum) * p).to(target.dtype)


def early_learning_regularization(
    logits: Tensor, target: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Mean over the batch of log(1 − Σ_c p_c t_c), the second term of eq. 6 without its λ.

    p is clamped to [1e-4, 1 − 1e-4] as in the authors' code: no gradient reaches a clamped class.
    Elsewhere the gradient with respect to the logits is that of Lemma 2 (eq. 7 and 8). The authors
    update the target with the same predictions first and use the new one here.

    Args:
        logits: `(batch, classes)`, differentiated.
        target: t, `(batch, classes)`; detached.
        mask: `(batch,)`, bool or weights; None keeps all. The sum is divided by all examples.

    Returns:
        A scalar, at most 0: float64 for float64 logits, else float32.

    Raises:
        ValueError: for different shapes or an empty batch.
    """
    _check(target, logits)
    p = _clamped_probabilities(logits)
    agreement = (p * at_least_float32(target.detach())).sum(-1)
    held = (1 - agreement).log()
    return (held if mask is None else held * mask).mean()


def _clamped_probabilities(logits: Tensor) -> Tensor:
    return softmax(at_least_float32(logits), -1).clamp(_SMALLEST, 1 - _SMALLEST)


def _check(target: Tensor, logits: Tensor) -> None:
    if target.shape != logits.shape:
        raise ValueError(
            f"target {tuple(target.shape)} and logits {tuple(logits.shape)} must have one shape, "
            "(batch, classes)"
        )
    checked_classes(logits, None, -1)
