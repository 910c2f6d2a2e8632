"""The divergence of dual-head distillation, which compares logits one by one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .examples import mean, prepared

__all__ = ["sigmoid_divergence"]


def sigmoid_divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """T² · mean over examples of Σ_c KL(½ ‖ σ((s_c − t_c)/T)), between two coins per class.

    ``BinaryKL-Norm`` of Yang et al. 2024, arXiv:2411.08937, in the closed form
    ``Σ_c log cosh((s_c − t_c)/(2T))``; the gradient is ``T/2 · tanh((s_c − t_c)/(2T))``. The
    authors' code clamps σ to [1e-8, 1 − 1e-8], which the closed form does not need.

    Args:
        student: logits s, `(batch, …, classes)`, differentiated.
        teacher: logits t of the same shape; detached.
        temperature: T, above 0.
        mask: the shape of the examples, bool or weights; None keeps all. The sum is divided by the
            number of ALL examples.
        dim: class dimension.

    Returns:
        A scalar in nats, at least 0: float64 for float64 logits, else float32.

    Raises:
        ValueError: for different shapes, no examples, a temperature that is not above 0, a missing
            dimension, or a mask of another shape.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            "student and teacher logits must have the same shape, but are "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be finite and above 0, not {temperature}")
    s, t = prepared(student, mask, dim), prepared(teacher.detach(), mask, dim)
    half = (s - t) / (2 * temperature)
    # log cosh x = |x| + log(1 + exp(−2|x|)) − log 2, which no x makes overflow.
    size = half.abs()
    log_cosh = size + torch.nn.functional.softplus(-2 * size) - math.log(2)
    return temperature**2 * mean(log_cosh.sum(dim), mask)
