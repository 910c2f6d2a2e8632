"""What another target in the place of the one would change in the cross entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import mean_over_examples
from .examples import checked_classes, labelled
from .precision import at_least_float32
from .soft_cross_entropy import log_likelihood

__all__ = ["target_change"]


def target_change(
    logits: Tensor, old: Tensor, new: Tensor, mask: Tensor | None = None, dim: int = -1
) -> Tensor:
    """What the cross entropy gains when `new` takes the place of `old`: Σ_c (y_c − y′_c) log q_c.

    Added with weight α to the cross entropy with `old`, it gives that with
    ``(1 − α) · old + α · new``, whatever else is in the loss. An example without an old or without
    a new label counts 0.

    Args:
        logits: z, `(batch, …, classes)`, differentiated.
        old: y: class indices in the shape of the examples (−100: no label), or probabilities in
            the shape of the logits; no gradient.
        new: y′, likewise.
        mask: the shape of the examples, bool or weights; None keeps all. The sum is divided by the
            number of ALL examples.
        dim: class dimension.

    Returns:
        A scalar of either sign: float64 for float64 logits, else float32.

    Raises:
        ValueError: for no examples, a missing dimension, or a target or mask of another shape.
    """
    dim = checked_classes(logits, mask, dim)
    old, counted = labelled(logits, old, mask, dim)
    new, counted = labelled(logits, new, counted, dim)
    with torch.no_grad():
        change = _added(_added(None, new, logits, dim, -1.0), old, logits, dim, 1.0)

    return mean_over_examples(logits, change, counted, dim, log_likelihood(dim))


def _added(onto: Tensor | None, target: Tensor, logits: Tensor, dim: int, sign: float) -> Tensor:
    """Plus or minus the target in the shape of the logits, in float32 at least.

    It is added to `onto`, which is written to, or stands for itself.
    """
    if target.is_floating_point():
        if onto is not None:
            return onto.add_(target, alpha=sign)
        wide = at_least_float32(target)
        return sign * target if wide is target else wide.mul_(sign)
    if onto is None:
        onto = torch.zeros_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
    return onto.scatter_(dim, target.unsqueeze(dim), sign, reduce="add")
