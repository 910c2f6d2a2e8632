"""Where the contract trains: one process, `ddp`, and FSDP2 with shards of equal and unequal size.

Every place has a twin in one process that trains on the same samples in the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, Dataset

from lightning_aux.functional.shards import gathered
from tests.contract.models import (
    CLASSES,
    FEATURES,
    HIDDEN,
    Classifier,
    EpochShuffle,
    ResumableLoader,
    Samples,
)
from tests.contract.training import quiet_trainer

# Four batches an epoch for each process: a window of three and an uneven one of one.
BATCH, BATCHES, WINDOW, EPOCHS, SEED = 16, 4, 3, 2, 1
STEPS = BATCHES * EPOCHS
# A collective that the other process does not join ends in an error, not in a waiting test.
PATIENCE = timedelta(seconds=30)


class Uneven(Classifier):
    """Two processes hold different parts: 5 rows are 3 and 2, one element is 1 and none.

    Deep and narrow, it would say the same of all samples for longer than it trains here.
    """

    def __init__(self, dropout: float = 0.0, norm: bool = False, **arguments: Any) -> None:
        super().__init__(dropout=dropout, norm=norm, **arguments)
        layers: list[nn.Module] = [nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, HIDDEN)]
        layers += [nn.BatchNorm1d(HIDDEN)] if norm else []
        self.encoder = nn.Sequential(*layers, nn.Tanh(), nn.Dropout(dropout))
        self.head = nn.Sequential(nn.Linear(HIDDEN, 5), nn.Linear(5, CLASSES), nn.PReLU())
        for layer in (*self.encoder, *self.head):
            if isinstance(layer, nn.Linear):
                layer.weight.data *= 2


class Sharded(Classifier):
    """Each part is sharded for itself, and the root holds nothing."""

    root = False

    def configure_model(self) -> None:
        if isinstance(self.encoder, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.encoder, mesh=mesh)
        fully_shard(self.head, mesh=mesh)
        if self.root:
            fully_shard(self, mesh=mesh)


class UnevenSharded(Sharded, Uneven):
    """As above, with a root that is sharded too."""

    root = True


@dataclass(frozen=True)
class Place:
    """How many processes train which model by which strategy.

    Attributes:
        column: What the support matrix calls it.
        model: The user's module.
        strategy: Makes Lightning's strategy; with arguments of its own.
        whole: The same module for one process.
        processes: How many train.
        rank: Which of them this is.
    """

    column: str
    model: type[Classifier]
    strategy: Callable[..., Any]
    whole: type[Classifier]
    processes: int = 2
    rank: int = 0

    @property
    def sharded(self) -> bool:
        return issubclass(self.model, Sharded)

    @property
    def one_process(self) -> Place:
        return replace(
            self, column="one process", model=self.whole, strategy=lambda: "auto", processes=1
        )


def ddp(**arguments: Any) -> DDPStrategy:
    """Lightning's default: a parameter without a gradient is an error, buffers follow rank 0."""
    options: dict[str, Any] = {"find_unused_parameters": False, "timeout": PATIENCE}
    return DDPStrategy(**options | arguments)


def fsdp2(save_distributed_checkpoint: bool = False) -> ModelParallelStrategy:
    """Sharded by what the module's `configure_model` says."""
    return ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        save_distributed_checkpoint=save_distributed_checkpoint,
        timeout=PATIENCE,
    )


PLACES = {
    "ddp": Place("ddp", Classifier, ddp, Classifier),
    "fsdp2": Place("FSDP2", Sharded, fsdp2, Classifier),
    "fsdp2_uneven": Place("FSDP2 uneven", UnevenSharded, fsdp2, Uneven),
}


def batches(place: Place, size: int = BATCH, samples: Dataset[Any] | None = None) -> DataLoader:
    """The same samples in every step, whether one process takes them or two take half each.

    Rank r takes entries r, r + 2, … of the permutation: both halves together are its next `size`.
    """
    data = Samples(size * BATCHES) if samples is None else samples
    if place.processes == 1:
        return ResumableLoader(data, batch_size=size, sampler=EpochShuffle(size * BATCHES, SEED))
    return ResumableLoader(data, batch_size=size // 2, shuffle=True)


def train(
    place: Place,
    added: Sequence[L.Callback],
    model: dict[str, Any] | None = None,
    data: Any = None,
    kind: type[Classifier] | None = None,
    strategy: dict[str, Any] | None = None,
    ckpt_path: Any = None,
    **options: Any,
) -> tuple[Classifier, L.Trainer]:
    """Fit and return the module and the Trainer.

    Args:
        place: Where.
        added: Callbacks.
        model: Arguments of the module.
        data: Batches, if not those of `batches`.
        kind: The module's class, if not that of the place.
        strategy: Arguments of Lightning's strategy.
        ckpt_path: What to resume from.
        options: Arguments of the Trainer.
    """
    # ddp takes the weights of rank 0, FSDP2 takes a part of each rank's: there they must agree.
    together = place.sharded or place.processes == 1
    torch.manual_seed(2 if together else 2 + place.rank)
    module = (kind or place.model)(**(model or {}))
    if ckpt_path is not None:  # what is restored must come from the checkpoint alone
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
    trainer = quiet_trainer(
        added,
        devices=place.processes,
        strategy=place.strategy(**(strategy or {})),
        **({"max_epochs": EPOCHS} | options),
    )
    L.seed_everything(SEED, verbose=False)  # Lightning's DistributedSampler takes its seed here
    torch.manual_seed(SEED + place.rank)
    trainer.fit(module, batches(place) if data is None else data, ckpt_path=ckpt_path)
    return module, trainer


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, gathered where they are sharded."""
    return {name: gathered(value).clone() for name, value in module.state_dict().items()}
