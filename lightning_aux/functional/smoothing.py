"""Label smoothing as a term of the logits, and its repair that needs no labels."""

from __future__ import annotations

from torch import Tensor

from .examples import expected, labelled, mean, prepared

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
    target, counted = labelled(logits, target, mask, dim)
    z = prepared(logits, mask, dim)
    return mean(expected(z, target, dim) - z.mean(dim), counted)


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
    z = prepared(logits, mask, dim)
    return mean(z.max(dim).values - z.mean(dim), mask)
