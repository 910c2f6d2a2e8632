"""The script that `test_two_ranks.py` runs: teachers in two processes, ``ddp`` and FSDP2.

Lightning starts this file once more for the second process. Each process writes what its teacher
held in every step, with and without checkpoints saved in between.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

import lightning_aux as aux
from tests.engine.small_models import WIDTH, Blind, Classifier, rows


class Saving(L.Callback):
    """Saves after every batch: after the optimizer step, before the next forward."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.folder.mkdir(exist_ok=True)
        trainer.save_checkpoint(self.folder / "any.ckpt")


class Normed(Classifier):
    """BatchNorm statistics differ between the ranks until ``ddp`` makes them equal."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Tanh())


class Forgetful(Classifier):
    """Sharded, and after every step without a gradient and without an optimizer state."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_model(self) -> None:
        if not isinstance(self.encoder, FSDPModule):
            fully_shard(self.encoder, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.classifier, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()
        self.optimizers().zero_grad()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def updates(folder: Path) -> list[int]:
    """Of a teacher whose model is saved after every step, and the steps that were taken."""
    teacher = aux.EMATeacher()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_epochs=1,
        callbacks=[teacher, Saving(folder / "sharded")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Forgetful(), rows())
    return [teacher.updates, trainer.global_step]


def held(buffers: Any, start: int, callbacks: list[L.Callback]) -> list[dict[str, torch.Tensor]]:
    """The values of the teacher in every step that has some."""
    torch.manual_seed(3)
    teacher = aux.EMATeacher(decay=0.6, buffers=buffers, start=start)
    probe = Blind(
        lambda step: teacher.store and {n: v.clone() for n, v in teacher.store.state_dict().items()}
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_epochs=2,
        callbacks=[teacher, probe, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Normed(), rows(shuffle=True))
    return [each for each in probe.seen if each is not None]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), os.environ.get("LOCAL_RANK", "0")
    for buffers in ("copy", "average"):
        for start in (0, 2):
            results = [held(buffers, start, extra) for extra in ([], [Saving(folder)])]
            torch.save(results, folder / f"{buffers}.{start}.{rank}.pt")
    torch.save(updates(folder), folder / f"updates.{rank}.pt")
