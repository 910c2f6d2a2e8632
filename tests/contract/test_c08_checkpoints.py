"""C8: a checkpoint is the user's: their keys, their raw weights, readable without us."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_aux.registry import ENTRIES
from tests.contract import models
from tests.contract.models import Classifier
from tests.contract.probe import Probe
from tests.contract.training import callbacks, fit, identical, loader, seeded, weights

SCRIPT = Path(__file__).with_name("plain_script.py")  # never imported here: it blocks the package
MODEL: dict[str, Any] = {"dropout": 0.1, "norm": True, "optimizer": "adam"}
CASES = [*ENTRIES, "head"]
every_case = pytest.mark.parametrize("case", CASES)


def train_and_save(added: list[Any], path: Path) -> Classifier:
    """Two epochs; saved by `ModelCheckpoint` at the end of the second, with validation before."""
    module = seeded(Classifier, **MODEL)
    saving = ModelCheckpoint(path.parent, path.stem, save_on_train_epoch_end=False)
    fit(module, [*added, saving], loader(), loader(16))
    assert path.exists()
    return module


def attached(case: str) -> list[Any]:
    return [Probe(0.5)] if case == "head" else list(callbacks(case))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of every case, with the weights that its module ended with beside it."""
    made = tmp_path_factory.mktemp("checkpoints")
    for case in CASES:
        module = train_and_save(attached(case), made / f"{case}.ckpt")
        torch.save(weights(module), made / f"{case}.weights")
    return made


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The checkpoint of the same training without us."""
    path = tmp_path_factory.mktemp("without") / "without.ckpt"
    train_and_save([], path)
    return read(path)


def read(path: Path) -> dict[str, Any]:
    """`weights_only=True` refuses everything but tensors and plain values."""
    saved: dict[str, Any] = torch.load(path, weights_only=True)
    return saved


@every_case
def test_f09_state_dict_has_the_keys_that_it_has_without_us(
    folder: Path, without: dict[str, Any], case: str
) -> None:
    saved = read(folder / f"{case}.ckpt")
    assert list(saved["state_dict"]) == list(without["state_dict"])


@every_case
def test_f31_everything_of_ours_is_under_one_key(
    folder: Path, without: dict[str, Any], case: str
) -> None:
    """No entry of ours among `callbacks`, `loops` or `optimizer_states`."""
    saved = read(folder / f"{case}.ckpt")
    assert set(saved) - set(without) == {"lightning_aux"}
    assert shape_of(saved["optimizer_states"]) == shape_of(without["optimizer_states"])
    assert list(saved["callbacks"]) == list(without["callbacks"])
    assert saved["hyper_parameters"] == without["hyper_parameters"]


@every_case
def test_the_saved_weights_are_the_raw_ones(folder: Path, case: str) -> None:
    ended = torch.load(folder / f"{case}.weights", weights_only=True)
    assert identical(dict(read(folder / f"{case}.ckpt")["state_dict"]), ended)


def test_f80_a_script_without_the_package_loads_and_resumes_every_checkpoint(folder: Path) -> None:
    """In a process that imports only torch and lightning, with `weights_only=True`."""
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), models.__file__, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert f"{len(CASES)} checkpoints" in finished.stdout


def test_a_head_is_not_among_the_modules_parameters_after_training() -> None:
    module = seeded(Classifier)
    before = [name for name, _ in module.named_parameters()]
    fit(module, [Probe(0.5)])
    assert [name for name, _ in module.named_parameters()] == before


def shape_of(nested: Any) -> Any:
    """The nest with tensors replaced by their shapes and numbers by their types."""
    if isinstance(nested, torch.Tensor):
        return tuple(nested.shape)
    if isinstance(nested, dict):
        return {key: shape_of(value) for key, value in nested.items()}
    if isinstance(nested, list | tuple):
        return [shape_of(value) for value in nested]
    return type(nested)
