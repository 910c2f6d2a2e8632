"""The cross entropy with targets that are probabilities instead of class indices."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import Measure, excludes, mean_over_examples
from .examples import checked_classes
from .softmax import log_softmax


def soft_cross_entropy(
    logits: Tensor, probabilities: Tensor, mask: Tensor | None = None, dim: int = -1
) -> Tensor:
    """Mean over examples of −Σ_c p_c log q_c with q = softmax(logits).

    The targets are taken as they are: they may be smoothed, mixed or weighted, and a p that does
    not sum to 1 gives the sum that it says. Memory as in `kl_divergence`.

    Args:
        logits: `(batch, …, classes)`, differentiated.
        probabilities: p, of the same shape; detached.
        mask: the shape of the examples, bool or 0/1 weights; what it leaves out counts 0, and the
            mean is still over all examples.
        dim: class dimension.

    Returns:
        A scalar in nats: float64 for float64 logits, else float32. A class with p = 0 contributes
        0, whatever its logit.

    Raises:
        ValueError: for different shapes, no examples, a class dimension that the logits do not
            have, or a mask that does not have the shape of the examples.
    """
    if logits.shape != probabilities.shape:
        raise ValueError(
            "logits and probabilities must have the same shape, but are "
            f"{tuple(logits.shape)} and {tuple(probabilities.shape)}"
        )
    dim = checked_classes(logits, mask, dim)

    measure = log_likelihood(dim, -1.0)
    return mean_over_examples(logits, probabilities, mask, dim, measure)


def log_likelihood(dim: int, sign: float = 1.0) -> Measure:
    """Plus or minus Σ_c y_c log q_c, the second tensor being y, of any numbers."""

    def values(logits: Tensor, y: Tensor) -> Tensor:
        log_q = log_softmax(logits, dim)
        return sign * (y * torch.where(y == 0, 0, log_q)).sum(dim)

    def slopes(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        log_q = log_softmax(logits, dim)
        return torch.where(y == 0, 0, log_q).mul_(y), slope_(log_q, y)

    def quick(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        if excludes(logits):
            return None
        log_q = log_softmax(logits, dim)
        return log_q * y, slope_(log_q, y)

    def slope_(log_q: Tensor, y: Tensor) -> Tensor:
        return log_q.exp_().mul_(y.sum(dim, keepdim=True)).sub_(y)

    return Measure(values, slopes, sign, -sign, quick)
