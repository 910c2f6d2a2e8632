"""Exponential moving averages of lists of tensors, updated in place, and their decay."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
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
    for averages, values in grouped(shadow, live):
        move_(averages, values, decay)


def grouped(shadow: list[Tensor], live: list[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The pairs of two lists together for each device and dtypes, for `move_`."""
    # The usual case first: looking at every device costs as much as the update of small tensors.
    dtypes = {average.dtype for average in shadow} | {value.dtype for value in live}
    if len(dtypes) == 1:  # several devices too: each pair shares one
        return [(shadow, live)]
    groups: defaultdict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]]
    groups = defaultdict(lambda: ([], []))
    for average, value in zip(shadow, live, strict=True):
        averages, values = groups[average.device, average.dtype, value.dtype]
        averages.append(average)
        values.append(value)
    return list(groups.values())


@torch.no_grad()
def move_(averages: list[Tensor], values: list[Tensor], decay: float) -> None:
    """`ema_update_` for lists of one device, one dtype of averages and one of values, unchecked."""
    if not averages:
        return
    dtype = averages[0].dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        torch._foreach_copy_(averages, values)
        return
    if values[0].dtype != dtype:  # one operation casts them all
        cast = [torch.empty_like(average) for average in averages]
        torch._foreach_copy_(cast, values)
        values = cast
    torch._foreach_lerp_(averages, values, 1 - decay)


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


def power_exponent(length: float) -> float:
    """Returns γ of the power-function average whose relative standard deviation is `length`.

    The profile of weights over training is τ^γ; σ_rel = √(γ + 1) / ((γ + 2)·√(γ + 3)) (Karras et
    al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
    arXiv:2312.02696, section 3.1). It is a share of the training so far.

    Args:
        length: σ_rel, above 0 and at most 0.288 (γ = 0, the mean of all weights).

    Raises:
        ValueError: for a length outside these bounds.
    """
    if not 0 < length <= _deviation(0.0):
        raise ValueError(
            f"length={length} is the standard deviation as a share of training: above 0 and at "
            f"most {_deviation(0.0):.4f}, which is the mean of all weights"
        )
    low, high = 0.0, 2 / length**2  # σ_rel falls with γ, and is below 1/√γ
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _deviation(middle) > length else (low, middle)
    return (low + high) / 2


def _deviation(gamma: float) -> float:
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def power_decay(step: int, gamma: float) -> float:
    """Returns the decay (1 − 1/t)^(γ + 1) of step t of the power-function average.

    Karras et al. 2024, arXiv:2312.02696, equation 2. The first step takes the live value.

    Args:
        step: t, counted from 1.
        gamma: γ, not negative, see `power_exponent`.
    """
    return math.pow(1 - 1 / step, gamma + 1)


def synthesis_weights(
    stored: Sequence[tuple[int, float]], wanted: tuple[int, float]
) -> list[float]:
    """Factors of stored power-function averages whose sum is nearest to an average of other length.

    The least-squares fit of the profiles p(τ) = (γ + 1)·τ^γ / t^(γ + 1) on 0 < τ ≤ t, with the
    inner products in closed form (Karras et al. 2024, arXiv:2312.02696, appendix C.2), among
    factors that sum to one. The paper solves without that constraint, and so would rescale the
    model: weights that never moved would not come out as they are. Its code divides by the sum
    afterwards, which is no longer the nearest.

    Args:
        stored: (t, γ) of each: the step at which it was stored, from 1, and its exponent.
        wanted: (t, γ) of the average to be approached.

    Returns:
        One factor for each of `stored`; negative ones occur.

    Raises:
        ValueError: for an empty list, or two that are the same.
    """
    if not stored or len(set(stored)) < len(stored):
        raise ValueError("the stored averages must be different ones, and at least one")
    products, aims, _ = _fit(stored, wanted)
    # The best factors are where the gradient of the squared error is the same in all of them.
    system = torch.ones(len(stored) + 1, len(stored) + 1, dtype=torch.float64)
    system[:-1, :-1], system[-1, -1] = products, 0.0
    right = torch.cat([aims, aims.new_ones(1)])
    factors = torch.linalg.lstsq(system, right[:, None]).solution[:-1, 0]
    exact: list[float] = (factors / factors.sum()).tolist()  # the sum was one up to rounding
    return exact


def synthesis_error(
    stored: Sequence[tuple[int, float]], factors: Sequence[float], wanted: tuple[int, float]
) -> float:
    """How far the profile of a sum of stored averages is from the wanted one.

    Args:
        stored: see `synthesis_weights`.
        factors: that it returned.
        wanted: see `synthesis_weights`.

    Returns:
        The norm of the difference over the norm of the wanted profile: 0 for the same, and from 1
        on no better than nothing.
    """
    products, aims, norm = _fit(stored, wanted)
    held = torch.tensor(factors, dtype=torch.float64)
    squared = held @ products @ held - 2 * held @ aims + norm
    return math.sqrt(max(0.0, float(squared)) / norm)


def _fit(
    stored: Sequence[tuple[int, float]], wanted: tuple[int, float]
) -> tuple[Tensor, Tensor, float]:
    """The inner products of stored profiles with each other and the wanted one, and its own.

    All of them times the last step, so that they are near one.
    """
    unit = max(step for step, _ in [*stored, wanted])
    products = [[_product(a, b) * unit for b in stored] for a in stored]
    aims = [_product(a, wanted) * unit for a in stored]
    norm = _product(wanted, wanted) * unit
    double = torch.float64
    return torch.tensor(products, dtype=double), torch.tensor(aims, dtype=double), norm


def _product(one: tuple[int, float], other: tuple[int, float]) -> float:
    """∫ p(τ)·q(τ) dτ of two profiles, each zero after its own step."""
    (early, first), (late, second) = sorted([one, other])
    # Over 0 < τ ≤ early: (γ₁ + 1)(γ₂ + 1) / (γ₁ + γ₂ + 1) · early^γ₂ / late^(γ₂ + 1)
    numerator = (first + 1) * (second + 1) * math.pow(early / late, second)
    return numerator / ((first + second + 1) * late)
