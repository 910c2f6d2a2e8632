"""What distillation from the features of several teachers is made of."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, smooth_l1_loss

from .precision import at_least_float32

__all__ = ["feature_agreement", "kept_teachers"]


def feature_agreement(student: Tensor, teacher: Tensor) -> Tensor:
    """½ (1 − cos(s, t)) + ½ smooth-L1(s, t) for each example, as UNIC compares features.

    Sariyildiz, Weinzaepfel, Lucas, Larlus & Kalantidis 2024, "UNIC: Universal Classification Models
    via Multi-teacher Distillation", arXiv:2408.05088, with the authors' equal factors, β = 1, and
    the mean over the features in smooth-L1. Of sequences it is the mean over positions.

    Args:
        student: `(batch, features)` or `(batch, length, features)`, differentiated.
        teacher: the same shape; detached.

    Returns:
        `(batch,)`: float64 for float64 features, else float32.

    Raises:
        ValueError: for different shapes, an empty batch, or other than two or three dimensions.
    """
    if student.shape != teacher.shape or student.ndim not in (2, 3):
        raise ValueError(
            f"features must be (batch, features) or (batch, length, features) of one shape, but "
            f"are {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if student.numel() == 0:
        raise ValueError(f"no features to compare: their shape is {tuple(student.shape)}")
    s, t = at_least_float32(student), at_least_float32(teacher.detach())
    distance = 1 - cosine_similarity(s, t, dim=-1) + smooth_l1_loss(s, t, reduction="none").mean(-1)
    return distance.reshape(len(s), -1).mean(1) / 2


@torch.no_grad()
def kept_teachers(losses: Tensor, draws: Tensor, drop: float) -> Tensor:
    """Which teachers count for each example: the one with the largest loss, and some others.

    The teacher dropping of UNIC (arXiv:2408.05088): those that are not worst learnt are left out
    with probability `drop`, each by itself and for each example.

    Args:
        losses: `(batch, teachers)`.
        draws: uniform random numbers in [0, 1) of the same shape.
        drop: probability with which the others are left out.

    Returns:
        0 or 1 in the shape and dtype of `losses`; at least one 1 in each row.
    """
    worst = torch.nn.functional.one_hot(losses.argmax(1), losses.shape[1])
    return torch.maximum((draws >= drop).to(losses.dtype), worst.to(losses.dtype))
