"""The script that `test_two_ranks.py` runs: teachers of a model with BatchNorm under ``ddp``.

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
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

import lightning_aux as aux
from tests.engine.small_models import WIDTH, Blind, Classifier, rows


class Saving(L.Callback):
    """Saves after every batch: after the optimizer step, before the next forward."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / "any.ckpt")


class Normed(Classifier):
    """BatchNorm statistics differ between the ranks until ``ddp`` makes them equal."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Tanh())


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
