"""`epochwise`: a schedule in steps of whole epochs."""

from __future__ import annotations

import pytest

from lightning_aux.schedule import Horizon, Schedule


def test_a_linear_rise_is_the_stairs_of_progressive_self_distillation() -> None:
    """alpha_t = alpha_T * t / T with t = 1..T, Kim et al. 2021, as the authors' code has it."""
    epochs, steps = 5, 3
    values = Schedule.parse("epochwise(linear(0, 0.8))").values(epochs * steps, steps)
    assert values == pytest.approx([0.8 * (e + 1) / epochs for e in range(epochs) for _ in "abc"])


def test_epochs_of_unequal_length_and_a_last_one_that_is_cut_off() -> None:
    values = Schedule.parse("epochwise(linear(0, 10))").values(10, [2, 3, 4])
    assert values == pytest.approx([2, 2, 5, 5, 5, 9, 9, 9, 9, 10])


def test_after_the_known_epochs_the_last_length_holds() -> None:
    horizon = Horizon(None, (2, 3))
    assert [horizon.epoch_end(step) for step in range(9)] == [2, 2, 5, 5, 5, 8, 8, 8, 11]


def test_it_parses_back_and_goes_into_a_chain() -> None:
    schedule = Schedule.parse("chain(epochwise(linear(0, 1, until=2ep)), 0.5)")
    assert Schedule.parse(str(schedule)) == schedule
    assert schedule.values(8, 2) == [0.5, 0.5, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("text", ["epochwise()", "epochwise(1, 2)"])
def test_it_holds_one_schedule(text: str) -> None:
    with pytest.raises(ValueError, match="epochwise"):
        Schedule.parse(text)


def test_it_needs_the_length_of_an_epoch() -> None:
    with pytest.raises(ValueError, match="max_epochs"):
        Schedule.parse("epochwise(linear(0, 1, until=10 steps))").bind(Horizon(10, None))
