"""What several predictions of one batch agree on, as logits, so that any divergence can follow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .precision import at_least_float32

_NEVER = -1e4  # logarithm of the probability of a class without a vote; finite, so 0 · log 0 is 0


def mean_vote(logits: Sequence[Tensor], dim: int = -1) -> Tensor:
    """Logits whose softmax is the mean of the probabilities: log (1/K) Σ_k softmax(z_k).

    Args:
        logits: K tensors of one shape.
        dim: class dimension.

    Returns:
        Of the same shape, in float32 (float64 for float64).

    Raises:
        ValueError: for an empty list or shapes that differ.
    """
    stacked = _stacked(logits)
    dim = dim % logits[0].ndim
    log_probabilities = stacked.log_softmax(dim + 1)
    return log_probabilities.logsumexp(0) - math.log(len(logits))


def majority_vote(logits: Sequence[Tensor], dim: int = -1) -> Tensor:
    """Logits whose softmax is the share of votes of each class, every prediction having one.

    Args:
        logits: K tensors of one shape; each votes for its largest entry.
        dim: class dimension.

    Returns:
        Of the same shape, in float32 (float64 for float64): log(votes / K), and -1e4 for a class
        without votes.

    Raises:
        ValueError: for an empty list or shapes that differ.
    """
    stacked = _stacked(logits)
    dim = dim % logits[0].ndim
    votes = torch.zeros_like(stacked).scatter_(dim + 1, stacked.argmax(dim + 1, keepdim=True), 1.0)
    return votes.mean(0).log().clamp(min=_NEVER)


def _stacked(logits: Sequence[Tensor]) -> Tensor:
    if not logits:
        raise ValueError("no predictions to take a vote of")
    if len({each.shape for each in logits}) > 1:
        shapes = ", ".join(str(tuple(each.shape)) for each in logits)
        raise ValueError(f"predictions of different shapes cannot vote: {shapes}")
    return torch.stack([at_least_float32(each) for each in logits])
