"""Divergences between the predictions of a student and a teacher, and the entropy of one of them.

All are means over examples. An example is one position of the logits without the class dimension:
`(batch, classes)` has `batch` examples, `(batch, length, classes)` has `batch * length`.

A mask sets the contribution of the examples it leaves out to zero, and the sum is still divided by
the number of ALL examples. The number of examples is the same on every process and in every
accumulated batch, the number of masked ones is not: only so does the mean of the gradients of two
half batches equal the gradient of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .precision import at_least_float32


def kl_divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """Forward Kullback-Leibler divergence T²·KL(p‖q), the distillation loss.

    T² · mean over examples of Σ_c p_c log(p_c / q_c) with p = softmax(teacher/T) and
    q = softmax(student/T). The factor T² keeps the size of the gradient when T changes (Hinton,
    Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531,
    section 2 and eq. 2 to 4).

    Args:
        student: logits `(batch, …, classes)`, differentiated.
        teacher: logits of the same shape; detached.
        temperature: T, above 0.
        mask: the shape of the examples, bool or 0/1 weights; None keeps all. See the module for
            what it divides by.
        dim: class dimension.

    Returns:
        A scalar in nats: float64 for float64 logits, else float32. Logits may be −inf: a class of
        probability 0 under p contributes 0, one that only q excludes makes the divergence infinite.

    Raises:
        ValueError: for different shapes, no examples, a temperature that is not above 0, a class
            dimension that the logits do not have, or a mask that does not have the shape of the
            examples.
    """
    log_q, log_p = _pair(student, teacher, temperature, mask, dim)
    return temperature**2 * _mean(_relative_entropy(log_p, log_q, dim), mask)


def reverse_kl_divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """Reverse Kullback-Leibler divergence T²·KL(q‖p), which seeks modes instead of covering them.

    T² · mean over examples of Σ_c q_c log(q_c / p_c); p, q, arguments, result and errors as in
    `kl_divergence`.
    """
    log_q, log_p = _pair(student, teacher, temperature, mask, dim)
    return temperature**2 * _mean(_relative_entropy(log_q, log_p, dim), mask)


def jensen_shannon_divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """Jensen-Shannon divergence T²·(½KL(p‖m) + ½KL(q‖m)) with m = (p + q)/2.

    It is symmetric and at most T²·log 2, also where one side excludes a class (Lin 1991,
    "Divergence Measures Based on the Shannon Entropy", IEEE Trans. Inf. Theory 37(1)).
    p, q, arguments, result and errors as in `kl_divergence`.
    """
    log_q, log_p = _pair(student, teacher, temperature, mask, dim)
    # The gradient of logaddexp at (−inf, −inf) is NaN, so classes that both exclude step aside.
    excluded = torch.isneginf(log_p) & torch.isneginf(log_q)
    log_m = torch.logaddexp(log_p.masked_fill(excluded, 0), log_q.masked_fill(excluded, 0))
    log_m = log_m - math.log(2)
    to_middle = _relative_entropy(log_p, log_m, dim) + _relative_entropy(log_q, log_m, dim)
    return temperature**2 / 2 * _mean(to_middle, mask)


def entropy(
    logits: Tensor, temperature: float = 1.0, mask: Tensor | None = None, dim: int = -1
) -> Tensor:
    """Entropy −Σ_c q_c log q_c of q = softmax(logits/T), mean over examples, in nats.

    Args, result and errors as in `kl_divergence`; there is no factor T².
    """
    log_q = _log_softmax(logits, temperature, mask, dim)
    return _mean(-_expectation(log_q, log_q, dim), mask)


def shape_of_examples(logits: Tensor, dim: int) -> list[int]:
    """The shape of `logits` without their class dimension, which index targets and masks have.

    Raises:
        ValueError: when they have no dimension `dim`.
    """
    if not -logits.ndim <= dim < logits.ndim:
        raise ValueError(f"logits of shape {tuple(logits.shape)} have no class dimension dim={dim}")
    shape = list(logits.shape)
    del shape[dim]
    return shape


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "kl": kl_divergence,
    "reverse_kl": reverse_kl_divergence,
    "js": jensen_shannon_divergence,
}


def _pair(
    student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None, dim: int
) -> tuple[Tensor, Tensor]:
    """Returns log q (student) and log p (teacher, detached)."""
    if student.shape != teacher.shape:
        raise ValueError(
            "student and teacher logits must have the same shape, but are "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    log_q = _log_softmax(student, temperature, mask, dim)
    return log_q, _log_softmax(teacher.detach(), temperature, mask, dim)


def _log_softmax(logits: Tensor, temperature: float, mask: Tensor | None, dim: int) -> Tensor:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be finite and above 0, not {temperature}")
    examples = shape_of_examples(logits, dim)
    if math.prod(examples) == 0:
        raise ValueError(f"no examples to average over: the logits are {tuple(logits.shape)}")
    if mask is not None:
        if list(mask.shape) != examples:
            raise ValueError(
                f"mask must have the shape of the examples {tuple(examples)} (the logits "
                f"{tuple(logits.shape)} without dimension {dim}), not {tuple(mask.shape)}"
            )
        # Padding may hold anything, NaN included, and 0·NaN is NaN, in the gradient too.
        logits = logits.masked_fill((mask == 0).unsqueeze(dim), 0)
    return torch.log_softmax(at_least_float32(logits) / temperature, dim)


def _expectation(log_p: Tensor, values: Tensor, dim: int) -> Tensor:
    """Returns Σ_c p_c·values_c with 0·(±inf) = 0, in the gradient too."""
    p = log_p.exp()
    return (p * torch.where(p > 0, values, 0)).sum(dim)


def _relative_entropy(log_p: Tensor, log_q: Tensor, dim: int) -> Tensor:
    return _expectation(log_p, log_p - log_q, dim)


def _mean(per_example: Tensor, mask: Tensor | None) -> Tensor:
    return (per_example if mask is None else per_example * mask.to(per_example.dtype)).mean()
