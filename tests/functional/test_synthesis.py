"""Averages put together from stored ones: against profiles on a fine grid, in numpy."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_aux.functional import power_exponent, synthesis_weights
from lightning_aux.functional.averages import synthesis_error

STORED = [(time, power_exponent(length)) for time in (400, 700, 1000) for length in (0.05, 0.1)]
LENGTHS = (0.03, 0.05, 0.07, 0.15, 0.2, 0.28)


def profile(step: int, gamma: float) -> np.ndarray:
    """The share of every moment before step 1000, which sums to one."""
    moments = (np.arange(200_000) + 0.5) / 200
    shares = np.where(moments <= step, (moments / step) ** gamma, 0.0)
    return shares / shares.sum()


@pytest.mark.parametrize("length", LENGTHS)
def test_factors_sum_to_one_so_that_constant_weights_stay(length: float) -> None:
    for stored in (STORED, STORED[-2:], STORED[-1:]):
        assert sum(synthesis_weights(stored, (1000, power_exponent(length)))) == pytest.approx(1)


@pytest.mark.parametrize("length", LENGTHS)
def test_no_other_factors_that_sum_to_one_are_nearer(length: float) -> None:
    """The constraint written out by substitution: the last factor is one minus the others."""
    wanted = 1000, power_exponent(length)
    columns = np.stack([profile(*each) for each in STORED], axis=1)
    aim = profile(*wanted)
    free = columns[:, :-1] - columns[:, -1:]
    solved, *_ = np.linalg.lstsq(free, aim - columns[:, -1], rcond=None)
    nearest = columns @ np.append(solved, 1 - solved.sum()) - aim
    factors = synthesis_weights(STORED, wanted)
    ours = columns @ np.array(factors) - aim
    assert np.linalg.norm(ours) <= np.linalg.norm(nearest) * 1.01 + 1e-4 * np.linalg.norm(aim)
    assert synthesis_error(STORED, factors, wanted) == pytest.approx(
        np.linalg.norm(ours) / np.linalg.norm(aim), abs=2e-3
    )


def test_a_stored_average_is_itself() -> None:
    for place, each in enumerate(STORED[-2:]):
        expected = [float(place == 0), float(place == 1)]
        factors = synthesis_weights(STORED[-2:], each)
        assert factors == pytest.approx(expected, abs=1e-9)
        assert synthesis_error(STORED[-2:], factors, each) == pytest.approx(0, abs=1e-6)


def test_how_near_the_lengths_of_the_documentation_come() -> None:
    """The numbers on the page of averaged weights."""
    tracks = [power_exponent(0.05), power_exponent(0.1)]
    once = [(1000, gamma) for gamma in tracks]
    often = [(time, gamma) for time in range(125, 1001, 125) for gamma in tracks]
    for stored, lengths, bound in (
        (once, np.linspace(0.05, 0.12, 29), 0.09),
        (often, np.linspace(0.04, 0.2, 65), 0.08),
    ):
        wanted = [(1000, power_exponent(length)) for length in lengths]
        errors = [synthesis_error(stored, synthesis_weights(stored, w), w) for w in wanted]
        assert max(errors) < bound
