"""C3, C10 and C12 under `ddp_spawn`: everything is pickled to the processes that train."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.contract.strategies import jobs, spawned
from tests.contract.strategies.jobs import CASES, WITHOUT, bundle_of, bundles, trained
from tests.contract.strategies.matrix import (
    COMPARABLE,
    TOLERANCE,
    every_case,
    furthest,
    replicated,
)
from tests.contract.strategies.places import PLACES, STEPS
from tests.contract.training import identical
from tests.two_processes import run_script

pytestmark = [
    pytest.mark.xdist_group("strategies ddp_spawn"),
    pytest.mark.vouches("ddp_spawn"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def spawn(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`spawn(case, who)` is what process 0 or 1 wrote, or what came back to the user's."""
    folder = tmp_path_factory.mktemp("spawn")
    run_script(spawned.__file__, folder, timeout=400)

    def read(case: str, who: int | str) -> dict[str, Any]:
        case = case if case == WITHOUT else bundle_of(case)[0]
        returned: Any = torch.load(folder / f"{case}.returned.pt", weights_only=True)
        if "error" in returned:
            pytest.fail(returned["error"])
        if who == "returned":
            return dict(returned)
        return dict(torch.load(folder / f"{case}.{who}.pt", weights_only=True))

    return read


def bundle_in_one_process(entry: str) -> dict[str, Any]:
    return _trained(*bundle_of(entry))


@cache
def _trained(case: str, *others: str) -> dict[str, Any]:
    return trained(PLACES["ddp"].one_process, case, "sgd", *others)


@pytest.mark.parametrize("entry", COMPARABLE)
def test_two_half_batches_give_what_one_process_gets(spawn: Any, entry: str) -> None:
    alone = bundle_in_one_process(entry)
    for part in ("weights", "head", "states"):
        assert furthest(spawn(entry, 0)[part], alone[part]) < TOLERANCE, part
    assert furthest(spawn(entry, "returned")["weights"], alone["weights"]) < TOLERANCE


@every_case
def test_both_processes_end_with_the_same_bits(spawn: Any, entry: str) -> None:
    first, second = (replicated(spawn(entry, rank)) for rank in (0, 1))
    assert first["global_step"] == STEPS
    for part in ("weights", "head", "states"):
        assert identical(first[part], second[part]), part
    assert [sorted(row) for row in first["rows"]] == [sorted(row) for row in second["rows"]]


@every_case
def test_what_is_logged_is_logged_as_in_one_process(spawn: Any, entry: str) -> None:
    alone = bundle_in_one_process(entry)["rows"]
    assert [sorted(row) for row in spawn(entry, 0)["rows"]] == [sorted(row) for row in alone]


@every_case
@pytest.mark.parametrize("who", [0, 1, "returned"])
def test_nothing_of_ours_remains(spawn: Any, entry: str, who: int | str) -> None:
    """Neither in the processes that trained nor in the user's own."""
    assert spawn(entry, who)["trace"] == spawn(WITHOUT, who)["trace"]


def test_every_registry_entry_is_spawned() -> None:
    assert set(CASES) >= set(jobs.ENTRIES)
    assert all(bundle_of(case) for case in CASES)
    assert len(bundles()) < len(CASES) / 2
