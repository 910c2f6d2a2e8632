"""The script that `test_c03_two_processes.py` runs: every entry under `ddp` with two processes.

Lightning starts this file once more for the second process. Each process writes what it ended with.
"""

from __future__ import annotations

import os
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightning_aux.engine import Attached
from lightning_aux.registry import ENTRIES
from tests.contract.models import Classifier, Samples
from tests.contract.probe import Probe
from tests.contract.training import TERMS, callbacks, quiet_trainer, weights

SAMPLES, BATCH, EPOCHS, SEED = 48, 16, 4, 1


def jobs() -> dict[str, tuple[list[Attached], dict[str, Any], dict[str, Any]]]:
    """Name to callbacks, arguments of the model, arguments of the Trainer."""
    found: dict[str, tuple[list[Attached], dict[str, Any], dict[str, Any]]] = {}
    for entry in ENTRIES:
        found[entry] = callbacks(entry), {}, {}
        found[f"{entry} with BatchNorm"] = callbacks(entry), {"norm": True}, {}
    for entry in TERMS:
        found[f"{entry} accumulated"] = callbacks(entry), {}, {"accumulate_grad_batches": 3}
    found["head"] = [Probe()], {}, {}
    return found


class InUse(L.Callback):
    """Copies the state of every member while a step uses it.

    BatchNorm statistics of ranks differ between an optimizer step and the next forward, where ddp
    makes them equal; in between nobody looks at a teacher.
    """

    def __init__(self, members: list[Attached]) -> None:
        self.members = members
        self.states: list[dict[str, Any]] = []

    def on_before_backward(self, *_: Any) -> None:
        self.states.append(deepcopy({each.name: each.state() for each in self.members}))


def run(name: str, folder: Path, rank: int) -> None:
    added, model, options = jobs()[name]
    # Ranks that begin with other weights, as without a seed: ddp makes them those of rank 0.
    torch.manual_seed(2 + rank)
    module = Classifier(**model)
    in_use = InUse([*added, *(companion for each in added for companion in each.companions())])
    trainer = quiet_trainer(
        [*added, in_use],
        devices=2,
        strategy=DDPStrategy(find_unused_parameters=False),
        max_epochs=EPOCHS,
        logger=DummyLogger(),
        log_every_n_steps=1,
        **options,
    )
    L.seed_everything(SEED, verbose=False)  # Lightning's DistributedSampler takes its seed here
    torch.manual_seed(SEED + rank)
    trainer.fit(module, DataLoader(Samples(SAMPLES), batch_size=BATCH // 2, shuffle=True))
    ended = {
        "weights": weights(module),
        "states": in_use.states,
        "head": [value.detach() for value in head_parameters(added)],
        "logged": sorted(trainer.logged_metrics),
    }
    torch.save(ended, folder / f"{name}.{trainer.global_rank}.pt")


def head_parameters(added: list[Attached]) -> list[torch.Tensor]:
    """Those of every callback that has a head."""
    return [value for each in added if hasattr(each, "head") for value in each.head.parameters()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in jobs():
        run(job, Path(sys.argv[1]), int(os.environ.get("LOCAL_RANK", "0")))
