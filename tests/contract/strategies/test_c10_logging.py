"""C10 in two processes: every process logs the same keys, and the terms add up."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_aux.registry import ENTRIES
from tests.contract.probe import SILENT_STEPS
from tests.contract.strategies.jobs import HEAD
from tests.contract.strategies.matrix import (
    COMPARABLE,
    every_case,
    every_place,
    every_taught,
    furthest,
    in_ddp,
    in_one_process,
)
from tests.contract.strategies.places import STEPS

WITH_TERM = [name for name in COMPARABLE if name == HEAD or ENTRIES[name].objective]


def ours(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    kept = [{key: row[key] for key in sorted(row) if key.startswith("aux/")} for row in rows]
    return [row for row in kept if row]


@every_place
@every_case
def test_every_process_logs_the_same_keys(ended: Any, place: str, entry: str) -> None:
    first, second = (ours(ended(place, f"sgd {entry}", rank)["rows"]) for rank in (0, 1))
    assert [list(row) for row in first] == [list(row) for row in second]
    alone = ours(in_one_process(place, entry, "sgd")["rows"])
    assert [list(row) for row in first] == [list(row) for row in alone]


@every_place
@pytest.mark.parametrize("entry", WITH_TERM)
def test_on_every_process_main_and_weighted_term_add_up_to_the_total(
    ended: Any, place: str, entry: str
) -> None:
    name = "probe" if entry == HEAD else ENTRIES[entry].objective
    for rank in (0, 1):
        rows = ours(ended(place, f"sgd {entry}", rank)["rows"])
        assert len(rows) == STEPS
        for row in rows:
            assert f"aux/{name}/weight" in row
            terms = [key for key in row if f"{key}/weight" in row]
            added = sum(row[f"{key}/weight"] * row[key] for key in terms)
            assert row["aux/main"] + added == pytest.approx(row["aux/total"], abs=1e-6)
        silent = SILENT_STEPS if entry == HEAD else 0
        assert sum(f"aux/{name}" in row for row in rows) == STEPS - silent


@every_place
@every_case
def test_the_mean_of_what_two_processes_log_is_what_one_process_logs(
    ended: Any, place: str, entry: str
) -> None:
    """Of sums over parameters too, which no process holds alone when they are sharded."""
    first, second = (ours(ended(place, f"sgd {entry}", rank)["rows"]) for rank in (0, 1))
    mean = [
        {key: (one[key] + other[key]) / 2 for key in one}
        for one, other in zip(first, second, strict=True)
    ]
    alone = ours(in_one_process(place, entry, "sgd")["rows"])
    if entry in ("dropout_schedule", "multi_sample_dropout"):
        # The rate and the weight are the same, what is dropped is not.
        known = ("aux/dropout_schedule/p", "aux/multi_sample_dropout/weight")
        mean, alone = (
            [[row[key] for key in known if key in row] for row in rows] for rows in (mean, alone)
        )
    assert furthest(mean, alone) < 1e-5


@every_place
@every_taught
@pytest.mark.parametrize("variant", ["sgd", "accumulated", "bf16-true"])
def test_both_processes_log_the_distance_of_a_teacher_that_one_process_logs(
    ended: Any, place: str, entry: str, variant: str
) -> None:
    """Its parts are summed over the processes where parameters are sharded."""

    def distances(rows: list[dict[str, float]]) -> list[dict[str, float]]:
        return [{key: row[key] for key in row if key.endswith("/distance")} for row in ours(rows)]

    first, second = (distances(ended(place, f"{variant} {entry}", rank)["rows"]) for rank in (0, 1))
    assert first == second
    assert any(first) or variant == "accumulated"  # four steps: before a first generation ends
    if variant != "bf16-true":  # where one process rounds other sums
        assert furthest(first, distances(in_one_process(place, entry, variant)["rows"])) < 1e-5


@in_ddp
def test_f42_a_term_on_one_process_only_ends_and_logs_the_same_keys(ended: Any, place: str) -> None:
    """Beside a metric of the user's that is synchronised over processes."""
    first, second = (ended(place, "one rank", rank) for rank in (0, 1))
    assert first["global_step"] == second["global_step"] == STEPS
    assert first["keys"] == second["keys"]
    assert "aux/on_first_rank" in first["keys"][0]
    assert "theirs" in first["keys"][0]
    assert furthest(first["head"], second["head"]) == 0
    assert furthest(first["weights"], second["weights"]) == 0


@every_place
def test_f67_one_process_starts_the_wandb_run_and_not_before_the_fit(
    ended: Any, place: str
) -> None:
    for rank, begun in ((0, [0, 1]), (1, [0, 0])):  # after making the Trainer, after the fit
        noted = ended(place, "wandb", rank)
        assert noted["with us"] == noted["without"] == begun
