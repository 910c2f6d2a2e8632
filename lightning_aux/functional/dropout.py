"""The dropout rate over training: standard, early and late dropout.

`early` and `late` are also the values of the schedules of these names, of dropout or of any weight.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

Shape: TypeAlias = Literal["constant", "linear", "cosine"]


def dropout_rate(
    step: int,
    p: float,
    mode: Literal["standard", "early", "late"],
    total: int,
    until: int | None = None,
    start: int | None = None,
    shape: Shape = "constant",
) -> float:
    """Dropout rate of one optimizer step.

    Liu, Xu, Jin, Shen and Darrell 2023, "Dropout Reduces Underfitting", arXiv:2303.01500, as in
    `drop_scheduler` of their code: standard is p always; early is p (or a line from p to 0, which
    is reached in step `until` − 1) and then 0; late is 0 and then p. The cosine shapes, and the
    shapes of late other than constant, are ours: late rises from 0 at `start` to p at `total`.

    Args:
        step: completed optimizer steps, 0 in the first one.
        p: the rate, between 0 and 1.
        mode: `"standard"`, `"early"` or `"late"`.
        total: optimizer steps of the whole training.
        until: first step without dropout; needed for `"early"`.
        start: first step with dropout; needed for `"late"`.
        shape: `"constant"`, `"linear"` or `"cosine"`.

    Returns:
        The rate.

    Raises:
        ValueError: for a rate outside [0, 1], an unknown mode or shape, or a missing or misplaced
            `until` or `start`.
    """
    _check(step, p, mode, total, until, start, shape)
    if mode == "early" and until is not None:
        return early(step, p, until, shape)
    if mode == "late" and start is not None:
        return late(step, p, start, total, shape)
    return p


def early(step: int, p: float, until: int, shape: Shape) -> float:
    """The value p at first, 0 from step `until` on; nothing is checked."""
    last = until - 1
    if step > last:
        return 0.0
    if shape == "constant" or step == 0:
        return p
    if step == last:
        return 0.0
    if shape == "linear":
        return step * (-p / last) + p  # in the order of numpy.linspace, to the last bit
    return p * (1 + math.cos(math.pi * step / last)) / 2


def late(step: int, p: float, start: int, total: int, shape: Shape) -> float:
    """The value 0 before step `start`, then p, or a rise to p at `total`; nothing is checked."""
    if step < start:
        return 0.0
    if shape == "constant" or step >= total:
        return p
    share = (step - start) / (total - start)
    return p * share if shape == "linear" else p * (1 - math.cos(math.pi * share)) / 2


def _check(
    step: int, p: float, mode: str, total: int, until: int | None, start: int | None, shape: str
) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"p must lie between 0 and 1, not {p}")
    if step < 0:
        raise ValueError(f"step counts from 0, not {step}")
    if mode not in ("standard", "early", "late"):
        raise ValueError(f"mode must be standard, early or late, not {mode!r}")
    if shape not in ("constant", "linear", "cosine"):
        raise ValueError(f"shape must be constant, linear or cosine, not {shape!r}")
    for name, owner, value in (("until", "early", until), ("start", "late", start)):
        if (value is None) == (mode == owner):
            verb = "needs" if value is None else "does not take"
            raise ValueError(f"mode {mode!r} {verb} {name}; {name} belongs to {owner!r}")
        if value is not None and not 0 <= value <= total:
            raise ValueError(f"{name} must lie between 0 and total={total} steps, not {value}")
