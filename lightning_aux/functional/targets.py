"""What another target in the place of the one would change in the cross entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from .examples import expected, labelled, mean, prepared

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
    old, counted = labelled(logits, old.detach(), mask, dim)
    new, counted = labelled(logits, new.detach(), counted, dim)
    log_q = torch.log_softmax(prepared(logits, mask, dim), dim)
    return mean(expected(log_q, old, dim) - expected(log_q, new, dim), counted)
