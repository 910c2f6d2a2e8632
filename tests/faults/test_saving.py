"""Saving touches nothing that trains, by whatever policy, and neither does a save that fails."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn

from tests.contract.test_c12_leave_no_trace import differing, trace
from tests.contract.training import identical, weights
from tests.faults.runs import Hooks, Once, Struck, ended, prepared, several, state_in

# Lightning says that an OnExceptionCheckpoint is looked for, or is not there when it resumes.
pytestmark = pytest.mark.filterwarnings("ignore:.*ckpt_path:UserWarning")
STEPS = 6


def fingerprint(module: nn.Module) -> list[Any]:
    """Content, place in memory and version of everything that is live, modes and gradients."""
    live = [*module.parameters(), *module.buffers()]
    return [
        sha256(b"".join(each.detach().numpy().tobytes() for each in live)).hexdigest(),
        [(each.data_ptr(), each._version, each.requires_grad) for each in live],
        [each.training for each in module.modules()],
    ]


class Watched(L.Callback):
    """Looks at the live module and the optimizer before, in and after every save."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.loads: list[str] = []
        self._during: list[Any] = []

    def watch(self, module: Struck, trainer: L.Trainer) -> None:
        save, load = trainer.save_checkpoint, module.load_state_dict

        def watched(path: Any, *args: Any, **kwargs: Any) -> None:
            before, held = fingerprint(module), self._held(trainer)
            self._during.clear()
            try:
                save(path, *args, **kwargs)
            finally:
                assert fingerprint(module) == before
                assert self._held(trainer) == held
                assert all(each == before for each in self._during)
                self.files.append(Path(path).name)
            written = torch.load(path, weights_only=True)
            assert identical(dict(written["state_dict"]), weights(module))

        trainer.save_checkpoint = watched  # type: ignore[method-assign]
        module.load_state_dict = lambda *a, **k: (self.loads.append("load"), load(*a, **k))[1]

    @staticmethod
    def _held(trainer: L.Trainer) -> list[Any]:
        """Which parameters the optimizer trains, in order, and for which it has moments."""
        (optimizer,) = trainer.optimizers
        groups = [[id(each) for each in group["params"]] for group in optimizer.param_groups]
        return [groups, {id(each) for each in optimizer.state}]

    def on_save_checkpoint(self, _: Any, module: Any, checkpoint: Any) -> None:
        self._during.append(fingerprint(module))


POLICIES: dict[str, tuple[Callable[[Path], L.Callback], int]] = {
    "top-k": (lambda folder: ModelCheckpoint(folder, monitor="val_loss", save_top_k=2), 2),
    "last": (lambda folder: ModelCheckpoint(folder, save_top_k=0, save_last=True), 1),
    "best and last": (
        lambda folder: ModelCheckpoint(folder, monitor="val_loss", save_last=True),
        2,
    ),
    "every_n_train_steps": (
        lambda folder: ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1),
        STEPS // 2,
    ),
    "train_time_interval": (
        lambda folder: ModelCheckpoint(folder, train_time_interval=timedelta(0), save_top_k=-1),
        STEPS,
    ),
    "after the training epoch": (
        lambda folder: ModelCheckpoint(folder, save_on_train_epoch_end=True),
        2,
    ),
    "weights only": (lambda folder: ModelCheckpoint(folder, save_weights_only=True), 2),
    "on_exception": (lambda folder: OnExceptionCheckpoint(folder), 1),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_f08_no_save_policy_touches_the_live_weights(tmp_path: Path, policy: str) -> None:
    make, saves = POLICIES[policy]
    fails = policy == "on_exception"
    here = Once("training_step", 5 if fails else 0, lambda: RuntimeError("stopped here"))
    watched = Watched()
    added = [*several(), watched, make(tmp_path / "saved")]
    module, trainer, train = prepared(added, tmp_path, here, plugins=[])
    watched.watch(module, trainer)
    if fails:
        with pytest.raises(RuntimeError, match="stopped here"):
            train()
    else:
        train()
        saves += 1  # the one at the end, of these tests
    assert len(watched.files) >= saves
    assert watched.loads == []


# ------------------------------------------------------------------------------------ a full disk
def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


class Disk:
    """Is full where and while it is told to be; as ``here`` of a training."""

    def __init__(self, place: str) -> None:
        self.place, self.full, self.failed = place, False, 0

    def __call__(self, place: str) -> None:
        if self.full and place == self.place:
            self.failed += 1
            raise full()


