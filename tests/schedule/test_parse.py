"""Strings parse to the objects they describe, and wrong ones are pointed at."""

import math
import random

import pytest

from lightning_aux.schedule import (
    Chain,
    Constant,
    Cosine,
    Duration,
    Early,
    Exponential,
    Late,
    Linear,
    Schedule,
    ScheduleError,
    Steps,
)


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("-1e-3", Constant(-0.001)),
        (" 3 ", Constant(3)),
        ("constant(1, until=5ep)", Constant(1, until="5ep")),
        ("linear(0, 1)", Linear(0, 1)),
        ("linear(0,1,30%)", Linear(0, 1, until="30%")),
        ("linear(start=0, end=1, until='10ep', after=\"500 steps\")", Linear(0, 1, "10ep", 500)),
        ("cosine(1, 0, until=10 epochs)", Cosine(1, 0, until="10ep")),
        ("exponential(1, .01, until=500)", Exponential(1, 0.01, until=500)),
        ("step(1, 0.1, at=30%)", Steps((1, 0.1), at="30%")),
        ("step(1, 0.5, 0.1, at=[30%, 60%])", Steps([1, 0.5, 0.1], at=["30%", "60%"])),
        ("early(0.1, until=50%, shape='linear')", Early(0.1, "50%", "linear")),
        ("late(0.1, 50%)", Late(0.1, "50%")),
        (
            "chain(\n  linear(0, 1, until=10ep),\n  0.5)",
            Chain([Linear(0, 1, until="10ep"), Constant(0.5)]),
        ),
    ],
)
def test_a_string_is_the_object_it_describes(text: str, schedule: Schedule) -> None:
    assert Schedule.parse(text) == schedule
    assert hash(Schedule.parse(text)) == hash(schedule)
    assert Schedule.parse(schedule) is schedule


def any_time(rng: random.Random) -> str:
    return rng.choice(
        [f"{rng.randrange(10**6)} steps", f"{rng.uniform(0, 90)!r}ep", f"{rng.uniform(0, 99)!r}%"]
    )


def any_schedule(rng: random.Random, depth: int = 0) -> Schedule:
    def value() -> float:
        return rng.choice([rng.gauss(0, 1), rng.randrange(-5, 5), rng.gauss(0, 1) * 1e-30, 1e22])

    makers = [
        lambda: Constant(value(), until=any_time(rng)),
        lambda: Linear(value(), value(), until=any_time(rng), after=any_time(rng)),
        lambda: Cosine(value(), value(), until=any_time(rng)),
        lambda: Exponential(rng.random() + 1e-9, 1e9, until=any_time(rng)),
        lambda: Early(value(), any_time(rng), rng.choice(["constant", "linear", "cosine"])),
    ]
    if depth == 0:
        count = rng.randrange(1, 4)
        makers += [
            lambda: Constant(value()),
            lambda: Late(value(), any_time(rng), rng.choice(["constant", "linear", "cosine"])),
            lambda: Steps(
                [value() for _ in range(count + 1)], at=[any_time(rng) for _ in range(count)]
            ),
            lambda: Chain([any_schedule(rng, 1) for _ in range(count)]),
        ]
    return rng.choice(makers)()


@pytest.mark.parametrize("seed", range(200))
def test_the_string_of_a_schedule_parses_back_to_it(seed: int) -> None:
    schedule = any_schedule(random.Random(seed))
    assert Schedule.parse(str(schedule)) == schedule


def test_all_durations_are_listed_in_order() -> None:
    schedule = Schedule.parse(
        "chain(linear(0, 1, until=10ep, after=3), step(1, 2, 3, at=[5%, 6%]))"
    )
    assert [str(duration) for duration in schedule.durations] == ["10ep", "3 steps", "5%", "6%"]
    assert Constant(1).durations == ()
    assert Late(1, Duration(2, "epochs")).durations == (Duration(2, "epochs"),)


