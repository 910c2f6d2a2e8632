"""The script that `test_gradient_monitor.py` runs: half of each batch for each of two processes.

Lightning starts this file once more for the second process; each writes what it has logged.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

import lightning_aux as aux
from tests.contract.models import Classifier, Samples
from tests.contract.training import fit, loader, seeded

RANK = int(os.environ.get("LOCAL_RANK", "0"))


class Noting(Classifier):
    """Keeps what this process hands to the loggers."""

    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        ours = {k: float(v) for k, v in dictionary.items() if k.startswith("aux/gradients/")}
        self.noted = [*getattr(self, "noted", []), ours]


class Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if RANK == 1:
            raise RuntimeError("only here.")
        return gradient


class Failing(Noting):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = Refusing.apply(super().training_step(batch, batch_idx))
        return loss


def run(kind: type[Noting], **options: Any) -> list[dict[str, float]]:
    """A term of each sample, and one of the whole encoder that all processes compute alike."""
    module = seeded(kind)
    added = [aux.GradientMonitor(every=2), aux.LabelSmoothing(0.5), aux.ParameterAnchor(weight=0.3)]
    data = loader()
    if options:
        data = DataLoader(Subset(Samples(), range(RANK, 40, 2)), batch_size=4)
    fit(module, added, data, max_epochs=1, log_every_n_steps=1, **options)
    noted: list[dict[str, float]] = module.noted
    return noted


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    two = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    (folder / f"logged.{RANK}.json").write_text(json.dumps(run(Noting, **two)))
    try:
        run(Failing, **two)
    except Exception as error:
        said = type(error).__name__, str(error)
        (folder / f"raised.{RANK}.json").write_text(json.dumps(said))
