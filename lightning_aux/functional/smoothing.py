"""Label smoothing as a term of the logits, and its repair that needs no labels."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import Measure, mean_over_examples
from .examples import checked_classes, expected, labelled

__all__ = ["label_smoothing", "max_suppression"]


def label_smoothing(
    logits: Tensor, target: Tensor, mask: Tensor | None = None, dim: int = -1
) -> Tensor:
    """What label smoothing adds to the cross entropy: mean over examples of z_y − mean_k z_k.

    ``CE(smoothed) = CE + ε · (z_y − mean_k z_k)`` for targets ``(1 − ε)·onehot(y) + ε/K`` (Zhou et
    al. 2025, "MaxSup: Overcoming Representation Collapse in Label Smoothing", arXiv:2502.15798,
    theorem 3.3, equation 4), so that ``ε`` is the weight of this term.

    Args:
        logits: z, `(batch, …, classes)`, differentiated.
        target: class indices in the shape of the examples (−100: no label), or probabilities in
            the shape of the logits.
        mask: the shape of the examples, bool or weights; None keeps all. The sum is divided by the
            number of ALL examples.
        dim: class dimension.

    Returns:
        A scalar, of either sign: float64 for float64 logits, else float32.

    Raises:
        ValueError: for no examples, a missing dimension, or a target or mask of another shape.
    """
    dim = checked_classes(logits, mask, dim)
    target, counted = labelled(logits, target, mask, dim)

    def values(z: Tensor, y: Tensor) -> Tensor:
        return expected(z, y, dim) - z.mean(dim)

    def slope(z: Tensor, y: Tensor) -> Tensor:
        if y.is_floating_point():
            return y - 1 / z.shape[dim]
        return _one_above(z, y.unsqueeze(dim), dim)

    def slopes(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return values(z, y), slope(z, y)

    def native(z: Tensor, y: Tensor) -> Tensor:
        return (z * slope(z, y)).sum()

    return mean_over_examples(logits, target, counted, dim, Measure(values, slopes, native=native))


def _one_above(logits: Tensor, place: Tensor, dim: int) -> Tensor:
    """1 − 1/K in one class of each example, −1/K in the others."""
    others = -1 / logits.shape[dim]
    return torch.full_like(logits, others).scatter_(dim, place, 1 + others)


def max_suppression(logits: Tensor, mask: Tensor | None = None, dim: int = -1) -> Tensor:
    """MaxSup: mean over examples of max_k z_k − mean_k z_k.

    Zhou et al. 2025, arXiv:2502.15798, equations 6 to 8. It is the term of `label_smoothing`
    wherever the prediction is right; where it is wrong it lowers the wrong class instead of the
    right one. Its gradient (equation 9) is 1 − 1/K at the largest logit and −1/K elsewhere; of
    several largest ones the first has it.

    Args:
        logits: z, `(batch, …, classes)`, differentiated.
        mask: as in `label_smoothing`.
        dim: class dimension.

    Returns:
        A scalar, at least 0: float64 for float64 logits, else float32.

    Raises:
        ValueError: for no examples, a missing dimension, or a mask of another shape.
    """
    dim = checked_classes(logits, mask, dim)

    def values(z: Tensor, _: Tensor) -> Tensor:
        return z.max(dim).values - z.mean(dim)

    def slopes(z: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        largest, place = z.max(dim, keepdim=True)
        return largest - z.mean(dim, keepdim=True), _one_above(z, place, dim)

    def native(z: Tensor, _: Tensor) -> Tensor:
        return (z * _one_above(z, z.argmax(dim, keepdim=True), dim)).sum()

    return mean_over_examples(logits, logits, mask, dim, Measure(values, slopes, native=native))
