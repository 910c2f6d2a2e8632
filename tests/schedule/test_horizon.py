"""Times are read exactly and turned into the right optimizer step."""

import pytest

from lightning_aux.schedule import Duration, Horizon, ScheduleError


@pytest.mark.parametrize(
    ("spec", "amount", "unit"),
    [
        (500, 500, "steps"),
        ("500", 500, "steps"),
        ("500 steps", 500, "steps"),
        ("1 step", 1, "steps"),
        ("10ep", 10, "epochs"),
        ("10 ep", 10, "epochs"),
        ("10 epochs", 10, "epochs"),
        ("1 epoch", 1, "epochs"),
        ("0.5ep", 0.5, "epochs"),
        ("30%", 30, "percent"),
        (" 12.5 % ", 12.5, "percent"),
        ("1e3 steps", 1000, "steps"),
    ],
)
def test_every_way_to_write_a_time(spec: int | str, amount: float, unit: str) -> None:
    duration = Duration.parse(spec)
    assert (duration.amount, duration.unit) == (amount, unit)
    assert Duration.parse(str(duration)) == duration
    assert Duration.parse(duration) is duration


@pytest.mark.parametrize(
    ("spec", "column"),
    [
        ("-3", 0),
        ("101%", 0),
        ("0.5", 3),
        (0.5, 3),
        (True, 0),
        ("10 apples", 3),
        ("10ep x", 5),
        ("1.5 steps", 0),
        ("soon", 0),
        ("", 0),
        (None, 0),
    ],
)
def test_a_wrong_time_is_pointed_at_and_shown_a_valid_one(spec: object, column: int) -> None:
    with pytest.raises(ValueError, match=r"example: 500 steps, 10ep or 30%") as caught:
        Duration.parse(spec)  # type: ignore[arg-type]
    caret = next(line for line in str(caught.value).splitlines() if line.strip() == "^")
    assert caret.index("^") - 2 == column


@pytest.mark.parametrize("amount", [float("nan"), float("inf"), -1.0])
def test_a_duration_cannot_be_made_of_an_impossible_amount(amount: float) -> None:
    with pytest.raises(ScheduleError):
        Duration(amount, "epochs")


def test_epochs_follow_accumulation_that_changes_from_epoch_to_epoch() -> None:
    # 12 batches an epoch, accumulated by 1, 2, then 4 in all later epochs
    horizon = Horizon(total=None, epoch_steps=(12, 6, 3))
    boundaries = [0, 12, 18, 21, 24, 27]
    assert [horizon.steps(f"{epoch}ep") for epoch in range(6)] == boundaries
    assert [horizon.epoch(step) for step in boundaries] == [0, 1, 2, 3, 4, 5]
    assert horizon.steps("0.5ep") == 6
    assert horizon.steps("1.5ep") == 15
    assert horizon.epoch(15) == 1.5
    assert horizon.epoch(19) == pytest.approx(2 + 1 / 3)


def test_a_duration_that_starts_later_is_as_long_as_the_epochs_it_spans() -> None:
    horizon = Horizon(total=None, epoch_steps=(12, 6, 3))
    assert horizon.end("1ep", origin=12) == 18
    assert horizon.end("1ep", origin=6) == 15  # half of 12 and half of 6
    assert horizon.end("2ep", origin=18) == 24


def test_halves_are_rounded_up_and_decimals_are_exact() -> None:
    assert Horizon(total=5).steps("50%") == 3
    assert Horizon(total=5).steps("10%") == 1
    assert Horizon(epoch_steps=(5,)).steps("0.1ep") == 1
    # exactly 14.5 steps; the floats 0.29 * 50 are 14.499999999999998
    assert Horizon(epoch_steps=(50,)).steps("0.29ep") == 15
    assert Horizon(total=50).steps("29%") == 15
    assert Horizon(total=1000).steps("0.049%") == 0
    assert Horizon(total=1000).steps("0.05%") == 1


def test_percent_is_of_the_total() -> None:
    horizon = Horizon(total=200)
    assert [horizon.steps(f"{percent}%") for percent in (0, 30, 33.5, 100)] == [0, 60, 67, 200]
    assert [horizon.fraction(step) for step in (0, 50, 200, 300)] == [0, 0.25, 1, 1]
    assert Horizon(total=0).fraction(0) == 1


@pytest.mark.parametrize(
    ("horizon", "time", "unknown"),
    [
        (Horizon(epoch_steps=(5,)), "30%", "length of the training"),
        (Horizon(total=5), "1ep", "steps in an epoch"),
    ],
)
def test_an_unknown_length_is_named_with_a_way_out(
    horizon: Horizon, time: str, unknown: str
) -> None:
    with pytest.raises(ValueError, match=f"{unknown}.*max_steps/max_epochs or write .* in steps"):
        horizon.steps(time)
    assert horizon.steps("7 steps") == 7


def test_an_unbounded_training_has_no_fraction_and_no_epoch() -> None:
    assert Horizon().fraction(3) is None
    with pytest.raises(ValueError, match="steps in an epoch"):
        Horizon().epoch(3)


@pytest.mark.parametrize("arguments", [(-1, None), (10, ()), (10, (4, 0))])
def test_an_impossible_horizon_is_refused(arguments: tuple[int, tuple[int, ...] | None]) -> None:
    with pytest.raises(ValueError, match="at least"):
        Horizon(*arguments)
