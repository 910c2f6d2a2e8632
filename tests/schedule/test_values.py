"""Schedules have the values of their closed forms at every step."""

import math

import numpy as np
import pytest

from lightning_aux.schedule import (
    Chain,
    Constant,
    Cosine,
    Early,
    Exponential,
    Horizon,
    Linear,
    Schedule,
    Steps,
)

TOTAL = 20


def share(step: int, after: int, until: int) -> float:
    return min(max((step - after) / (until - after), 0), 1)


@pytest.mark.parametrize("written", [0.25, "0.25", "2.5e-1", "constant(0.25)", Constant(0.25)])
def test_a_number_a_string_and_an_object_are_the_same_constant(
    written: float | str | Schedule,
) -> None:
    assert Schedule.parse(written).values(TOTAL) == [0.25] * TOTAL


def test_linear_is_a_line_that_reaches_its_end_at_until() -> None:
    values = Schedule.parse("linear(2, -1, until=12, after=4)").values(TOTAL)
    expected = [2 + (-1 - 2) * share(step, 4, 12) for step in range(TOTAL)]
    assert values == pytest.approx(expected, abs=1e-15)
    assert values[:5] == [2] * 5
    assert values[12:] == [-1] * 8
    assert values[11] != -1


def test_cosine_is_half_a_cosine() -> None:
    values = Schedule.parse("cosine(1, 0.1, until=50%)").values(TOTAL)
    expected = [
        0.1 + 0.9 * (1 + math.cos(math.pi * share(step, 0, 10))) / 2 for step in range(TOTAL)
    ]
    assert values == pytest.approx(expected, abs=1e-15)
    assert (values[0], values[10]) == (1, 0.1)


def test_exponential_has_a_constant_ratio() -> None:
    values = Schedule.parse("exponential(1, 1e-3, until=10)").values(TOTAL)
    assert values == pytest.approx([10 ** (-3 * share(s, 0, 10)) for s in range(TOTAL)], rel=1e-14)
    assert values[10:] == [1e-3] * 10


def test_exponential_spans_the_whole_range_of_floats() -> None:
    assert Exponential(1e-300, 1e300, until=2).values(3) == pytest.approx([1e-300, 1, 1e300])


def test_step_changes_at_its_times() -> None:
    values = Schedule.parse("step(1, 0.5, 0.1, at=[30%, 60%])").values(TOTAL)
    assert values == [1] * 6 + [0.5] * 6 + [0.1] * 8
    assert Steps((1, 0.1), at="30%").values(10) == [1] * 3 + [0.1] * 7


@pytest.mark.parametrize("until", [0, 1, 2, 3, 7, 20])
def test_early_linear_is_the_published_linspace_to_the_last_bit(until: int) -> None:
    value = 0.1
    expected = np.concatenate([np.linspace(value, 0, until), np.zeros(TOTAL - until)])
    assert Early(value, until, shape="linear").values(TOTAL) == expected.tolist()


def test_early_is_zero_from_until_on() -> None:
    assert Schedule.parse("early(0.1, until=25%)").values(8) == [0.1] * 2 + [0] * 6


def test_early_cosine_falls_over_the_steps_of_the_linear_form() -> None:
    values = Early(0.4, 5, shape="cosine").values(7)
    expected = [0.4 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)] + [0, 0]
    assert values == pytest.approx(expected, abs=1e-16)
    assert values[4] == 0


def test_late_is_zero_before_its_start() -> None:
    assert Schedule.parse("late(0.1, start=75%)").values(8) == [0] * 6 + [0.1] * 2


@pytest.mark.parametrize(("shape", "curve"), [("linear", Linear), ("cosine", Cosine)])
def test_late_rises_to_its_value_at_the_end_of_training(shape: str, curve: type[Linear]) -> None:
    late = Schedule.parse(f"late(0.3, start=8, shape={shape})").bind(Horizon(TOTAL))
    ramp = curve(0, 0.3, until="100%", after=8).bind(Horizon(TOTAL))
    assert [late(step) for step in range(TOTAL + 5)] == [ramp(step) for step in range(TOTAL + 5)]
    assert late(8) == 0
    assert late(TOTAL) == 0.3


