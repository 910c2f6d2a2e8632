"""C12 and C14 in two processes: nothing remains, and the order of callbacks changes nothing."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.strategies.jobs import WITHOUT
from tests.contract.strategies.matrix import every_case, every_place
from tests.contract.strategies.places import BATCHES

every_ending = pytest.mark.parametrize("ending", ["sgd", "manual", "accumulated", "exception"])


@every_place
@pytest.mark.parametrize("rank", [0, 1])
@every_ending
@every_case
def test_nothing_of_ours_remains(
    ended: Any, place: str, entry: str, ending: str, rank: int
) -> None:
    """Attributes, hooks, parameters of optimizers and rates are as after the run without us."""
    after = ended(place, f"{ending} {entry}", rank)["trace"]
    before = ended(place, f"{ending} {WITHOUT}", rank)["trace"]
    different = {key for key in before | after if after.get(key) != before.get(key)}
    assert {key: (before.get(key), after.get(key)) for key in different} == {}


@every_place
@pytest.mark.parametrize("rank", [0, 1])
@every_case
def test_the_order_of_callbacks_gives_the_same_bits(
    ended: Any, place: str, entry: str, rank: int
) -> None:
    """Beside another head: first it, then the entry's own, and all of them reversed."""
    noted = ended(place, f"order {entry}", rank)
    assert noted["steps"] == BATCHES
    assert noted["different"] == []
