"""C13 and faults in two processes: all of them act alike, and none of them waits for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_aux.registry import ENTRIES
from tests.contract.strategies import empty_batch
from tests.contract.strategies.jobs import (
    REFUSED,
    SICK_AT,
    SIZES,
    added_for,
    different_sizes_in_turn,
    sickness_left_out,
)
from tests.contract.strategies.matrix import (
    TOLERANCE,
    every_case,
    every_comparable_per_sample,
    every_place,
    every_sharded_place,
    furthest,
    in_ddp,
    replicated,
)
from tests.contract.strategies.places import PLACES, STEPS
from tests.contract.training import TERMS, identical
from tests.two_processes import run_script


@every_place
@every_case
def test_an_unknown_path_is_a_named_error_on_every_process_before_training(
    ended: Any, place: str, entry: str
) -> None:
    for rank in (0, 1):
        noted = ended(place, f"unknown path {entry}", rank)
        kind, message = noted["raised"]
        assert kind == "AuxiliaryError"
        assert "haed" in message
        assert "head" in message
        assert noted["global_step"] == 0


@every_sharded_place
@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_whole_parameters_says_so_before_training(
    ended: Any, place: str, case: str
) -> None:
    for rank in (0, 1):
        noted = ended(place, f"refused {case}", rank)
        kind, message = noted["raised"]
        assert kind == "AuxiliaryError"
        assert message.startswith(f"{added_for(case)[0].name}: ")
        assert "shard" in message
        assert noted["global_step"] == 0


@every_place
def test_a_term_that_is_nan_on_one_process_is_an_error_on_both(ended: Any, place: str) -> None:
    for rank in (0, 1):
        noted = ended(place, "nan raise", rank)
        kind, message = noted["raised"]
        assert kind == "AuxiliaryError"
        assert f"on process 1 after {SICK_AT} optimizer steps" in message
        assert noted["global_step"] == SICK_AT


@every_place
def test_a_term_that_is_nan_on_one_process_is_left_out_on_both(ended: Any, place: str) -> None:
    """The weights are those of one process whose term has no weight in that step."""
    first, second = (ended(place, "nan skip", rank) for rank in (0, 1))
    for noted in (first, second):
        assert "raised" not in noted
        counts = [row["aux/sick/skipped"] for row in noted["rows"] if "aux/main" in row]
        assert counts == [0.0] * SICK_AT + [1.0] * (STEPS - SICK_AT)
        row = [row for row in noted["rows"] if "aux/main" in row][SICK_AT]
        term = row["aux/sick/weight"] * row["aux/sick"]
        assert row["aux/main"] + term == pytest.approx(row["aux/total"], abs=1e-6, nan_ok=False)
    assert identical(first["weights"], second["weights"])
    assert furthest(first["weights"], sickness_left_out(PLACES[place])) < TOLERANCE


@in_ddp
def test_an_error_on_one_process_is_not_taken_for_a_nan_on_another(ended: Any, place: str) -> None:
    first, second = (ended(place, "failing beside nan", rank) for rank in (0, 1))
    assert "a mistake of the first process" in first["raised"][1]
    assert "could not be computed on process 0" in second["raised"][1]
    assert first["global_step"] == second["global_step"] == SICK_AT


@every_place
@every_comparable_per_sample
def test_f45_batches_of_different_sizes_train_on_the_mean_of_their_means(
    ended: Any, place: str, entry: str
) -> None:
    """As one process does that accumulates over both; a memory keeps the rows of both."""
    alone = different_sizes_in_turn(PLACES[place], entry)
    for rank in (0, 1):
        both = [ended(place, f"sizes {entry}", rank), alone]
        here, expected = both if rank == 0 else map(replicated, both)
        for part in ("weights", "head", "states"):
            assert furthest(here[part], expected[part]) < TOLERANCE, part
    if entry == "early_learning_regularization":
        (state,) = ended(place, f"sizes {entry}")["states"].values()
        assert len(state["memory"]["rows"]) == 3 * sum(SIZES)
        assert (state["memory"]["rows"].sum(dim=1) > 0.1).all()


@pytest.mark.slow
@pytest.mark.xdist_group("strategies fsdp2")
def test_an_empty_batch_on_one_process_ends_both_where_parameters_are_sharded(
    tmp_path: Path,
) -> None:
    """A term communicates there, so nobody can tell the others: the process ends, and they do."""
    with pytest.raises(pytest.fail.Exception):
        run_script(empty_batch.__file__, tmp_path, timeout=120)
    assert "the batch is empty" in (tmp_path / "1").read_text()
    assert (tmp_path / "0").read_text().startswith("RuntimeError")


@in_ddp
@pytest.mark.parametrize("entry", TERMS)
def test_an_empty_batch_on_one_process_is_the_same_error_on_both(
    ended: Any, place: str, entry: str
) -> None:
    for rank in (0, 1):
        noted = ended(place, f"empty {entry}", rank)
        # Do not read the batch, and go on as without us.
        if entry in ("ema_anchor_weight", "parameter_anchor_l2"):
            assert "raised" not in noted
            assert noted["global_step"] == 6
            continue
        kind, message = noted["raised"]
        assert kind == "AuxiliaryError", message
        assert ENTRIES[entry].objective in message
        assert "empty" in message if rank == 1 else "process 1" in message
        # The third of three batches an epoch, the first time that there is a term.
        assert noted["global_step"] == (5 if ENTRIES[entry].begins > 2 else 2)
