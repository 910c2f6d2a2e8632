"""The script that `test_two_ranks.py` runs: averages in two processes, ``ddp`` and FSDP2.

Lightning starts this file once more for the second process; each writes what it has seen.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F

import lightning_aux as aux
from lightning_aux.functional.shards import gathered
from tests.engine.small_models import Classifier, rows


class Whole(Classifier):
    """Keeps its weights after every step, and those that validation sees."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[dict[str, Tensor]] = []
        self.seen: list[dict[str, Tensor]] = []

    def now(self) -> dict[str, Tensor]:
        return {name: gathered(each).clone() for name, each in self.named_parameters()}

    def on_train_start(self) -> None:
        self.history.append(self.now())

    def on_train_batch_end(self, *_: Any) -> None:
        self.history.append(self.now())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.seen.append(self.now())
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("val_loss", loss, sync_dist=True)


class Sharded(Whole):
    """The same, sharded."""

    def configure_model(self) -> None:
        if not isinstance(self.encoder, FSDPModule):
            fully_shard(self.encoder, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.classifier, mesh=self.device_mesh["data_parallel"])


PLACES: dict[str, tuple[type[Whole], Any]] = {
    "ddp": (Whole, lambda: DDPStrategy(find_unused_parameters=False)),
    "fsdp2": (
        Sharded,
        lambda: ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
        ),
    ),
}


def fit(place: str, *callbacks: Any, saves: bool = False) -> tuple[Whole, L.Trainer]:
    kind, strategy = PLACES[place]
    L.seed_everything(3, verbose=False)
    module = kind()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy(),
        max_epochs=2,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=saves,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=sys.argv[1],
    )
    trainer.fit(module, rows(), rows(16))
    return module, trainer


class Holds(L.Callback):
    """How many values of the average are in this process's part of each checkpoint."""

    def __init__(self) -> None:
        self.values: list[int] = []

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        average = checkpoint["lightning_aux"]["members"]["ema_weights.teacher"]["weights"]
        there = [each for each in average.values() if each.device.type != "meta"]
        self.values.append(sum(each.numel() for each in there))


def again(place: str) -> dict[str, Any]:
    """Two fits of one Trainer, saved in between: the second goes on from the first."""
    average, holds = aux.EMAWeights(decay=0.9), Holds()
    module, trainer = fit(place, average, holds)
    trainer.save_checkpoint(Path(trainer.default_root_dir) / f"again.{place}.ckpt")
    halfway = len(module.history)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, rows(), rows(16))
    del module.history[halfway]  # with which the second fit began: the same once more
    assert average.own_teacher is not None
    assert average.own_teacher.store is not None
    values = {n: each.clone() for n, each in average.own_teacher.store.state_dict().items()}
    return {"held": holds.values, "history": module.history, "average": values}


def offloaded(place: str) -> dict[str, Any]:
    """What validation sees of an average in host memory, or the error."""
    try:
        module, _ = fit(place, aux.EMAWeights(decay=0.9, offload=True))
    except aux.AuxiliaryError as error:
        return {"said": str(error)}
    return {"seen": module.seen}


def results(place: str, folder: Path) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    saving = ModelCheckpoint(folder, "{epoch}", monitor="val_loss", save_top_k=-1)
    averaged, trainer = fit(place, aux.EMAWeights(decay=0.9), saving, saves=True)
    last = folder / "last.ckpt"
    trainer.save_checkpoint(last)
    ahead, _ = fit(place, aux.EMATeacher(0.9, lookahead=2))
    plain, _ = fit(place)

    soup = aux.ModelSoup("val_loss", "min", filename="soup.ckpt")
    mix = aux.WiSEFT("val_loss", "min", coefficients=[0.0, 0.6, 1.0])
    kept = ModelCheckpoint(folder / "soup", "{epoch}", monitor="val_loss", save_top_k=-1)
    mixed, _ = fit(place, soup, mix, kept, saves=True)
    return {
        "history": averaged.history,
        "seen": averaged.seen,
        "ahead": ahead.now(),
        "plain": plain.now(),
        "mixed": mixed.now(),
        "first": mixed.history[0],
        "curve": mix.curve,
        "soup": [soup.soup.score, len(soup.soup.members)],
        "paths": [str(soup.path), str(mix.path)],
        "again": again(place),
        "offloaded": offloaded(place),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    root, rank = Path(sys.argv[1]), int(os.environ.get("LOCAL_RANK", "0"))
    for name in PLACES:
        torch.save(results(name, root / name), root / f"{name}.{rank}.pt")
