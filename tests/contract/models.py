"""Small plain Lightning modules and data that the contract trains.

Nothing here imports `lightning_aux`: these are the user's files, and one of the tests runs them
where the package does not exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

FEATURES, HIDDEN, CLASSES = 6, 8, 4


class Samples(Dataset[Any]):
    """`(x, y)` pairs with noisy labels, or `(x, y, index)` for terms that are written by hand."""

    def __init__(self, n: int = 40, indexed: bool = False) -> None:
        random = torch.Generator().manual_seed(7)
        self.x = torch.randn(n, FEATURES, generator=random)
        scores = self.x @ torch.randn(FEATURES, CLASSES, generator=random)
        self.y = (scores + torch.randn(n, CLASSES, generator=random)).argmax(1)
        self.indexed = indexed

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        sample = (self.x[index], self.y[index])
        return (*sample, index) if self.indexed else sample


class Stream(IterableDataset[Any]):
    """The same samples without an index."""

    def __iter__(self) -> Iterator[Any]:
        samples = Samples()
        return (samples[index] for index in range(len(samples)))


class EpochShuffle(Sampler[int]):
    """A permutation that depends on seed and epoch only, the one of `DistributedSampler`."""

    def __init__(self, n: int, seed: int = 0) -> None:
        self.n, self.seed, self.epoch = n, seed, 0

    def __len__(self) -> int:
        return self.n

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(torch.randperm(self.n, generator=random).tolist())


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that goes on within an epoch, through Lightning's `state_dict` interface."""

    done = 0
    skip = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        skip, self.skip = self.skip, 0
        self.done = 0
        for batch in super().__iter__():
            self.done += 1
            if self.done > skip:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["done"]


class Classifier(L.LightningModule):
    """An MLP: `encoder`, with a dropout that may be off, then `head`.

    Args:
        dropout: Rate of the dropout in the encoder.
        norm: Whether the encoder has a BatchNorm.
        returns: What `training_step` returns, `"tensor"` or `"dict"`.
        manual: Manual optimisation.
        optimizer: `"sgd"` (with momentum) or `"adam"`.
        reseeds: Seed dropout by the step, so that a resumed run draws what the first would have.
    """

    def __init__(
        self,
        dropout: float = 0.0,
        norm: bool = False,
        returns: str = "tensor",
        manual: bool = False,
        optimizer: str = "sgd",
        lr: float = 0.05,
        reseeds: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        layers: list[nn.Module] = [nn.Linear(FEATURES, HIDDEN)]
        layers += [nn.BatchNorm1d(HIDDEN)] if norm else []
        self.encoder = nn.Sequential(*layers, nn.Tanh(), nn.Dropout(dropout))
        self.head = nn.Linear(HIDDEN, CLASSES)
        self.returns = returns
        self.automatic_optimization = not manual
        self.optimizer = optimizer
        self.lr = lr
        self.reseeds = reseeds

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))

    def total_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.reseeds:
            torch.manual_seed(1000 + self.global_step)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.total_loss(batch)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss if self.returns == "tensor" else {"loss": loss, "kept": batch_idx}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        if self.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=self.lr)
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def run_parts(module: Classifier, batch: Any) -> Tensor:
    """The model without its `forward`, named by its import path in a config."""
    return module.head(module.encoder(batch[0]))


class SamplesModule(L.LightningDataModule):
    """The samples for a LightningCLI config."""

    def train_dataloader(self) -> Any:
        return DataLoader(Samples(16), batch_size=8)

    def val_dataloader(self) -> Any:
        return DataLoader(Samples(8), batch_size=8)