def test_times_in_epochs_follow_changing_accumulation() -> None:
    horizon = Horizon(total=24, epoch_steps=(12, 6, 3))
    value = Schedule.parse("linear(0, 1, until=2ep)").bind(horizon)
    assert [value(step) for step in (0, 9, 18, 19)] == [0, 0.5, 1, 1]
    value = Schedule.parse("step(1, 2, 3, at=[1ep, 3ep])").bind(horizon)
    assert [value(step) for step in (11, 12, 20, 21)] == [1, 2, 2, 3]


def test_chain_counts_the_times_of_a_part_from_the_end_of_the_part_before() -> None:
    schedule = Schedule.parse("chain(linear(0, 1, until=4), constant(1, until=6), cosine(1, 0, 8))")
    expected = (
        [step / 4 for step in range(4)]
        + [1.0] * 6
        + [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
        + [0, 0]
    )
    assert schedule.values(TOTAL) == pytest.approx(expected, abs=1e-15)


def test_chain_takes_percent_of_the_whole_training() -> None:
    schedule = Chain(["constant(1, until=10)", "linear(1, 0, until=25%)"])
    assert schedule.values(TOTAL)[10:16] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])


def test_chain_counts_epochs_in_the_epochs_that_they_fall_in() -> None:
    schedule = Schedule.parse("chain(constant(3, until=1ep), constant(2, until=1ep), 1)")
    assert schedule.values(24, steps_per_epoch=(12, 6, 3)) == [3] * 12 + [2] * 6 + [1] * 6
    assert schedule.length(Horizon(24, (12, 6, 3))) is None


def test_chains_nest() -> None:
    inner = "chain(constant(1, until=2), linear(1, 0, until=2))"
    outer = Schedule.parse(f"chain({inner}, early(5, until=3), late(7, start=2))")
    assert outer.values(12) == [1, 1, 1, 0.5, 5, 5, 5, 0, 0, 7, 7, 7]


def test_length_is_the_end_of_a_schedule_or_none() -> None:
    horizon = Horizon(total=40, epoch_steps=(4,))
    lengths = {
        "0.5": None,
        "constant(1, until=3)": 3,
        "cosine(1, 0)": 40,
        "early(1, until=2ep)": 8,
        "late(1, start=1)": None,
        "step(1, 2, at=3)": None,
        "chain(linear(0, 1, until=2ep), cosine(1, 0, until=50%))": 28,
    }
    assert {text: Schedule.parse(text).length(horizon) for text in lengths} == lengths


@pytest.mark.parametrize(
    "text",
    [
        "linear(0, 1, until=80)",
        "chain(linear(0, 1, until=30), 7)",
        "late(1, start=25)",
        "cosine(1, 0)",
    ],
)
def test_the_last_value_is_held_past_the_end_of_training(text: str) -> None:
    value = Schedule.parse(text).bind(Horizon(TOTAL))
    assert {value(step) for step in (TOTAL + 1, TOTAL + 30, 10**9)} == {value(TOTAL)}


def test_without_an_end_of_training_a_schedule_in_steps_goes_on() -> None:
    value = Schedule.parse("linear(0, 1, until=1000)").bind(Horizon())
    assert [value(step) for step in (0, 500, 5000)] == [0, 0.5, 1]


@pytest.mark.parametrize("until", ["0 steps", "1%", "0%"])
def test_a_way_of_no_length_is_a_jump(until: str) -> None:
    assert Schedule.parse(f"linear(3, 1, until={until})").values(10) == [1.0] * 10


def test_contradicting_times_are_refused_when_they_are_resolved() -> None:
    with pytest.raises(ValueError, match=r"until=10 steps .* lies before after=50%"):
        Schedule.parse("linear(0, 1, until=10, after=50%)").bind(Horizon(100))
    with pytest.raises(ValueError, match="in order"):
        Schedule.parse("step(1, 2, 3, at=[50%, 10])").bind(Horizon(100))
