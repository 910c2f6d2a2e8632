"""C2, C3, C4 and C6: two processes, sharded or not, train like one with the whole batch.

The samples of a batch come from a shuffled sampler, so each of them moves between processes from
epoch to epoch; per-sample memories have to follow.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from lightning_aux.registry import ENTRIES
from tests.contract.strategies.jobs import HEAD, SILENT, WITHOUT, silent_head
from tests.contract.strategies.matrix import (
    COMPARABLE,
    TOLERANCE,
    every_case,
    every_comparable,
    every_place,
    every_sharded_place,
    every_taught,
    furthest,
    in_one_process,
    replicated,
)
from tests.contract.strategies.places import PLACES, STEPS
from tests.contract.training import identical

every_variant = pytest.mark.parametrize(
    "variant",
    [
        "sgd",
        "adam",
        pytest.param("accumulated", marks=pytest.mark.vouches("accumulation")),
        pytest.param("manual", marks=pytest.mark.vouches("manual")),
    ],
)
HEADED = [name for name in COMPARABLE if name == HEAD]


@every_place
@every_variant
@every_comparable
def test_two_half_batches_give_the_weights_of_one_batch(
    ended: Any, place: str, entry: str, variant: str
) -> None:
    """Under a schedule of weights; heads too. Accumulated: windows of three and of one batch."""
    alone, here = in_one_process(place, entry, variant), ended(place, f"{variant} {entry}")
    steps = 4 if variant == "accumulated" else STEPS
    assert here["global_step"] == alone["global_step"] == steps
    assert furthest(here["weights"], alone["weights"]) < TOLERANCE
    assert furthest(here["head"], alone["head"]) < TOLERANCE


@every_place
@every_variant
@every_case
def test_f38_both_processes_end_with_the_same_bits(
    ended: Any, place: str, entry: str, variant: str
) -> None:
    """Weights, heads, and the states of teachers in every step."""
    first, second = (replicated(ended(place, f"{variant} {entry}", rank)) for rank in (0, 1))
    for part in ("weights", "head", "states"):
        assert identical(first[part], second[part]), part


@every_place
@every_case
def test_f22_a_teacher_of_a_model_with_batchnorm_is_the_same_on_both_processes(
    ended: Any, place: str, entry: str
) -> None:
    """Its buffers too, although those of the live module differ until ddp makes them equal."""
    first, second = (replicated(ended(place, f"BatchNorm {entry}", rank)) for rank in (0, 1))
    assert len(first["states"]) == STEPS
    assert identical(first["states"], second["states"])
    parameters = [name for name in first["weights"] if "running" not in name]
    for name in parameters:
        assert identical(first["weights"][name], second["weights"][name]), name


@every_place
@pytest.mark.parametrize("variant", ["sgd", "accumulated"])
@every_comparable
def test_f22_f24_teachers_and_memories_are_those_of_one_process_in_every_step(
    ended: Any, place: str, entry: str, variant: str
) -> None:
    alone, here = in_one_process(place, entry, variant), ended(place, f"{variant} {entry}")
    assert len(here["states"]) == STEPS
    assert furthest(here["states"], alone["states"]) < TOLERANCE


@every_place
@pytest.mark.vouches("accumulation")
@every_case
def test_f14_f28_what_is_remembered_moves_once_per_optimizer_step(
    ended: Any, place: str, entry: str
) -> None:
    """Four batches in windows of three and one: nothing moves within a window."""
    noted = ended(place, f"accumulated {entry}")
    assert noted["steps"] == [0, 0, 0, 1, 2, 2, 2, 3]
    for (step, before), (later, after) in pairwise(
        zip(noted["steps"], noted["states"], strict=True)
    ):
        assert step != later or identical(before, after)
    seldom = {"swa": 1, "snapshot": 1, "voted": 1, "generation": 0}  # every so many steps
    for name, state in noted["states"][-1].items():
        # A teacher that never moves counts nothing.
        assert state.get("updates", 0) in (0, seldom.get(name, 3))


@every_taught
@every_place
def test_f22_f24_no_collective_is_issued_when_a_teacher_moves(
    ended: Any, place: str, entry: str
) -> None:
    counted = ended(place, f"collectives {entry}")
    assert counted["seen"] == 1  # the counter counts
    assert counted["moves"] >= STEPS
    assert counted["issued"] == 0


@every_sharded_place
@every_taught
def test_f24_f26_a_teacher_holds_the_parts_that_its_process_holds_and_no_more(
    ended: Any, place: str, entry: str
) -> None:
    first, second = (ended(place, f"sgd {entry}", rank)["parts"] for rank in (0, 1))
    for name, parts in first.items():
        for mine, yours in ((parts, second[name]), (second[name], parts)):
            assert mine["teacher"] == mine["live"]
            both = [sum(pair) for pair in zip(mine["teacher"], yours["teacher"], strict=True)]
            assert both == mine["whole"]
        uneven = parts["teacher"] != second[name]["teacher"]
        assert uneven == ("uneven" in place)
        if uneven:  # five rows are three and two; of a single element one process has none
            assert (parts["live"][0], second[name]["live"][0]) == (3 * 6, 2 * 6)
            assert (parts["live"][-1], second[name]["live"][-1]) == (1, 0)


@every_place
@pytest.mark.vouches("manual")
@every_comparable
def test_f49_gradients_of_manual_optimisation_are_synchronised_in_every_step(
    ended: Any, place: str, entry: str
) -> None:
    first, second = (ended(place, f"manual {entry}", rank)["gradients"] for rank in (0, 1))
    alone = in_one_process(place, entry, "manual")["gradients"]
    assert identical(first, second)
    assert len(first) == STEPS
    assert furthest(first, alone) < TOLERANCE


@every_place
@pytest.mark.parametrize("silent", SILENT)
@pytest.mark.parametrize("entry", HEADED)
def test_f39_a_head_that_is_silent_for_some_steps_trains_as_in_one_process(
    ended: Any, place: str, entry: str, silent: str
) -> None:
    alone = silent_head(PLACES[place].one_process, SILENT[silent])
    for rank in (0, 1):
        here = ended(place, f"silent head {silent}", rank)
        assert furthest(here["weights"], alone["weights"]) < TOLERANCE
        assert furthest(here["head"], alone["head"]) < TOLERANCE


@every_place
@pytest.mark.parametrize("entry", COMPARABLE)
def test_what_is_compared_is_not_the_training_without_us(
    ended: Any, place: str, entry: str
) -> None:
    """A term moves the weights by more than the tolerance; teachers alone move none."""
    here, without = ended(place, f"sgd {entry}"), ended(place, f"sgd {WITHOUT}")
    moved = furthest(here["weights"], without["weights"])
    inactive = ENTRIES[entry].objective is None and ENTRIES[entry].inert if entry in ENTRIES else 0
    assert moved == 0 if inactive else moved > 10 * TOLERANCE
