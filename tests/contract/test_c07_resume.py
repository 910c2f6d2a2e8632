"""C7: a run that was stopped and resumed is bit-identical to one that never stopped.

Only for models whose resume is exact without us; the first test shows that this one's is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.utils.data import DataLoader

from lightning_aux import EMATeacher, SelfDistillation, StochasticDepthSchedule
from lightning_aux.engine import Attached
from tests.contract.models import Classifier, EpochShuffle, ResumableLoader, Samples
from tests.contract.probe import Probe
from tests.contract.training import (
    callbacks,
    every_trained,
    fit,
    identical,
    loader,
    optimizer_state,
    quiet_trainer,
    seeded,
    together,
    weights,
)

pytestmark = pytest.mark.vouches("resume")

WEIGHT = "linear(0.2, 1, until=100%)"
MODEL: dict[str, Any] = {"dropout": 0.2, "norm": True, "optimizer": "adam", "reseeds": True}
EPOCHS, STEPS = 4, 5


class Failure(L.Callback):
    """Raises once a given number of optimizer steps has been taken."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.at:
            raise RuntimeError("stopped here")


class SavingFirst(L.Callback):
    """Saves on an exception; unlike Lightning's own, it may stand before us in the list."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


def train(
    added: Sequence[L.Callback], ckpt_path: Path | None = None, **arguments: Any
) -> tuple[Classifier, L.Trainer]:
    module = seeded(Classifier, **MODEL)
    if ckpt_path is not None:  # what is restored must come from the checkpoint alone
        torch.nn.init.zeros_(module.head.weight)
    data = ResumableLoader(Samples(8 * STEPS), batch_size=8, sampler=EpochShuffle(8 * STEPS))
    options: dict[str, Any] = {"max_epochs": EPOCHS, "ckpt_path": ckpt_path} | arguments
    return module, fit(module, added, data, loader(16), **options)


def stopped_mid_epoch(added: list[L.Callback], folder: Path, **arguments: Any) -> Path:
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=7, save_top_k=-1)
    train([*added, saving], **arguments)
    return folder / "step=7.ckpt"


def stopped_after_validation(added: list[L.Callback], folder: Path, **arguments: Any) -> Path:
    saving = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
    train([*added, saving], **arguments)
    return folder / "epoch=1.ckpt"


def stopped_by_exception(added: list[L.Callback], folder: Path, **arguments: Any) -> Path:
    with pytest.raises(RuntimeError, match="stopped here"):
        train([*added, OnExceptionCheckpoint(folder), Failure(8)], **arguments)
    return folder / "on_exception.ckpt"


def stopped_by_exception_saved_before_us(
    added: list[L.Callback], folder: Path, **arguments: Any
) -> Path:
    with pytest.raises(RuntimeError, match="stopped here"):
        train([SavingFirst(folder / "first.ckpt"), *added, Failure(8)], **arguments)
    return folder / "first.ckpt"


STOPS = [
    stopped_mid_epoch,
    stopped_after_validation,
    stopped_by_exception,
    stopped_by_exception_saved_before_us,
]
every_stop = pytest.mark.parametrize("stop", STOPS, ids=[stop.__name__ for stop in STOPS])
every_window = pytest.mark.parametrize("window", [1, 2], ids=["", "accumulated"])


def ended(module: Classifier, trainer: L.Trainer, added: Sequence[Any]) -> dict[str, Any]:
    return {
        "steps": trainer.global_step,
        "weights": weights(module),
        "optimizer": optimizer_state(trainer),
        "ours": [each.state() for each in added],
    }


@every_window
@every_stop
def test_premise_resume_of_this_model_is_exact_without_us(
    tmp_path: Path, stop: Any, window: int
) -> None:
    options = {"accumulate_grad_batches": window}
    expected = ended(*train([], **options), [])
    assert identical(ended(*train([], stop([], tmp_path, **options), **options), []), expected)


@cache
def never_stopped(entry: str, window: int) -> dict[str, Any]:
    added = together(entry, WEIGHT)
    return ended(*train(added, accumulate_grad_batches=window), added)


@every_window
@every_stop
@every_trained
def test_a_resumed_run_is_bit_identical(tmp_path: Path, entry: str, stop: Any, window: int) -> None:
    options = {"accumulate_grad_batches": window}
    checkpoint = stop(together(entry, WEIGHT), tmp_path, **options)
    resumed = together(entry, WEIGHT)
    actual = ended(*train(resumed, checkpoint, **options), resumed)
    expected = never_stopped(entry, window)
    assert [part for part in expected if not identical(actual[part], expected[part])] == []


@every_stop
def test_a_resumed_run_with_a_head_is_bit_identical(tmp_path: Path, stop: Any) -> None:
    def head_of(probe: Probe) -> list[torch.Tensor]:
        return [value.detach() for value in probe.head.parameters()]

    added = Probe(WEIGHT)
    expected = ended(*train([added]), [added])
    checkpoint = stop([Probe(WEIGHT)], tmp_path)
    resumed = Probe(WEIGHT)
    assert identical(ended(*train([resumed], checkpoint), [resumed]), expected)
    assert identical(head_of(resumed), head_of(added))


@every_stop
@pytest.mark.parametrize("start", [0, 6, 9, 50])
def test_f13_an_average_that_starts_late_survives_a_resume(
    tmp_path: Path, stop: Any, start: int
) -> None:
    """Stopped before and after the average begins; with its warm-up, which counts updates."""

    def make() -> list[Attached]:
        teacher = EMATeacher(decay=0.9, start=start, warmup=True, every=2)
        return [teacher, SelfDistillation(weight=WEIGHT)]

    added = make()
    expected = ended(*train(added), added)
    checkpoint = stop(make(), tmp_path)
    resumed = make()
    assert identical(ended(*train(resumed, checkpoint), resumed), expected)


@every_trained
def test_a_checkpoint_without_us_can_be_resumed_with_us(tmp_path: Path, entry: str) -> None:
    """Teachers begin from the loaded weights, schedules at the loaded step; a warning says so."""
    checkpoint = stopped_after_validation([], tmp_path)
    with pytest.warns(UserWarning, match="written without these callbacks"):
        _, trainer = train(together(entry, WEIGHT), checkpoint)
    assert trainer.global_step == EPOCHS * STEPS


@every_trained
def test_a_checkpoint_with_us_can_be_resumed_without_us(tmp_path: Path, entry: str) -> None:
    checkpoint = stopped_mid_epoch(together(entry, WEIGHT), tmp_path)
    _, trainer = train([], checkpoint)
    assert trainer.global_step == EPOCHS * STEPS


DRAWING = {
    "stochastic depth": lambda: [StochasticDepthSchedule(0.5, "encoder.1")],
    "teacher dropping": lambda: callbacks("multi_teacher_distillation", WEIGHT),
}


@pytest.mark.parametrize("drawing", DRAWING)
def test_a_resumed_run_draws_by_the_seed_of_the_run_not_of_the_process(
    tmp_path: Path, drawing: str
) -> None:
    """A script that does not seed has another one each time; what draws here is ours alone."""
    data = DataLoader(Samples(48), batch_size=8)

    def run(seed: int, ckpt_path: Path | None = None, **options: Any) -> dict[str, Any]:
        module, added = seeded(Classifier), DRAWING[drawing]()
        trainer = quiet_trainer([*added, *options.pop("saving", ())], max_epochs=3, **options)
        L.seed_everything(seed, verbose=False)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return weights(module)

    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    expected = run(1, saving=[saving])
    assert identical(run(2, tmp_path / "epoch=0.ckpt"), expected)
    assert not identical(run(2), expected)
