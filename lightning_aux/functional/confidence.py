"""How sure a model may be: an entropy bonus, a limit, and trust in its own predictions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .blocks import Measure, mean_over_examples
from .divergences import entropy
from .examples import checked_classes, expected, labelled, prepared
from .softmax import log_softmax, softmax

__all__ = ["confidence_penalty", "confidences", "confident_labels", "coverage_loss"]


def confidence_penalty(
    logits: Tensor, threshold: float | None = None, mask: Tensor | None = None, dim: int = -1
) -> Tensor:
    """Mean over examples of −H(q), or of max(0, Γ − H(q)), with q = softmax(z) and H in nats.

    Pereyra et al. 2017, "Regularizing Neural Networks by Penalizing Confident Output
    Distributions", arXiv:1701.06548: the negative entropy, and the hinge that leaves predictions
    alone whose entropy is above Γ already. −H(q) is the divergence from the uniform distribution
    up to the constant log K.

    Args:
        logits: z, `(batch, …, classes)`, differentiated.
        threshold: Γ in nats, at most log K to have an effect everywhere; None for −H.
        mask: the shape of the examples, bool or weights; None keeps all. The sum is divided by the
            number of ALL examples.
        dim: class dimension.

    Returns:
        A scalar in nats: float64 for float64 logits, else float32.

    Raises:
        ValueError: for no examples, a missing dimension, or a mask of another shape.
    """
    if threshold is None:
        return -entropy(logits, mask=mask, dim=dim)
    dim = checked_classes(logits, mask, dim)

    def values(z: Tensor, _: Tensor) -> Tensor:
        log_q = log_softmax(z, dim)
        q = log_q.exp()
        return (threshold + (q * torch.where(q > 0, log_q, 0)).sum(dim)).clamp_min(0)

    def slopes(z: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        log_q = log_softmax(z, dim)
        q = log_q.exp()
        terms = torch.where(q > 0, log_q, 0).mul_(q)
        negative = terms.sum(dim, keepdim=True)
        below = -negative < threshold
        slope = terms.sub_(q.mul_(negative)).mul_(below)
        return (threshold + negative).clamp_min_(0), slope

    return mean_over_examples(logits, logits, mask, dim, Measure(values, slopes))


def coverage_loss(
    logits: Tensor,
    target: Tensor,
    samples: float,
    mask: Tensor | None = None,
    dim: int = -1,
    sequence: bool = False,
    difference: bool = False,
) -> Tensor:
    """Mean of −log(1 − (1 − p)^N): how likely none of N independent answers is right.

    Direct coverage optimisation (Chen et al. 2025, "Rethinking Fine-Tuning when Scaling Test-Time
    Compute: Limiting Confidence Improves Mathematical Reasoning", arXiv:2502.07154), p being the
    probability of the right answer. Its gradient is that of the cross entropy times
    ``N p (1 − p)^(N−1) / (1 − (1 − p)^N)``: 1 for N = 1 or small p, near 0 once p is well above
    1/N. Computed from log p, so that nothing underflows.

    Args:
        logits: `(batch, …, classes)`, differentiated.
        target: class indices in the shape of the examples (−100: no label), or probabilities in
            the shape of the logits, whose cross entropy then is −log p.
        samples: N, at least 1.
        mask: the shape of the examples, bool or weights; None keeps all.
        dim: class dimension.
        sequence: p is of a whole answer, the product over all dimensions but the first; the mean
            is over the batch. Otherwise over all examples.
        difference: how much more (or less) it is than the cross entropy −log p.

    Returns:
        A scalar, without `difference` at least 0: float64 for float64 logits, else float32.

    Raises:
        ValueError: N below 1; no examples, a missing dimension, a target or mask of another shape.
    """
    if not samples >= 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    dim = checked_classes(logits, mask, dim)
    target, counted = labelled(logits, target, mask, dim)

    def of(log_p: Tensor) -> Tensor:
        return _none_of(log_p, samples) + log_p if difference else _none_of(log_p, samples)

    if sequence:
        if logits.ndim < 3:
            raise ValueError(
                f"sequence=True needs logits with positions, (batch, length, classes), not "
                f"{tuple(logits.shape)}"
            )
        log_p = expected(log_softmax(prepared(logits, counted, dim), dim), target, dim)
        if counted is not None:
            log_p = log_p * counted
        return of(log_p.flatten(1).sum(1)).mean()

    def values(z: Tensor, y: Tensor) -> Tensor:
        return of(expected(log_softmax(z, dim), y, dim))

    def quick(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        q, place = softmax(z, dim), y.unsqueeze(dim)
        p = q.gather(dim, place)
        if p.amin().item() < 1e-30:
            return None
        some, steep = _some_right_and_slope(p, samples)
        if difference:
            some, steep = some.sub_(p.log()), steep.sub_(1 / samples)
        return some, q.scatter_(dim, place, -1.0, reduce="add").mul_(steep)

    def slopes(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        log_q = log_softmax(z, dim)
        log_p = expected(log_q, y, dim).unsqueeze(dim)
        some, steep = _some_right_and_slope(log_p.exp(), samples)
        tiny = log_p < -40  # where 1 − (1 − p)^N is N·p in every digit
        some = torch.where(tiny, log_p + math.log(samples), some)
        steep = steep.masked_fill_(tiny, 1 / samples)
        if difference:
            some, steep = some.sub_(log_p), steep.sub_(1 / samples)
        q = log_q.exp_()
        if y.is_floating_point():
            return some, q.mul_(y.sum(dim, keepdim=True)).sub_(y).mul_(steep)
        return some, q.scatter_(dim, y.unsqueeze(dim), -1.0, reduce="add").mul_(steep)

    known = None if target.is_floating_point() else quick  # which class the p is of
    measure = Measure(values, slopes, -1.0, samples, known)
    return mean_over_examples(logits, target, counted, dim, measure)


def _none_of(log_p: Tensor, samples: float) -> Tensor:
    """−log(1 − (1 − p)^N)."""
    tiny = log_p < -40  # where (1 − p)^N is 1 − N·p in every digit
    # Above it p stays a step below 1, so that log(1 − p) and its slope are finite.
    p = torch.where(tiny, -1.0, log_p).exp().clamp_max(1 - torch.finfo(log_p.dtype).eps)
    certain = -torch.log(-torch.expm1(samples * torch.log1p(-p)))
    return torch.where(tiny, -log_p - math.log(samples), certain)


def _some_right_and_slope(p: Tensor, samples: float) -> tuple[Tensor, Tensor]:
    """log(1 − (1 − p)^N), and p·(1 − p)^(N−1) / (1 − (1 − p)^N), its slope by log p over N.

    Without autograd. Not to be believed for a p of 0.
    """
    log_wrong = p.neg().clamp_min_(torch.finfo(p.dtype).eps - 1).log1p_()
    log_none = log_wrong * samples
    some_right = log_none.expm1().neg_()
    steep = log_none.sub_(log_wrong).exp_().mul_(p).div_(some_right)
    return some_right.log_(), steep


@torch.no_grad()
def confidences(
    logits: Tensor, target: Tensor, mask: Tensor | None = None, dim: int = -1
) -> Tensor:
    """The rows that `confident_labels` compares: probabilities, then the weak labels.

    Args:
        logits: `(batch, …, classes)`.
        target: class indices in the shape of the examples (−100: no label), or probabilities in
            the shape of the logits.
        mask: the shape of the examples, bool or weights; None keeps all.
        dim: class dimension.

    Returns:
        `(examples, 2 · classes)`: float64 for float64 logits, else float32. The second half is a
        row of zeros for an example without a label, or outside of the mask.

    Raises:
        ValueError: for no examples, fewer than two classes, a missing dimension, or a target of
            another shape.
    """
    target, counted = labelled(logits, target, mask, dim)
    classes = logits.shape[dim]
    if classes < 2:
        raise ValueError(f"the logits {tuple(logits.shape)} have {classes} class(es), not two")
    q = softmax(prepared(logits, counted, dim), dim).movedim(dim, -1).reshape(-1, classes)
    if target.is_floating_point():
        y = target.movedim(dim, -1).reshape(-1, classes).to(q.dtype)
    else:
        y = torch.zeros_like(q).scatter_(1, target.reshape(-1, 1), 1)
    if counted is not None:
        y = y * (counted != 0).reshape(-1, 1)
    return torch.cat([q, y], 1)


@torch.no_grad()
def confident_labels(own: Tensor, batch: Tensor | None = None) -> Tensor:
    """The model's own hard predictions, in which each class is as frequent as in the weak labels.

    Burns et al. 2023, "Weak-to-Strong Generalization: Eliciting Strong Capabilities With Weak
    Supervision", arXiv:2312.09390. With two classes, as in the authors' code, class 1 is predicted
    for as many examples as the weak labels have of it, those with the highest probability (the
    paper takes one half of the batch). More classes, which neither treats, are weighted by
    share in the labels / mean prediction before the largest is taken, the alignment of
    distributions of Berthelot et al. 2020, "ReMixMatch", arXiv:1911.09785, section 3.1.

    Args:
        own: rows of `confidences`, `(examples, 2 · classes)`.
        batch: the rows of the whole batch, from which shares are taken; default: `own`.

    Returns:
        Class indices, int64 `(examples,)`.
    """
    rows = own if batch is None else batch
    classes = own.shape[1] // 2
    q, y = rows[:, :classes], rows[:, classes:]
    labels = y.sum(1)
    if classes == 2:
        ordered, order = q[:, 1].masked_fill(labels == 0, -1).sort(descending=True)
        wanted = y[:, 1].sum().round()
        last = ((labels[order] > 0).cumsum(0) >= wanted).int().argmax(0, keepdim=True)
        threshold = torch.where(wanted < 1, torch.inf, ordered.gather(0, last))
        return (own[:, 1] >= threshold).long()
    predicted = (q * labels.unsqueeze(1)).sum(0)
    return (own[:, :classes] * y.sum(0) / predicted.clamp_min(1e-12)).argmax(1)
