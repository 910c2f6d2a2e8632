"""Heads in the ways of ddp that are strict about gradients, and rows that go between processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.contract.strategies.jobs import ASKED, SILENT, WITHOUT, adversaries, in_two_backwards
from tests.contract.strategies.matrix import TOLERANCE, every_place, furthest, in_ddp
from tests.contract.strategies.places import BATCHES, PLACES, STEPS
from tests.contract.training import identical

ACTIVE = {
    "at first": [step >= STEPS // 2 for step in range(STEPS)],
    "every second step": [step % 2 == 1 for step in range(STEPS)],
    "always": [False] * STEPS,
}


@in_ddp
@pytest.mark.parametrize("graph", ["", ", static graph"], ids=["", "static graph"])
@pytest.mark.parametrize("silent", SILENT)
def test_f39_the_reducer_gets_gradients_of_exactly_zero_from_a_silent_head(
    ended: Any, place: str, silent: str, graph: str
) -> None:
    """`find_unused_parameters=False`: a parameter without a gradient would be an error."""
    first, second = (ended(place, f"silent head {silent}{graph}", rank) for rank in (0, 1))
    assert [largest > 0 for largest in first["gradients"]] == ACTIVE[silent]
    assert identical(first, second)


@every_place
@pytest.mark.parametrize("silent", SILENT)
def test_f39_a_silent_head_has_a_gradient_of_exactly_zero(
    ended: Any, place: str, silent: str
) -> None:
    first = ended(place, f"silent head {silent}")
    assert [largest > 0 for largest in first["gradients"]] == ACTIVE[silent]


@every_place
@pytest.mark.parametrize("case", ["head", "self_distillation_features", WITHOUT])
def test_f39_two_backwards_of_one_step_train_as_in_one_process(
    ended: Any, place: str, case: str
) -> None:
    """The term joins the first; the second has no other use for the head."""
    first, second = (ended(place, f"two backwards {case}", rank) for rank in (0, 1))
    assert identical(first, second)
    one = in_two_backwards(PLACES[place].one_process, case)
    assert furthest(first, one) < TOLERANCE
    if case != WITHOUT:
        without = ended(place, f"two backwards {WITHOUT}")
        assert furthest(first["weights"], without["weights"]) > 10 * TOLERANCE


@in_ddp
def test_heads_and_teachers_of_two_optimizers_train_as_in_one_process(
    ended: Any, place: str
) -> None:
    """A generator and a discriminator, toggled in turn."""
    first, second = (ended(place, "adversaries", rank) for rank in (0, 1))
    assert identical(first, second)
    assert furthest(first, adversaries(PLACES[place].one_process)) < TOLERANCE
    assert [each["updates"] for each in first["teachers"]] == [BATCHES, BATCHES]


@every_place
@pytest.mark.parametrize("case", ["self_distillation_features", "head"])
def test_a_compiled_part_trains_as_an_eager_one(ended: Any, place: str, case: str) -> None:
    found, eager = ended(place, f"compiled {case}"), ended(place, f"sgd {case}")
    assert found["runs"] >= 2 * BATCHES
    assert furthest(found["weights"], eager["weights"]) < TOLERANCE
    assert furthest(found["head"], eager["head"]) < TOLERANCE


@in_ddp
@pytest.mark.parametrize("silent", SILENT)
def test_f39_a_static_graph_changes_nothing(ended: Any, place: str, silent: str) -> None:
    plain, static = (ended(place, f"silent head {silent}{each}") for each in ("", ", static graph"))
    assert identical(plain, static)


@every_place
def test_f44_f45_rows_of_every_process_are_kept_in_the_order_of_ranks(
    ended: Any, place: str
) -> None:
    """Of even rows on the first and odd ones on the second, as they are asked for and sent back.

    What is exchanged here is remembered, never differentiated: no term needs a gradient through it.
    """
    first, second = (ended(place, "routed", rank) for rank in (0, 1))
    for asked, found in zip(ASKED, (first, second), strict=True):
        rows = torch.tensor(asked) * 10.0
        assert torch.equal(found["brought"], rows)
        assert torch.equal(found["doubled"], torch.stack([rows, 2 * rows], dim=1))
    assert first["first asks for none"].tolist() == []
    assert torch.equal(second["first asks for none"], second["brought"])
    # Row 0 of the first process and rows 2 and 0 of the second; rows 3, and 1 and 3.
    assert first["sent"].tolist() == [0, 102, 100]
    assert second["sent"].tolist() == [3, 101, 103]
    assert (first["places"].tolist(), second["places"].tolist()) == ([0, 1, 0], [1, 0, 1])
    assert first["first sends none"].tolist() == [2, 0]
    assert second["first sends none"].tolist() == [1, 3]
