"""The script that `test_soup_of_shards.py` runs: distributed checkpoints of two processes.

Lightning starts this file once more for the second process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

import lightning_aux as aux
from tests.averages.two_ranks import Sharded
from tests.engine.small_models import rows


def main(folder: Path) -> None:
    L.seed_everything(3, verbose=False)
    module = Sharded()
    saving = ModelCheckpoint(folder, "{epoch}", monitor="val_loss", save_top_k=-1)
    soup, mix = aux.ModelSoup("val_loss", "min"), aux.WiSEFT("val_loss", "min", coefficients=[0.6])
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_epochs=2,
        callbacks=[saving, soup, mix, aux.EMAWeights(decay=0.9)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, rows(), rows(16))
    seen = {
        "history": module.history,
        "scores": soup.soup.scores,
        "score": soup.soup.score,
        "members": soup.soup.members,
        "curve": mix.curve,
    }
    torch.save(seen, folder / f"seen.{os.environ.get('LOCAL_RANK', '0')}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
