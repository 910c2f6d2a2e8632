"""The divergence of dual-head distillation, which compares logits one by one."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import softplus

from .blocks import Measure, mean_over_examples
from .examples import checked_dim

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
    dim = checked_dim(student, mask, dim)

    def half(s: Tensor, t: Tensor) -> Tensor:
        return (s - t) / (2 * temperature)

    def values(s: Tensor, t: Tensor) -> Tensor:
        # log cosh x = |x| + log(1 + exp(−2|x|)) − log 2, which no x makes overflow.
        size = half(s, t).abs()
        return temperature**2 * (size + softplus(-2 * size) - math.log(2)).sum(dim)

    def slopes(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return values(s, t), half(s, t).tanh_().mul_(temperature / 2)

    return mean_over_examples(student, teacher, mask, dim, Measure(values, slopes))
