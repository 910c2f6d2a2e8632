"""C7 and C8 in two processes: resuming is exact, and checkpoints are the user's.

FSDP2 saves one file, gathered on the first process, or a folder to which every process writes.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from tests.contract.strategies.jobs import (
    CASES,
    FORMS,
    HEAD,
    SAVED_AT,
    WITHOUT,
    saved_by_one_process,
)
from tests.contract.strategies.matrix import (
    TOLERANCE,
    every_case,
    every_comparable,
    every_place,
    every_sharded_place,
    furthest,
)
from tests.contract.strategies.places import PLACES, STEPS
from tests.contract.training import shared

every_form = pytest.mark.parametrize("form", FORMS)
# What Lightning calls the part of a folder that is not sharded.
META = "meta.pt"


def checkpoint(ended: Any, place: str, entry: str, form: str = "file") -> Path:
    ended(place, f"{form} {entry}")
    path: Path = ended.folder(place) / form / shared(entry) / f"step={SAVED_AT}.ckpt"
    assert path.is_file() if form == "file" else path.is_dir()
    return path


def read(path: Path) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(path, weights_only=True)
    return saved


# -------------------------------------------------------------------------------------- C7: resume
@every_place
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("form", [*FORMS, "file, BatchNorm"])
@pytest.mark.parametrize("entry", [WITHOUT, *CASES])
@pytest.mark.vouches("resume")
def test_a_resumed_run_is_bit_identical(
    ended: Any, place: str, entry: str, form: str, rank: int
) -> None:
    """Weights, moments, random state, teachers, memories and heads; without us is the premise.

    With BatchNorm the running statistics too where the strategy keeps them equal (ddp).
    """
    if form == "folder" and not PLACES[place].sharded:
        pytest.skip("ddp writes files")
    noted = ended(place, f"{form} {entry}", rank)
    assert noted["different"] == []
    assert noted["global_step"] == STEPS


@every_place
@pytest.mark.parametrize("form", FORMS)
def test_f38_a_checkpoint_with_a_head_is_resumed_without_it(
    ended: Any, place: str, form: str
) -> None:
    if form == "folder" and not PLACES[place].sharded:
        pytest.skip("ddp writes files")
    assert ended(place, f"{form} {HEAD}")["alone"] == STEPS


# --------------------------------------------------------------------------------- C8: checkpoints
@every_place
@every_case
def test_f09_the_file_has_the_users_keys_and_loads_into_their_module(
    ended: Any, place: str, entry: str
) -> None:
    saved = read(checkpoint(ended, place, entry))
    without = read(checkpoint(ended, place, WITHOUT))
    assert list(saved["state_dict"]) == list(without["state_dict"])
    assert set(saved) - set(without) == {"lightning_aux"}
    PLACES[place].whole(optimizer="adam").load_state_dict(saved["state_dict"], strict=True)
    assert [len(each["state"]) for each in saved["optimizer_states"]] == [
        len(each["state"]) for each in without["optimizer_states"]
    ]


@every_sharded_place
@every_case
def test_f09_the_folder_has_the_users_keys_and_loads_into_their_module(
    ended: Any, place: str, entry: str
) -> None:
    path = checkpoint(ended, place, entry, "folder")
    keys, expected = (
        sorted(FileSystemReader(each).read_metadata().state_dict_metadata)
        for each in (path, checkpoint(ended, place, WITHOUT, "folder"))
    )
    assert keys == expected
    module = PLACES[place].whole(optimizer="adam")
    state = {"state_dict": module.state_dict()}
    dcp.load(state, checkpoint_id=path, no_dist=True)
    module.load_state_dict(state["state_dict"], strict=True)
    # The same training wrote the file.
    whole = read(checkpoint(ended, place, entry))["state_dict"]
    assert furthest(dict(module.state_dict()), dict(whole)) == 0


@every_place
@every_comparable
@every_form
def test_f25_what_we_save_is_whole_and_that_of_one_process(
    ended: Any, place: str, entry: str, form: str, tmp_path: Path
) -> None:
    """Teachers, memories, heads and their moments: plain tensors of the parameters' own shapes."""
    if form == "folder" and not PLACES[place].sharded:
        pytest.skip("ddp writes files")
    path = checkpoint(ended, place, entry, form)
    here = read(path / META if form == "folder" else path)["lightning_aux"]
    alone = read(saved_by_one_process(PLACES[place], tmp_path, entry))["lightning_aux"]
    assert furthest(here, alone) < TOLERANCE
    if entry == "ema_teacher":
        weights = here["members"]["ema"]["weights"]
        assert {type(each) for each in weights.values()} == {torch.Tensor}
        if "uneven" in place:
            assert weights["head.0.weight"].shape == (5, 8)
            assert weights["head.2.weight"].shape == (1,)


def test_f80_weights_only_refuses_what_is_not_plain(tmp_path: Path) -> None:
    """Every checkpoint above is read with it."""
    torch.save({"path": Path("x")}, tmp_path / "a.pt")
    with pytest.raises(pickle.UnpicklingError):
        read(tmp_path / "a.pt")
