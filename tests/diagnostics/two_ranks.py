"""Two processes validate on different numbers of samples; started by a test."""

from __future__ import annotations

import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, Subset

import lightning_aux as aux
from tests.contract.models import Classifier, Samples

# For each dataloader the samples of each process.
LOADERS = (
    (list(range(0, 23)), list(range(23, 40))),
    (list(range(0, 12)), []),
)


class Validated(Classifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])


class Owned(L.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def val_dataloader(self) -> Any:
        rank = self.trainer.global_rank
        return [DataLoader(Subset(Samples(40), each[rank]), batch_size=5) for each in LOADERS]


def main(folder: Path) -> None:
    torch.manual_seed(2)
    module = Validated()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(timeout=timedelta(seconds=30)),
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[aux.SelectiveClassification()],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.validate(module, datamodule=Owned(), verbose=False)
    with torch.no_grad():
        logits = module.eval()(Samples(40).x)
    result = {
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "logits": logits,
        "warnings": [str(each.message) for each in caught if "sync_dist" in str(each.message)],
    }
    torch.save(result, folder / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