class Saving(ModelCheckpoint):
    """Saves after every optimizer step; may go on without a file that could not be written."""

    def __init__(self, folder: Path, disk: Disk, goes_on: bool) -> None:
        super().__init__(folder, every_n_train_steps=1, save_top_k=-1)
        self.disk, self.goes_on, self.lost = disk, goes_on, 0

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        self.disk.full = True
        try:
            super()._save_checkpoint(trainer, filepath)
        except OSError:
            self.lost += 1
            if not self.goes_on:
                raise
        finally:
            self.disk.full = False


class Stateful(Struck):
    """Says so when the optimizer's state is asked for, and when torch writes."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        state_dict = optimizer.state_dict

        def told() -> Any:
            self.here("optimizer.state_dict")
            return state_dict()

        optimizer.state_dict = told
        return optimizer


# Where the disk may be full: in Lightning's writing, in the states it asks for, in a callback.
PLACES = ["half written", "torch.save", "optimizer.state_dict", "on_save_checkpoint"]
every_place = pytest.mark.parametrize("place", PLACES)
every_position = pytest.mark.parametrize("first", [True, False], ids=["before us", "after us"])


def on_a_full_disk(
    ours: list[Any],
    folder: Path,
    place: str,
    first: bool,
    goes_on: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Struck, L.Trainer, Saving]:
    folder.mkdir()
    disk = Disk(place)
    write = torch.save

    def torch_save(checkpoint: Any, file: Any) -> None:
        if disk.full and place == "torch.save":
            write({key: checkpoint[key] for key in list(checkpoint)[:3]}, file)
        disk("torch.save")
        write(checkpoint, file)

    monkeypatch.setattr(torch, "save", torch_save)
    saving, hooks = Saving(folder, disk, goes_on), Hooks(disk)
    added = [hooks, *ours, saving] if first else [*ours, hooks, saving]
    module, trainer, train = prepared(added, folder, disk, kind=Stateful)
    if goes_on:
        train()
    else:
        with pytest.raises(OSError, match="No space left"):
            train()
    monkeypatch.undo()
    assert saving.lost == disk.failed == (STEPS if goes_on else 1)
    return module, trainer, saving


@pytest.fixture(scope="module")
def never_saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ended(several(), tmp_path_factory.mktemp("never_saved"))


@every_position
@every_place
def test_training_goes_on_after_a_save_that_failed_as_if_it_had_not_been_tried(
    tmp_path: Path,
    place: str,
    first: bool,
    never_saved: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Heads are back in the optimizer, teachers and memories as they were."""
    on_a_full_disk(several(), tmp_path / "run", place, first, True, monkeypatch)
    after = state_in(tmp_path / "run" / "end")
    assert [part for part in never_saved if not identical(after[part], never_saved[part])] == []


@every_position
@every_place
def test_nothing_of_ours_remains_after_a_save_that_nobody_caught(
    tmp_path: Path, place: str, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def left(ours: list[Any], name: str) -> tuple[dict[str, Any], Struck, L.Trainer]:
        module, trainer, _ = on_a_full_disk(ours, tmp_path / name, place, first, False, monkeypatch)
        return trace(module, trainer, trainer.train_dataloader), module, trainer

    before, _, _ = left([], "without")
    after, module, trainer = left(several(), "with")
    assert differing(after, before) == {}
    (optimizer,) = trainer.optimizers
    own = set(module.parameters())
    assert {each for group in optimizer.param_groups for each in group["params"]} == own
    assert set(optimizer.state) <= own


class Limited(Disk):
    """The kernel refuses to write more than a few bytes into one file, while it is full."""

    LIMIT = 4096

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "full":
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            soft = self.LIMIT if value else hard
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        super().__setattr__(name, value)


def test_a_file_size_limit_of_the_kernel_fails_the_save_and_nothing_else(
    tmp_path: Path, never_saved: dict[str, Any]
) -> None:
    """In a child of its own, with Lightning's own way of writing: to a temporary file first."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails with an error
            saving = Saving(tmp_path / "saved", Limited("nowhere"), goes_on=True)
            _, _, train = prepared([*several(), saving], tmp_path, plugins=[])
            train()
            (tmp_path / "lost").write_text(str(saving.lost))
            status = 0
        finally:  # not back into the tests, whatever has happened
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert int((tmp_path / "lost").read_text()) == STEPS
    assert not list((tmp_path / "saved").glob("*.ckpt"))
    after = state_in(tmp_path / "end")
    assert [part for part in never_saved if not identical(after[part], never_saved[part])] == []
