"""``Interval``: the times are those that a loop over epochs and steps would count."""

from __future__ import annotations

import pytest

from lightning_aux.schedule import Horizon, Interval, ScheduleError


def times(interval: Interval, horizon: Horizon, total: int) -> list[int]:
    due = interval.bind(horizon)
    return [step for step in range(1, total + 1) if due(step)]


@pytest.mark.parametrize("start", [0, 1, 4, 30])
@pytest.mark.parametrize("every", [1, 3, 7])
def test_steps_are_counted_from_the_start(every, start):
    expected = [step for step in range(1, 31) if step >= start and (step - start) % every == 0]
    assert times(Interval(every, start), Horizon(30, (10,)), 30) == expected


def test_epochs_end_where_epochs_end():
    horizon = Horizon(total=15, epoch_steps=(7, 5, 3))
    assert times(Interval("1ep"), horizon, 15) == [7, 12, 15]
    assert times(Interval("1ep", start="1ep"), horizon, 15) == [7, 12, 15]
    assert times(Interval("2ep", start="1ep"), horizon, 15) == [7, 15]
    assert times(Interval("1ep", start=2), Horizon(12, (4,)), 12) == [2, 6, 10]


def test_percent_is_of_the_whole_training():
    assert times(Interval("25%"), Horizon(10), 10) == [3, 5, 8, 10]  # 2.5, 5, 7.5, 10
    assert times(Interval("25%", start="50%"), Horizon(8), 8) == [4, 6, 8]


def test_a_run_that_is_resumed_asks_from_the_middle():
    due = Interval("1ep").bind(Horizon(total=100, epoch_steps=(10,)))
    assert [step for step in range(35, 61) if due(step)] == [40, 50, 60]
    assert due(20)
    assert not due(21)


@pytest.mark.parametrize("every", [0, "0ep", "0%"])
def test_no_time_at_all_is_refused(every):
    with pytest.raises(ScheduleError, match="more than zero"):
        Interval(every)


def test_a_time_that_this_training_has_not_is_refused():
    with pytest.raises(ValueError, match="number of optimizer steps in an epoch is unknown"):
        Interval("1ep", "1ep").bind(Horizon(100))
    with pytest.raises(ValueError, match="every=1% is less than one optimizer step"):
        Interval("1%").bind(Horizon(10))
