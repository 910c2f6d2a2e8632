"""C1 in two processes: at weight 0, and with what only watches, training is bit-identical."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.strategies.jobs import WITHOUT, differing
from tests.contract.strategies.matrix import COMPARABLE, every_place
from tests.contract.strategies.places import BATCHES
from tests.contract.training import TERMS

PARTS = {"weights", "optimizer", "random"}


@every_place
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("entry", COMPARABLE)
def test_weight_zero_leaves_training_bit_identical(
    ended: Any, place: str, entry: str, rank: int
) -> None:
    """With dropout, BatchNorm, whose running statistics count, and Adam, on each process."""
    without = ended(place, f"weight 0 {WITHOUT}", rank)
    assert without.keys() == PARTS
    assert differing(ended(place, f"weight 0 {entry}", rank), without) == []


@every_place
@pytest.mark.parametrize("rank", [0, 1])
def test_f71_second_forwards_leave_training_and_running_statistics_bit_identical(
    ended: Any, place: str, rank: int
) -> None:
    """A teacher's pass and a second pass of the student in every step; ddp broadcasts buffers."""
    watched = ended(place, "watched", rank)
    without = ended(place, f"weight 0 {WITHOUT}", rank)
    assert watched["seen"] == 2 * BATCHES * 8
    assert differing(watched, without) == []
    assert any(name.endswith("running_mean") for name in without["weights"])


@every_place
@pytest.mark.parametrize("entry", TERMS)
def test_a_weight_that_is_not_zero_does_change_training(ended: Any, place: str, entry: str) -> None:
    """What the tests above compare can differ."""
    trained = [ended(place, f"adam {each}") for each in (entry, WITHOUT)]
    assert "weights" in differing(*trained)
