"""The script that `test_second_pass.py` runs: a second pass under ``ddp`` and FSDP2.

Lightning starts this file once more for the second process. Each process writes what it ended with.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard

from tests.engine.small_models import rows
from tests.engine.test_second_pass import Folded, FoldedByHand, Normed


class Sharding(L.LightningModule):
    def configure_model(self) -> None:
        if not isinstance(self.encoder, FSDPModule):
            for part in (self.encoder, self.classifier):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


class Sharded(Sharding, Normed): ...


class ShardedByHand(Sharding, FoldedByHand): ...


def ended(kind: type[L.LightningModule], strategy: Any, callbacks: list[Any]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model = kind()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=2,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, rows())
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        for name, value in model.state_dict().items()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), os.environ.get("LOCAL_RANK", "0")
    runs = {
        "ddp": (
            lambda: DDPStrategy(broadcast_buffers=True, find_unused_parameters=False),
            (Normed, FoldedByHand),
        ),
        "fsdp2": (
            lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
            (Sharded, ShardedByHand),
        ),
    }
    for name, (strategy, (plain, by_hand)) in runs.items():
        results = {
            "attached": ended(plain, strategy(), [Folded(0.5)]),
            "by hand": ended(by_hand, strategy(), []),
            "plain": ended(plain, strategy(), []),
        }
        torch.save(results, folder / f"{name}.{rank}.pt")
