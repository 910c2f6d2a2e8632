"""The dropout rate equals the published rule at every step, and the schedules of the same name."""

import random

import numpy as np
import pytest

from lightning_aux.functional import dropout_rate
from lightning_aux.schedule import Early, Late


def published(p: float, total: int, cutoff: int, mode: str, shape: str) -> list[float]:
    """The rule in numpy: whole arrays joined at the cutoff, the line by linspace."""
    if mode == "standard":
        rates = np.full(total, p)
    elif mode == "early":
        first = np.linspace(p, 0, cutoff) if shape == "linear" else np.full(cutoff, p)
        rates = np.concatenate([first, np.zeros(total - cutoff)])
    else:
        rates = np.concatenate([np.zeros(cutoff), np.full(total - cutoff, p)])
    return list(rates.tolist())


@pytest.mark.parametrize("seed", range(30))
def test_every_step_follows_the_published_rule(seed: int) -> None:
    rng = random.Random(seed)
    mode = ("standard", "early", "late")[seed % 3]
    shape = rng.choice(["constant", "linear"]) if mode == "early" else "constant"
    p, epochs, length = rng.random(), rng.randrange(1, 9), rng.randrange(1, 12)
    total, cutoff = epochs * length, rng.randrange(0, epochs + 1) * length
    times = {"early": {"until": cutoff}, "late": {"start": cutoff}}.get(mode, {})
    rates = [dropout_rate(step, p, mode, total, shape=shape, **times) for step in range(total)]  # type: ignore[arg-type]
    assert rates == published(p, total, cutoff, mode, shape)


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("cutoff", [0, 1, 2, 5, 11, 12])
def test_the_schedules_early_and_late_are_the_same_rule(shape: str, cutoff: int) -> None:
    total = 12
    early = [dropout_rate(s, 0.3, "early", total, cutoff, None, shape) for s in range(total)]  # type: ignore[arg-type]
    late = [dropout_rate(s, 0.3, "late", total, None, cutoff, shape) for s in range(total)]  # type: ignore[arg-type]
    assert early == Early(0.3, cutoff, shape).values(total)  # type: ignore[arg-type]
    assert late == pytest.approx(Late(0.3, cutoff, shape).values(total), abs=1e-16)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1.5, "standard", 9), "p must lie"),
        ((-1, 0.5, "standard", 9), "counts from 0"),
        ((0, 0.5, "middle", 9), "standard, early or late"),
        ((0, 0.5, "early", 9), "needs until"),
        ((0, 0.5, "late", 9), "needs start"),
        ((0, 0.5, "late", 9, 4, 4), "does not take until"),
        ((0, 0.5, "standard", 9, None, 4), "does not take start"),
        ((0, 0.5, "early", 9, 10), "between 0 and total=9"),
        ((0, 0.5, "early", 9, 4, None, "square"), "constant, linear or cosine"),
    ],
)
def test_bad_input_is_named(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dropout_rate(*arguments)  # type: ignore[arg-type]
