"""The script of ``test_two_processes.py``: a training in two processes with a real offline run.

Lightning starts this file once more for the second process of ``ddp``, and spawns both for
``ddp_spawn``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import DDPStrategy

import lightning_aux as aux
from tests.engine.small_models import Classifier, rows

STRATEGIES = {"ddp": "popen", "ddp_spawn": "spawn"}
NAMES = ("self_distillation", "ema_anchor")


def added() -> list[L.Callback]:
    return [
        aux.EMATeacher(decay=0.5),
        aux.SelfDistillation(weight=0.5),
        aux.EMAAnchor(space="weight", teacher="ema", weight=0.1),
        aux.GradientMonitor(every=1),
    ]


def fit(folder: Path, start: Any) -> None:
    torch.manual_seed(0)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", start_method=start),
        max_epochs=2,
        callbacks=added(),
        logger=WandbLogger(offline=True, save_dir=folder),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), rows(24))  # three batches of four for each process


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    fit(folder, STRATEGIES[folder.name])
