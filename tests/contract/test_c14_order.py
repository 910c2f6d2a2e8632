"""C14: the order of callbacks in the list changes nothing, ours or Lightning's beside them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger

from lightning_aux import (
    DropoutSchedule,
    EarlyLearningRegularization,
    EMAAnchor,
    EMATeacher,
    FrozenTeacher,
    SelfDistillation,
    Taps,
)
from lightning_aux.registry import ENTRIES
from tests.contract.models import Classifier
from tests.contract.probe import Probe
from tests.contract.training import (
    INERT,
    every_trained,
    fit,
    identical,
    loader,
    optimizer_state,
    seeded,
    together,
    weights,
)


def everything() -> list[L.Callback]:
    """One of each kind, two terms on one teacher, and a term named to sort last."""
    return [
        Taps(logits="head"),
        EMATeacher(decay=0.9),
        FrozenTeacher(),
        SelfDistillation(weight="linear(0, 1, until=50%)", temperature=2.0),
        SelfDistillation(teacher="frozen", weight=0.3, name="zz"),
        EMAAnchor(weight=0.5, decay=0.8),
        EMAAnchor(space="weight", teacher="ema", weight=0.1, name="pull"),
        EarlyLearningRegularization(weight=0.4),
        DropoutSchedule(p=0.3, until="50%", shape="linear"),
        Probe(0.5),
    ]


def theirs(folder: Path) -> dict[str, Callable[[], L.Callback]]:
    """Lightning's callbacks that act on training or on what is saved."""
    return {
        "ModelCheckpoint": lambda: ModelCheckpoint(folder, monitor="val_loss", save_last=True),
        "EarlyStopping": lambda: EarlyStopping("val_loss", patience=1, min_delta=0.05),
        "LearningRateFinder": lambda: LearningRateFinder(num_training_steps=30, max_lr=0.3),
        "GradientAccumulationScheduler": lambda: GradientAccumulationScheduler({0: 1, 1: 2}),
    }


THEIRS = list(theirs(Path()))
every_neighbour = pytest.mark.parametrize("neighbour", THEIRS)


def outcome(added: list[Any], folder: Path, **arguments: Any) -> dict[str, Any]:
    module = seeded(Classifier, dropout=0.2, norm=True, optimizer="adam")
    options: dict[str, Any] = {"max_epochs": 4, "default_root_dir": folder} | arguments
    trainer = fit(module, added, loader(), loader(16), **options)
    return {
        "steps": trainer.global_step,
        "weights": weights(module),
        "optimizer": optimizer_state(trainer),
        "lr": module.lr,
    }


@pytest.fixture(scope="module")
def as_listed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Training with everything, in the order above."""
    return outcome(everything(), tmp_path_factory.mktemp("as_listed"))


@pytest.mark.parametrize("shuffle", range(6))
def test_any_order_of_our_callbacks_gives_the_same_training(
    as_listed: dict[str, Any], tmp_path: Path, shuffle: int
) -> None:
    added = everything()
    random.Random(shuffle).shuffle(added)
    assert identical(outcome(added, tmp_path), as_listed)


@every_neighbour
@every_trained
def test_before_or_after_lightnings_callbacks_is_the_same(
    tmp_path: Path, entry: str, neighbour: str
) -> None:
    make = theirs(tmp_path)[neighbour]
    first = outcome([*together(entry), make()], tmp_path)
    last = outcome([make(), *reversed(together(entry))], tmp_path)
    assert identical(first, last)


@pytest.mark.parametrize("shuffle", range(3))
def test_any_order_among_all_of_lightnings_callbacks_at_once(tmp_path: Path, shuffle: int) -> None:
    def run(seed: int) -> dict[str, Any]:
        added = [*everything(), *(make() for make in theirs(tmp_path).values())]
        random.Random(seed).shuffle(added)
        return outcome(added, tmp_path)

    assert identical(run(shuffle), run(100))


@every_neighbour
@pytest.mark.parametrize("entry", INERT)
def test_beside_lightnings_callbacks_weight_zero_still_changes_nothing(
    tmp_path: Path, entry: str, neighbour: str
) -> None:
    make = theirs(tmp_path)[neighbour]
    ours = outcome([*together(entry, 0.0), make()], tmp_path)
    assert identical(ours, outcome([make()], tmp_path))


@pytest.mark.parametrize("entry", [*ENTRIES, "head"])
def test_the_learning_rate_finder_moves_no_teacher_memory_or_schedule(
    tmp_path: Path, entry: str
) -> None:
    """Training after the search is training without it, at the rate that it found."""

    def run(lr: float, added: list[Any], *search: L.Callback) -> dict[str, Any]:
        module = seeded(Classifier, dropout=0.2, norm=True, optimizer="adam", lr=lr)
        options: dict[str, Any] = {"max_epochs": 4, "default_root_dir": tmp_path}
        fit(module, [*added, *search, Reseeding()], loader(), loader(16), **options)
        states = [each.state() for each in added]
        return {"lr": module.lr, "weights": weights(module), "states": states}

    def added() -> list[Any]:
        return [Probe(0.5)] if entry == "head" else list(together(entry))

    searched = run(0.05, added(), LearningRateFinder(num_training_steps=30, max_lr=0.3))
    assert searched["lr"] != 0.05
    assert identical(searched, run(searched["lr"], added()))


class Reseeding(L.Callback):
    """The same random state at the start of training, whatever ran before it."""

    def on_train_start(self, *_: Any) -> None:
        L.seed_everything(5, verbose=False)


def test_what_a_logger_gets_does_not_depend_on_the_order(tmp_path: Path) -> None:
    def rows(name: str, added: list[Any]) -> list[str]:
        logger = CSVLogger(tmp_path, name="", version=name)
        monitored = [*added, LearningRateMonitor()]
        outcome(monitored, tmp_path, logger=logger, log_every_n_steps=1)
        lines = (tmp_path / name / "metrics.csv").read_text().splitlines()
        columns = lines[0].split(",")
        order = sorted(range(len(columns)), key=columns.__getitem__)
        return [",".join(line.split(",")[column] for column in order) for line in lines]

    assert rows("one", everything()) == rows("other", everything()[::-1])
