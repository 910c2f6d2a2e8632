"""Phases of training by hand: where they begin and end, and schedules that refer to them."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

import pytest

from lightning_aux.schedule import (
    Border,
    Chain,
    Constant,
    Cosine,
    Division,
    Duration,
    During,
    Early,
    Horizon,
    Interval,
    Linear,
    Schedule,
    ScheduleError,
    Steps,
    Sum,
    parse_moment,
)

HORIZON = Horizon(total=20, epoch_steps=(5,))
PHASED = Division("warmup: 4 steps, main: 50%, cool: rest").of(HORIZON)  # [0, 4), [4, 14), [14, 20)


def spans(spec: Any, horizon: Horizon = HORIZON) -> dict[str, tuple[int, int]]:
    return dict(Division(spec).of(horizon).phases)


def values(written: Any, horizon: Horizon = PHASED) -> list[float]:
    function = Schedule.parse(written).bind(horizon)
    return [function(step) for step in range(20)]


# ---------------------------------------------------------------------------------- where they are
@pytest.mark.parametrize(
    ("spec", "by_hand"),
    [
        (
            "warmup: 10%, main: 70%, cool: rest",
            {"warmup": (0, 2), "main": (2, 16), "cool": (16, 20)},
        ),
        ("a: 3, b: 4 steps, c: rest", {"a": (0, 3), "b": (3, 7), "c": (7, 20)}),
        ("a: 1ep, b: 2 epochs", {"a": (0, 5), "b": (5, 15)}),
        ("a: 2 steps, b: 1ep, c: 25%", {"a": (0, 2), "b": (2, 7), "c": (7, 12)}),
        ("only: rest", {"only": (0, 20)}),
        (" a :\n 50% ,\tb: 50%", {"a": (0, 10), "b": (10, 20)}),
        ({"a": 3, "b": "10%", "c": "rest"}, {"a": (0, 3), "b": (3, 5), "c": (5, 20)}),
        ({"a": Duration(1, "epochs"), "b": "rest"}, {"a": (0, 5), "b": (5, 20)}),
        ("über: 1, _2: 1, class: 1", {"über": (0, 1), "_2": (1, 2), "class": (2, 3)}),
    ],
)
def test_each_phase_begins_where_the_one_before_it_ends(spec, by_hand):
    assert spans(spec) == by_hand


def test_epochs_are_those_that_come_with_their_own_lengths():
    horizon = Horizon(total=24, epoch_steps=(12, 6, 3))
    assert spans("a: 1ep, b: 1ep, c: rest", horizon) == {"a": (0, 12), "b": (12, 18), "c": (18, 24)}
    # Half an epoch is over after 6 steps; one more epoch ends in the middle of the second.
    assert spans("a: 6, b: 1ep", horizon) == {"a": (0, 6), "b": (6, 15)}


def test_percentages_are_rounded_once_not_each():
    horizon = Horizon(total=10)
    assert spans("a: 15%, b: 15%, c: 15%, d: rest", horizon) == {
        "a": (0, 2),
        "b": (2, 3),
        "c": (3, 5),  # 4.5 steps
        "d": (5, 10),
    }


@pytest.mark.parametrize("seed", range(20))
def test_borders_of_random_percentages_are_those_of_exact_sums(seed):
    choose = random.Random(seed)
    total, count = choose.randint(200, 5000), choose.randint(1, 9)
    parts = [choose.randint(1, 100 // count) for _ in range(count)]
    spec = {f"p{place}": f"{percent}%" for place, percent in enumerate(parts)}
    ends = [
        math.floor(Fraction(sum(parts[: place + 1]) * total, 100) + Fraction(1, 2))
        for place in range(count)
    ]
    expected = list(zip([0, *ends], ends, strict=False))
    assert list(spans(spec, Horizon(total)).values()) == expected


@pytest.mark.parametrize("count", [3, 7, 9])
def test_fractions_of_a_percent_that_add_up_to_the_whole_end_with_training(count):
    spec = {f"p{place}": f"{100 / count!r}%" for place in range(count)}
    found = list(spans(spec, Horizon(1000)).values())
    assert found[-1][1] == 1000
    assert [end for _, end in found[:-1]] == [begin for begin, _ in found[1:]]


@pytest.mark.parametrize("spec", ["warmup: 10%, main: 2.5ep, cool: rest", "a: 500 steps, b: rest"])
def test_a_division_is_written_as_it_was_read(spec):
    assert str(Division(spec)) == spec
    assert Division(str(Division(spec))).lengths == Division(spec).lengths


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "is not a name and a length with a colon between"),
        ({}, "there is no phase"),
        ("warmup 10%", "'warmup 10%' is not a name and a length"),
        ("warm up: 10%", "'warm up' cannot be the name of a phase"),
        ("2nd: 10%", "'2nd' cannot be the name"),
        ("a: 10%, a: rest", "the phase 'a' is there twice"),
        ("a: rest, b: 10%", "'b' comes after the rest of training"),
        ("a: rest, b: rest", "'b' comes after the rest"),
        ("a: 0, b: rest", "the phase 'a' has no length"),
        ("a: 60%, b: 50%", "the phases take 110% of training"),
        ("a: -5, b: rest", "(?s)cannot be negative.*-5"),
        ("a: 0.5, b: rest", r"(?s)0\.5 has no unit of time"),
        ({"a": 0.5}, r"(?s)0\.5 has no unit of time"),
        ("a: b.end", "b.end is a moment, and here a length of time is needed"),
        ("a: 10 parsecs", "(?s)unknown unit of time 'parsecs'"),
    ],
)
def test_what_is_no_division_is_refused_when_it_is_read(spec, message):
    with pytest.raises(ScheduleError, match=message):
        Division(spec)


@pytest.mark.parametrize(
    ("spec", "horizon", "message"),
    [
        ("a: 15, b: 10", HORIZON, "the phases take 25 optimizer steps, and this training has 20"),
        ("a: 1%, b: rest", HORIZON, "the phase 'a' has no optimizer step: it would last from"),
        ("a: 20, b: rest", HORIZON, "the phase 'b' has no optimizer step"),
        ("a: 10%, b: rest", Horizon(None, (5,)), "max_steps/max_epochs"),
        ("a: 2, b: rest", Horizon(None, (5,)), "max_steps/max_epochs"),
        ("a: 1ep", Horizon(20), "number of optimizer steps in an epoch is unknown"),
    ],
)
def test_phases_that_this_training_has_no_room_for_are_refused(spec, horizon, message):
    with pytest.raises(ValueError, match=message):
        Division(spec).of(horizon)


# -------------------------------------------------------------------------------- times at borders
@pytest.mark.parametrize(
    ("written", "by_hand"),
    [
        ("linear(0, 1, until=warmup.end)", lambda k: min(k / 4, 1)),
        ("linear(0, 1, after=main.start, until=main.end)", lambda k: min(max((k - 4) / 10, 0), 1)),
        ("step(1, 2, 3, at=[warmup.end, cool.start])",
         lambda k: 1 if k < 4 else 2 if k < 14 else 3),
        ("step(1, 2, at=main . end)", lambda k: 1 if k < 14 else 2),
        ("early(0.5, until='warmup.end')", lambda k: 0.5 if k < 4 else 0.0),
        ("late(0.5, cool.start)", lambda k: 0.5 if k >= 14 else 0.0),
        ("cosine(1, 0, after=warmup.start, until=2ep)",
         lambda k: (1 + math.cos(math.pi * min(k / 10, 1))) / 2),
        ("chain(constant(3, until=warmup.end), linear(0, 1, until=10))",
         lambda k: 3 if k < 4 else min((k - 4) / 10, 1)),
        # A border is where it is, in a later part of a chain too.
        ("chain(constant(3, until=2), linear(0, 1, until=main.end))",
         lambda k: 3 if k < 2 else min((k - 2) / 12, 1)),
        ("during(0.5, main)", lambda k: 0.5 if 4 <= k < 14 else 0.0),
        ("during(0.5, phase=warmup)", lambda k: 0.5 if k < 4 else 0.0),
        ("during(0.5, 'cool')", lambda k: 0.5 if k >= 14 else 0.0),
        ("sum(during(0.5, main), during(0.25, cool), 1)",
         lambda k: 1 + (0.5 if 4 <= k < 14 else 0.25 if k >= 14 else 0)),
        ("sum(early(0.1, until=20%), late(0.3, start=80%))",
         lambda k: 0.1 if k < 4 else 0.3 if k >= 16 else 0.0),
        ("sum(linear(0, 1), linear(1, 0))", lambda k: 1.0),
        ("chain(sum(constant(1, until=3), constant(2, until=6)), 0)", lambda k: 3 if k < 6 else 0),
        ("chain(during(2, main), 1)", lambda k: 2 if 4 <= k < 14 else 0 if k < 4 else 1),
    ],
)  # fmt: skip
def test_the_value_of_every_step_is_the_one_by_hand(written, by_hand):
    assert values(written) == pytest.approx([by_hand(step) for step in range(20)], abs=1e-15)


def test_after_the_end_of_training_the_last_phase_is_still_there():
    assert Schedule.parse("during(0.5, cool)").bind(PHASED)(20) == 0.0
    assert Schedule.parse("linear(0, 1, until=cool.end)").bind(PHASED)(99) == 1.0


def test_a_border_is_one_of_the_moments_of_an_interval():
    due = Interval(3, "main.start").bind(PHASED)
    assert [step for step in range(1, 21) if due(step)] == [4, 7, 10, 13, 16, 19]
    with pytest.raises(ScheduleError, match="is a moment, and"):
        Interval("main.start")
    with pytest.raises(ScheduleError, match="is a moment, and a length of time is needed"):
        Interval(Border("main", "start"))


@pytest.mark.parametrize(
    "schedule",
    [
        During(0.5, "main"),
        During(-1e-3, "über"),
        Sum([Constant(1), During(0.5, "main")]),
        Sum(["linear(0, 1, until=warmup.end)", 0.25]),
        Sum([Constant(2)]),
        Linear(0, 1, until="warmup.end", after=Border("warmup", "start")),
        Cosine(1, 0, until=Border("über", "end")),
        Steps((1, 2), at="main.end"),
        Steps((1, 2, 3), at=["warmup.end", "50%"]),
        Early(0.1, "warmup.end", "linear"),
        Constant(1, until="main.end"),
        Chain([Constant(1, until="main.end"), Sum([During(1, "cool"), 2])]),
    ],
    ids=str,
)
def test_what_is_written_is_read_as_an_equal_schedule(schedule):
    assert Schedule.parse(str(schedule)) == schedule
    assert hash(Schedule.parse(str(schedule))) == hash(schedule)


def test_the_times_of_a_schedule_are_those_of_its_parts():
    schedule = Schedule.parse("sum(linear(0, 1, until=warmup.end), early(1, until=2ep))")
    assert Border("warmup", "end") in schedule.durations
    assert Duration(2, "epochs") in schedule.durations
    assert parse_moment("warmup.end") == Border("warmup", "end")
    assert str(parse_moment(" warmup . end ")) == "warmup.end"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("linear(0, 1, until=warmup.ends)", r"(?s)a start and an end, not 'ends'\. Did you.*'end'"),
        ("linear(0, warmup.end)", "(?s)expected a finite number without a unit"),
        ("linear(0, 1, until=warmup)", "(?s)expected a time such as"),
        ("during(0.5, main.start)", "(?s)expected the name of a phase of training"),
        ("during(0.5)", "during needs phase"),
        ("during(0.5, 3)", "(?s)expected the name of a phase"),
        ("sum()", "sum needs parts|at least one part"),
        ("sum(1, after=3)", "sum has no argument 'after'; it takes only schedules"),
        ("sum(10%)", "(?s)expected"),
        ("warmup.end", "(?s)unknown kind 'warmup'"),
    ],
)
def test_strings_that_are_no_schedule_are_pointed_at(written, message):
    with pytest.raises(ScheduleError, match=message) as raised:
        Schedule.parse(written)
    assert "^" in str(raised.value)
    assert "example: " in str(raised.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: During(0.5, "not a name"),
        lambda: During(0.5, 3),
        lambda: Border("main", "middle"),
        lambda: Sum([]),
        lambda: Linear(0, 1, until="main.begin"),
    ],
)
def test_objects_that_cannot_be_are_refused(make):
    with pytest.raises(ScheduleError):
        make()


@pytest.mark.parametrize("written", ["during(1, mian)", "linear(0, 1, until=mian.end)"])
def test_a_phase_that_there_is_not_lists_near_ones(written):
    with pytest.raises(ValueError, match=r"'mian'\. Did you mean 'main'.*warmup, main, cool"):
        Schedule.parse(written).bind(PHASED)
    with pytest.raises(ValueError, match=r"Name them: Phases\('warmup: 10%, \.\.\.'\)"):
        Schedule.parse(written).bind(HORIZON)


@pytest.mark.parametrize(
    "written",
    [
        "linear(0, 1, after=main.end, until=warmup.end)",
        "step(1, 2, 3, at=[main.end, warmup.end])",
        "chain(constant(1, until=10), constant(2, until=warmup.end), 3)",
    ],
)
def test_borders_in_the_wrong_order_are_refused(written):
    with pytest.raises(ValueError, match=r"before|in order"):
        Schedule.parse(written).bind(PHASED)
