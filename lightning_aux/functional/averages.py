"""Exponential moving averages of lists of tensors, updated in place, and their decay."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def ema_update_(shadow: list[Tensor], live: list[Tensor], decay: float) -> None:
    """Moves an average towards the live values in place: φ ← decay·φ + (1 − decay)·θ.

    Computed as φ + (1 − decay)·(θ − φ) by one fused operation per device and dtype. In bfloat16 a
    decay of 0.999 moves almost nothing, so keep the shadow in float32.

    Args:
        shadow: φ, changed in place. Integer and bool tensors (counters) take the live value.
        live: θ, of the same shapes; a dtype that differs from the shadow's is cast to it.
        decay: between 0 (copy) and 1 (keep).

    Raises:
        ValueError: for lists of different lengths or a decay outside [0, 1].
    """
    if len(shadow) != len(live):
        raise ValueError(f"shadow has {len(shadow)} tensors and live has {len(live)}")
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must lie between 0 and 1, not {decay}")
    # The usual case first: looking at every device costs as much as the update of small tensors.
    dtypes = {average.dtype for average in shadow}
    if dtypes == {value.dtype for value in live} and len(dtypes) == 1 and _averageable(*dtypes):
        torch._foreach_lerp_(shadow, live, 1 - decay)
        return
    groups: defaultdict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]]
    groups = defaultdict(lambda: ([], []))
    for average, value in zip(shadow, live, strict=True):
        averages, values = groups[average.device, average.dtype, value.dtype]
        averages.append(average)
        values.append(value)
    for (_, dtype, live_dtype), (averages, values) in groups.items():
        if not _averageable(dtype):
            torch._foreach_copy_(averages, values)
            continue
        if live_dtype != dtype:  # one operation casts them all
            cast = [torch.empty_like(average) for average in averages]
            torch._foreach_copy_(cast, values)
            values = cast
        torch._foreach_lerp_(averages, values, 1 - decay)


def _averageable(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def ema_decay(decay: float, n_updates: int, warmup: bool) -> float:
    """Returns the decay of the next update.

    With warm-up it is min(decay, (1 + n)/(10 + n)), so that the average forgets its initial value
    at first and is slow later (the rule of TensorFlow's `ExponentialMovingAverage` with
    `num_updates`).

    Args:
        decay: the decay in the long run.
        n_updates: n, the number of updates already made.
        warmup: whether to start faster.
    """
    return min(decay, (1 + n_updates) / (10 + n_updates)) if warmup else decay
