"""The script that `test_gradient_direction.py` runs: three mini-batches for two processes.

Lightning starts this file once more for the second process; each writes what it has measured.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_aux as aux
from tests.contract.models import Classifier, Samples
from tests.contract.training import fit, seeded

RANK = int(os.environ.get("LOCAL_RANK", "0"))


class Communicating(Classifier):
    """Waits for the other process in every step, as SyncBatchNorm does."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        dist.all_reduce(torch.ones(5))
        return super().training_step(batch, batch_idx)


class Failing(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if RANK == 1:
            raise ValueError("only here")
        return super().training_step(batch, batch_idx)


def run(kind: type[Classifier]) -> aux.GradientDirection:
    callback = aux.GradientDirection(batches=3, full=5, every="100%")
    data = DataLoader(Samples(40), 8)
    two = {"devices": 2, "strategy": "ddp", "max_epochs": 1}
    fit(seeded(kind, norm=True), [callback], data, **two)
    return callback


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = run(Communicating).measured[0][1]
    (folder / f"measured.{RANK}.json").write_text(json.dumps(found))
    try:
        run(Failing)
    except Exception as error:
        said = type(error).__name__, str(error)
        (folder / f"raised.{RANK}.json").write_text(json.dumps(said))