@pytest.mark.parametrize(
    ("text", "column", "message", "example"),
    [
        ("", 0, "found the end", "linear(0, 1, until=30%)"),
        ("liner(0, 1)", 0, "Did you mean 'linear'", "linear(0, 1, until=30%)"),
        ("linear", 6, "expected '('", "linear(0, 1, until=30%)"),
        ("linear(0", 8, "expected ',' or ')', found the end", "linear(0, 1, until=30%)"),
        ("linear(0)", 8, "needs end", "linear(0, 1, until=30%)"),
        ("linear(0, 1) x", 13, "expected the end", "linear(0, 1, until=30%)"),
        ("linear(0, 1, untl=3)", 13, "Did you mean 'until'", "linear(0, 1, until=30%)"),
        ("linear(0, 1, until=0.3)", 22, "no unit of time", "30%"),
        ("linear(0, 1, until=130%)", 19, "more than the whole", "30%"),
        ("linear(0, 1, until=-3)", 19, "negative", "30%"),
        ("linear(0, 1, until=10 apples)", 22, "unknown unit", "10ep"),
        ("linear(0, 1, until=3, 4)", 22, "cannot follow", "linear(0, 1, until=30%)"),
        ("linear(0, 1, 2, 3, 4)", 19, "at most 4", "linear(0, 1, until=30%)"),
        ("linear(0, 1, until=1, until=2)", 22, "given twice", "linear(0, 1, until=30%)"),
        ("linear(0, 30%)", 10, "number without a unit", "linear(0, 1, until=30%)"),
        ("linear(inf, 1)", 7, "finite", "linear(0, 1, until=30%)"),
        ("linear(nan, 1)", 7, "finite", "linear(0, 1, until=30%)"),
        ("linear(1e999, 1)", 7, "finite", "linear(0, 1, until=30%)"),
        ("linear(0, 1, until='3)", 21, 'expected "\'"', "linear(0, 1, until=30%)"),
        ("exponential(0, 1)", 12, "start above 0", "exponential(1, 0.01"),
        ("exponential(1, -1)", 15, "end above 0", "exponential(1, 0.01"),
        ("step(1, 2)", 9, "needs at", "at=[30%, 60%]"),
        ("step(1, 2, 30%)", 11, "number without a unit", "at=[30%, 60%]"),
        ("step(1, 2, at=[1, 2])", 14, "3 values", "at=[30%, 60%]"),
        ("early(1, 3, shape=lin)", 18, "Did you mean 'linear'", "shape=linear"),
        ("chain()", 6, "needs parts", "chain(linear("),
        ("chain(0.5, linear(0, 1))", 6, "constant(1, until=5ep)", "chain(linear("),
        ("chain(linear(0, 1), late(1, 3), 2)", 20, "has no end", "chain(linear("),
        ("chain(linear(0, 1), cosin(1, 0))", 20, "Did you mean 'cosine'", "chain(linear("),
        ("chain(linear(0, 1), exponential(0, 1))", 32, "above 0", "exponential(1, 0.01"),
        ("30%", 0, "number without a unit", "linear(0, 1, until=30%)"),
        ("[1]", 0, "number or a schedule", "linear(0, 1, until=30%)"),
        ("\n  liner(0, 1)", 3, "unknown kind", "linear(0, 1, until=30%)"),
    ],
)
def test_an_error_points_at_the_character_and_shows_a_valid_example(
    text: str, column: int, message: str, example: str
) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.parse(text)
    what, shown, caret, valid = str(caught.value).splitlines()
    assert message in what
    assert shown == "  " + text.replace("\n", " ")
    assert caret == "  " + " " * column + "^"
    assert example in valid


def test_the_examples_that_errors_show_are_valid() -> None:
    for kind in ("constant", "linear", "cosine", "exponential", "step", "early", "late", "chain"):
        with pytest.raises(ScheduleError) as caught:
            Schedule.parse(f"{kind}(?")
        example = str(caught.value).splitlines()[-1].removeprefix("example: ")
        assert Schedule.parse(example).values(100, steps_per_epoch=10)


@pytest.mark.parametrize("spec", [True, None, [1], math.nan, math.inf])
def test_what_is_not_a_schedule_is_refused(spec: object) -> None:
    with pytest.raises(ScheduleError, match="example"):
        Schedule.parse(spec)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Constant(math.nan),
        lambda: Linear(True, 1),
        lambda: Linear("0", 1),  # type: ignore[arg-type]
        lambda: Linear(0, 1, until=0.5),  # type: ignore[arg-type]
        lambda: Exponential(-1, -2),
        lambda: Steps((1, 2, 3), at="3ep"),
        lambda: Early(1, 2, shape="square"),  # type: ignore[arg-type]
        lambda: Chain([]),
        lambda: Chain([1, 2]),
    ],
)
def test_objects_are_checked_like_strings(make: object) -> None:
    with pytest.raises(ScheduleError):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("make", [lambda: Early(1, None), lambda: Linear(0, 1, until=None)])
def test_only_a_constant_may_leave_its_end_open(make: object) -> None:
    with pytest.raises(ScheduleError, match="until"):
        make()  # type: ignore[operator]
    assert Constant(1, until=None) == Constant(1)
