"""What grows, or vanishes, before the training of a transformer becomes unstable.

Wortsman et al. 2023, "Small-scale proxies for large-scale Transformer training instabilities",
arXiv:2309.14322.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .examples import shape_of_examples
from .precision import at_least_float32
from .shards import local, sums_over_parts

__all__ = ["learning_rate_sensitivity", "logit_size", "max_attention_logit", "root_mean_squares"]

BLOCK = 2**24
"""Numbers that are computed at a time."""


def logit_size(logits: Tensor, mask: Tensor | None = None, dim: int = -1) -> tuple[Tensor, Tensor]:
    """The largest logit, and the mean over examples of log Z = log Σ_k exp z_k.

    Args:
        logits: z, `(batch, …, classes)`; they are brought to float32 in blocks.
        mask: the shape of the examples; those that it leaves out do not count at all.
        dim: class dimension.

    Returns:
        Two scalars, −inf and NaN for no examples.

    Raises:
        ValueError: for a missing dimension, or a mask of another shape.
    """
    examples = shape_of_examples(logits, dim)
    if mask is not None and list(mask.shape) != examples:
        raise ValueError(f"mask must have the shape {tuple(examples)}, not {tuple(mask.shape)}")
    z = logits.movedim(dim, -1).flatten(0, -2)
    z = z if mask is None else z[mask.flatten() != 0]
    top = z.new_full((), -math.inf, dtype=torch.float32)
    total = torch.zeros_like(top)
    for rows in torch.split(z, max(1, BLOCK // z.shape[-1])):
        if rows.numel():
            rows = at_least_float32(rows)
            top = torch.maximum(top, rows.amax())
            total = total + rows.logsumexp(-1).sum()
    return top, total / len(z)


def max_attention_logit(queries: Tensor, keys: Tensor, causal: bool = False) -> Tensor:
    """Returns max q·k/√d over all heads and pairs; the scores exist in blocks only.

    Args:
        queries: ``(…, heads, length, d)``.
        keys: ``(…, key heads, key length, d)``; each serves as many consecutive heads of the
            queries as there are more of those.
        causal: whether a query sees the keys up to its own position only; the last query is at
            the position of the last key.

    Returns:
        A float32 scalar (float64 for float64 queries).
    """
    scale = 1 / math.sqrt(queries.shape[-1])
    *batch, heads, length, width = queries.shape
    groups = keys.shape[-3]
    queries = queries.reshape(*batch, groups, heads // groups, length, width)
    turned = at_least_float32(keys).unsqueeze(-3).transpose(-1, -2)
    seen = turned.shape[-1]
    rows = max(1, BLOCK // max(1, math.prod(batch) * heads * seen))
    position = torch.arange(seen, device=keys.device)
    top = turned.new_full((), -math.inf)
    for begin in range(0, length, rows):
        with torch.autocast(queries.device.type, enabled=False):
            scores = at_least_float32(queries[..., begin : begin + rows, :]) @ turned
        if causal:
            own = torch.arange(begin, begin + scores.shape[-2], device=keys.device)
            hidden = position > (own + seen - length).unsqueeze(-1)
            scores = scores.masked_fill(hidden, -math.inf)
        top = torch.maximum(top, scores.amax())
    return top * scale


def root_mean_squares(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The root of the mean square of each tensor, and of all their elements together.

    Args:
        tensors: n of them, of any floating dtype. Of sharded ones each process computes its
            part, and the sums meet in one collective.

    Returns:
        ``(n,)`` and a scalar, float32; a tensor has 0 only if all its elements are 0.
    """
    parts = [local(each) for each in tensors]
    wide = torch.float32 if parts[0].device.type == "mps" else torch.float64
    held = [place for place, part in enumerate(parts) if part.numel()]
    norms = torch.zeros(len(parts), dtype=wide, device=parts[0].device)
    if held:
        full = [parts[place] for place in held]
        euclidean = torch._foreach_norm(full, 2, dtype=torch.float32)
        largest = torch._foreach_norm(full, math.inf)  # is above 0 where squares underflow
        both = [torch.stack([each.to(norms) for each in kind]) for kind in (euclidean, largest)]
        norms[held] = torch.maximum(*both)
    squares = sums_over_parts(norms.square(), tensors)
    sizes = squares.new_tensor([each.numel() for each in tensors])
    return (squares / sizes).sqrt().float(), (squares.sum() / sizes.sum()).sqrt().float()


def learning_rate_sensitivity(final_losses: Sequence[float], best: float, initial: float) -> float:
    """E over learning rates η of min(ℓ(η), ℓ₀) − ℓ*, section 2.2: 0 if every rate were best.

    Args:
        final_losses: ℓ(η) of runs with learning rates that are evenly spaced on a logarithmic
            scale; NaN and inf stand for runs that diverged.
        best: ℓ*, the loss at the best learning rate.
        initial: ℓ₀, the loss at initialisation, above which no run counts.

    Raises:
        ValueError: for no losses.
    """
    if not final_losses:
        raise ValueError("no final losses to take the mean of")
    capped = [min(each, initial) if math.isfinite(each) else initial for each in final_losses]
    return sum(capped) / len(capped) - best
