"""Distributed checkpoints, folders that no file of weights is in: read like files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as distributed

import lightning_aux as aux
from lightning_aux.weights import export, uniform_soup
from lightning_aux.weights.files import read_checkpoint, weights_in
from tests.engine.small_models import Classifier, equal, rows

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled")


def as_folder(checkpoint: dict[str, Any], path: Path, key: str = "state_dict") -> None:
    """As Lightning's ModelParallelStrategy saves it, from one process; FSDPStrategy has a key."""
    rest = dict(checkpoint)
    distributed.save({key: rest.pop("state_dict")}, checkpoint_id=path, no_dist=True)
    rest.pop("optimizer_states", None)
    torch.save(rest, path / "meta.pt")


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_an_average_in_a_folder_is_exported_as_from_a_file(plain_trainer, tmp_path, key):
    trainer = plain_trainer(callbacks=[aux.EMATeacher(0.9)])
    trainer.fit(Classifier(), rows())
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    saved = torch.load(tmp_path / "file.ckpt", weights_only=True)
    as_folder(saved, tmp_path / "folder.ckpt", key)
    for kind in ("file", "folder"):
        export(tmp_path / f"{kind}.ckpt", tmp_path / f"{kind}.out")
    one, other = (torch.load(tmp_path / f"{k}.out", weights_only=True) for k in ("file", "folder"))
    assert one.keys() == other.keys()
    assert equal(one["state_dict"], other["state_dict"])
    Classifier().load_state_dict(other["state_dict"], strict=True)


def test_soups_are_made_of_folders_and_files(tmp_path):
    states = [{"w": torch.randn(3, 2), "n": torch.tensor(i)} for i in range(3)]
    for number, state in enumerate(states[:2]):
        as_folder({"state_dict": state, "epoch": number}, tmp_path / f"{number}")
    torch.save({"state_dict": states[2]}, tmp_path / "2")
    uniform_soup([tmp_path / "0", tmp_path / "1", tmp_path / "2"], tmp_path / "soup.ckpt")
    soup = torch.load(tmp_path / "soup.ckpt", weights_only=True)
    assert soup["epoch"] == 0
    mean = torch.stack([each["w"] for each in states]).double().mean(0).float()
    assert torch.equal(soup["state_dict"]["w"], mean)
    assert soup["state_dict"]["n"] == 0


def test_entries_that_are_no_tensors_are_whole_and_nothing_runs(tmp_path):
    extra = {"deep": {"x": 1}, "w": torch.ones(2)}
    as_folder({"state_dict": {"a._extra_state": extra, "w": torch.ones(1)}}, tmp_path / "c")
    found = dict(weights_in(read_checkpoint(tmp_path / "c", "test"), "test"))
    assert found["a._extra_state"]["deep"] == {"x": 1}
    assert torch.equal(found["a._extra_state"]["w"], torch.ones(2))

    as_folder({"state_dict": {"w": torch.ones(1), "s": Path("x")}}, tmp_path / "d")
    with pytest.raises(aux.AuxiliaryError, match=r"(?s)'s' cannot be read .* Unsupported"):
        dict(weights_in(read_checkpoint(tmp_path / "d", "test"), "test"))


def test_folders_that_hold_no_weights_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        aux.AuxiliaryError, match=r"empty' is a folder, and not one that .*metadata"
    ):
        export(tmp_path / "empty", tmp_path / "out.ckpt")
    distributed.save({"other": {"w": torch.ones(1)}}, checkpoint_id=tmp_path / "c", no_dist=True)
    with pytest.raises(aux.AuxiliaryError, match="no weights under 'state_dict' or 'model'"):
        export(tmp_path / "c", tmp_path / "out.ckpt")
