"""SIGKILL at every place that training passes through, and a resume from what is on the disk.

`killed.py` does it, once for all tests, with several of ours attached at the same time; one run
accumulates gradients, one has Lightning's own average beside ours. Where Lightning's resume is not
exact, within an accumulation window, the last but one test compares with the same without us.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.training import identical
from tests.faults import killed
from tests.faults.killed import PROCESSES, RUNS
from tests.faults.runs import (
    HOOKS,
    ended,
    prepared,
    saving,
    several_without_effect,
    state_in,
)
from tests.two_processes import run_script

# Where it can die: Lightning's hooks, and what the module, the optimizer and the saving say.
PLACES = [
    "forward",
    "training_step",
    "teacher's forward",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "optimizer.step",
    "after optimizer.step",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "validation_step",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "state_dict",
    "on_save_checkpoint",
    "half written",
    "written",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
    "teardown",
]
every_run = pytest.mark.parametrize("run", RUNS)
every_place = pytest.mark.parametrize("place", PLACES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    run_script(killed.__file__, folder, timeout=600)
    return folder


@pytest.fixture(scope="module")
def places(folder: Path) -> dict[str, list[str]]:
    """What each run that was not killed passed through, in order."""
    return json.loads((folder / "places.json").read_text())


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """What was found after a kill, by run and number of the place."""
    parts = [json.loads((folder / f"found-{n}.json").read_text()) for n in range(PROCESSES)]
    return {(run, place): result for part in parts for run, place, result in part}


def last_written(places: list[str]) -> str | None:
    names = [each.removeprefix("written ") for each in places if each.endswith(".ckpt")]
    return names[-1] if names else None


def kind(place: str) -> str:
    return "written" if place.startswith("written") else place


@every_run
def test_it_was_killed_wherever_it_passes_once_there_is_a_checkpoint(
    run: str, places: dict[str, list[str]], found: dict[Any, Any]
) -> None:
    begun = places[run].index("half written")
    tried = [place for name, place in found if name == run]
    assert sorted(tried) == list(range(begun, len(places[run])))
    assert {kind(place) for place in places[run][begun:]} == set(PLACES)
    assert all(found[run, place]["killed"] for place in tried)
    unnamed = {place for place in places[run] if place.startswith("on_")} - set(HOOKS)
    assert not unnamed


@every_place
@every_run
def test_after_a_kill_the_newest_checkpoint_resumes_bit_exactly(
    run: str, place: str, places: dict[str, list[str]], found: dict[Any, Any]
) -> None:
    struck = [
        number
        for number, each in enumerate(places[run])
        if kind(each) == place and (run, number) in found
    ]
    assert struck
    for number in struck:
        result = found[run, number]
        before = places[run][: number + (place == "written")]  # which is said when it is done
        assert result["newest"] == last_written(before), number
        assert result["differs"] == [], (number, result["newest"])


@every_run
def test_a_checkpoint_cut_short_by_the_kill_leaves_the_one_before(
    run: str, places: dict[str, list[str]], found: dict[Any, Any]
) -> None:
    """Only a kill between the two halves of a file cuts it, and that file is not resumed from."""
    cut = {n: result["cut short"] for (name, n), result in found.items() if name == run}
    for number, names in cut.items():
        coming = next((each for each in places[run][number:] if each.startswith("written")), "")
        halved = places[run][number] == "half written" and coming.endswith(".ckpt")
        assert names == ([coming.removeprefix("written ")] if halved else []), number
    assert sum(map(len, cut.values())) >= 6


def test_premise_everything_of_ours_is_in_what_is_compared_and_moves(folder: Path) -> None:
    """Teachers, memory, heads and their moments differ between the checkpoints of a run."""

    def moving(name: str) -> dict[str, torch.Tensor]:
        ours = state_in(folder / "every batch" / name)["lightning_aux"]
        members, heads = ours["members"], ours["heads"]
        return {
            "teacher": members["ema"]["weights"]["head.weight"],
            "buffers": members["ema"]["buffers"]["encoder.1.running_mean"],
            "anchor": members["ema_anchor.teacher"]["weights"]["head.weight"],
            "memory": members["early_learning_regularization"]["memory"]["rows"],
            "head": heads["weights"]["probe.weight"],
            "moments": heads["optimizer"][0]["exp_avg"],
        }

    early, late = moving("02-a.ckpt"), moving("05-a.ckpt")
    assert [part for part in late if torch.equal(early[part], late[part])] == []


def test_a_checkpoint_within_an_accumulation_window_resumes_as_far_as_without_us(
    tmp_path: Path,
) -> None:
    """Validation between two micro-batches saves there, and the gradients so far are lost.

    That is Lightning's own resume, which is not exact there. Ours takes nothing more away: with
    terms of weight 0 the resumed run is bit-identical to the resumed run without us.
    """
    window: dict[str, Any] = {"accumulate_grad_batches": 3, "val_check_interval": 2}

    def of_theirs(state: dict[str, Any]) -> dict[str, Any]:
        return {key: state[key] for key in ("state_dict", "optimizer_states", "global_step")}

    def resumed(make: Any, name: str) -> dict[str, Any]:
        folder = tmp_path / name
        folder.mkdir()
        _, _, train = prepared([*make(), *saving(folder)], folder, **window)
        train()
        checkpoint = folder / "01-b.ckpt"  # after two of the three batches of the second epoch
        assert state_in(checkpoint)["global_step"] == 1
        assert bool(state_in(checkpoint).get("lightning_aux")) == bool(make())
        return of_theirs(ended(make(), folder / "resumed", checkpoint, **window))

    without = resumed(list, "without")
    assert not identical(without, of_theirs(ended([], tmp_path / "whole", **window)))
    assert identical(resumed(several_without_effect, "with"), without)


def test_places_are_named_as_they_are_passed(places: dict[str, list[str]]) -> None:
    """After a step and before its batch ends, between micro-batches, in and after validation."""
    whole = " ".join(kind(each).replace(" ", "_") for each in places["accumulated"])
    for passage in (
        r"on_after_backward on_train_batch_end on_train_batch_start",  # within a window
        r"optimizer.step after_optimizer.step on_train_batch_end state_dict",
        r"on_validation_end state_dict on_save_checkpoint half_written written on_train_epoch_end",
    ):
        assert re.search(re.escape(passage), whole), passage
