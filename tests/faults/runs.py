"""Training that a fault can strike at any named place, and what it has come to at the end."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_aux import (
    DropoutSchedule,
    EarlyLearningRegularization,
    EMAAnchor,
    EMATeacher,
    SelfDistillation,
)
from lightning_aux.engine import Attached
from tests.contract.models import Classifier, EpochShuffle, Samples
from tests.contract.probe import Probe
from tests.contract.training import loader, quiet_trainer, seeded

BATCHES, EPOCHS = 3, 2
WEIGHT = "linear(0.2, 1, until=100%)"
# What a checkpoint holds beside the state of training: paths, versions, hyperparameters.
NOT_STATE = ("callbacks", "loops", "hparams_name", "hyper_parameters", "pytorch-lightning_version")
HOOKS = sorted(
    name
    for name in vars(L.Callback)
    if name.startswith("on_") or name in ("setup", "teardown", "state_dict")
)

Here = Callable[[str], None]


def nowhere(place: str) -> None:
    """No fault at all."""


class Once:
    """Raises ``error`` when a place is passed for the n-th time, and never again."""

    def __init__(self, place: str, nth: int, error: Callable[[], BaseException]) -> None:
        self.place, self.left, self.error = place, nth, error

    def __call__(self, place: str) -> None:
        if place == self.place:
            self.left -= 1
            if self.left == 0:
                raise self.error()


def several() -> list[Attached]:
    """A teacher and its term, an anchor, a memory, a head and a schedule, all at once."""
    return [
        EMATeacher(decay=0.9, warmup=True),
        SelfDistillation(weight=WEIGHT),
        EMAAnchor(weight=0.3, decay=0.8),
        EarlyLearningRegularization(weight=0.5),
        Probe(WEIGHT),
        DropoutSchedule(p=0.4, until="60%", shape="linear"),
    ]


def several_without_effect() -> list[Attached]:
    """The same at weight 0, and no schedule: training is as without them."""
    return [
        EMATeacher(decay=0.9, warmup=True),
        SelfDistillation(weight=0.0),
        EMAAnchor(weight=0.0, decay=0.8),
        EarlyLearningRegularization(weight=0.0),
        Probe(0.0),
    ]


class Struck(Classifier):
    """The contract's classifier, which says where it is in ``here``."""

    here: Here = staticmethod(nowhere)

    def forward(self, x: Tensor) -> Tensor:
        features = self.encoder(x)
        teaches = self.trainer.training and not torch.is_grad_enabled()
        self.here("teacher's forward" if teaches else "forward")
        return self.head(features)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.here("training_step")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.here("validation_step")

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        step = optimizer.step

        def told(closure: Callable[[], Any]) -> Any:
            def then_told() -> Any:
                loss = closure()
                self.here("optimizer.step")
                return loss

            returned = step(then_told)
            self.here("after optimizer.step")
            return returned

        optimizer.step = told
        return optimizer


class Hooks(L.Callback):
    """Says in ``here`` which of Lightning's hooks is called."""

    def __init__(self, here: Here) -> None:
        self.here = here


def _hook(name: str) -> Callable[..., Any]:
    def hook(self: Hooks, *_: Any, **__: Any) -> Any:
        self.here(name)
        return {} if name == "state_dict" else None

    return hook


for _name in HOOKS:
    setattr(Hooks, _name, _hook(_name))


class InHalves(TorchCheckpointIO):
    """Writes to the file itself, in two halves, as file systems without a rename have it."""

    def __init__(self, here: Here) -> None:
        self.here = here

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        written = content.getvalue()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb", buffering=0) as file:
            file.write(written[: len(written) // 2])
            self.here("half written")
            file.write(written[len(written) // 2 :])
        self.here(f"written {Path(path).name}")


class Resumable(DataLoader[Any]):
    """Goes on after the last batch that was trained to its end.

    The contract's loader counts batches as they are fetched, and so passes over the one in which
    an exception was raised.
    """

    trainer: L.Trainer
    skip = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        skip, self.skip = self.skip, 0
        for place, batch in enumerate(super().__iter__()):
            if place >= skip:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {
            "done": self.trainer.fit_loop.epoch_loop.batch_progress.current.processed % len(self)
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["done"]


class AtEnd(L.Callback):
    """Saves what training has come to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


class AfterTraining(ModelCheckpoint):
    """At the end of the training epoch (Lightning wants another class for another state)."""


def saving(folder: Path) -> list[L.Callback]:
    """After every optimizer step, after validation and after every epoch, in that order."""
    every: dict[str, Any] = {"save_top_k": -1, "auto_insert_metric_name": False}
    return [
        ModelCheckpoint(folder, "{step:02d}-a", every_n_train_steps=1, **every),
        ModelCheckpoint(folder, "{step:02d}-b", save_on_train_epoch_end=False, **every),
        AfterTraining(folder, "{step:02d}-c", save_on_train_epoch_end=True, **every),
    ]


def prepared(
    added: Sequence[L.Callback],
    folder: Path,
    here: Here = nowhere,
    model: dict[str, Any] | None = None,
    resumed: bool = False,
    kind: type[Struck] = Struck,
    **arguments: Any,
) -> tuple[Struck, L.Trainer, Callable[..., None]]:
    """A module, a Trainer, and the function that trains; it takes the arguments of ``fit``."""
    usual = {"dropout": 0.2, "norm": True, "optimizer": "adam", "reseeds": True}
    module = seeded(kind, **(usual | (model or {})))
    if resumed:  # what is restored must come from the checkpoint alone
        for parameter in module.parameters():
            nn.init.constant_(parameter, 3.0)
    module.here = here
    options: dict[str, Any] = {"max_epochs": EPOCHS, "num_sanity_val_steps": 0}
    options["plugins"] = [InHalves(here)]
    # First in the list: Lightning's own average ends by copying itself into the module.
    trainer = quiet_trainer([AtEnd(folder / "end"), *added], **(options | arguments))
    data = Resumable(Samples(8 * BATCHES), batch_size=8, sampler=EpochShuffle(8 * BATCHES))
    data.trainer = trainer

    def train(**keywords: Any) -> None:
        L.seed_everything(1, verbose=False)
        trainer.fit(module, data, loader(8), **keywords)

    return module, trainer, train


def ended(
    added: Sequence[L.Callback],
    folder: Path,
    ckpt_path: Path | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Train to the end, from a checkpoint if there is one, and return everything that is left."""
    folder.mkdir(parents=True, exist_ok=True)
    _, trainer, train = prepared(added, folder, resumed=ckpt_path is not None, **arguments)
    train(ckpt_path=ckpt_path)
    if not (folder / "end").exists():  # Lightning passes over training that was already finished
        trainer.save_checkpoint(folder / "end")
    return state_in(folder / "end")


def state_in(path: Path) -> dict[str, Any]:
    """Weights, moments and everything of ours in a checkpoint."""
    saved = torch.load(path, weights_only=True)
    return {key: value for key, value in saved.items() if key not in NOT_STATE}
