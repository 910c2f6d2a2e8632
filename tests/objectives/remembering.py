"""An objective whose memory is exact in any arithmetic, and the same memory computed by hand."""

from __future__ import annotations

import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset

import lightning_aux as aux
from lightning_aux.objectives.memory import Remembering

CLASSES = 4


class Numbered(Dataset[Tensor]):
    """Each sample is its own index."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(float(index))


def collated(samples: list[Tensor]) -> Tensor:
    """A batch of none too."""
    return torch.stack(samples) if samples else torch.empty(0)


def numbered(size: int, **arguments: Any) -> DataLoader[Tensor]:
    return DataLoader(Numbered(size), collate_fn=collated, **arguments)


class Summing(L.LightningModule):
    """Has a loss of an empty batch too."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.factor * batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def written(before: list[float], sample: int, number: int, place: int, rank: int) -> list[float]:
    """What the objective writes: another row for each visit, process and place in the batch."""
    return [
        before[each] / 2 + ((7 * sample + 3 * number + 5 * place + 11 * rank + 13 * each) % 32) / 64
        for each in range(CLASSES)
    ]


class Visits(Remembering):
    """Writes `written` and keeps what it read, and of which samples."""

    def __init__(self, rank: int = 0, storage: str | int = "float32", name: str = "visits") -> None:
        super().__init__(0.0, storage, name=name)
        self.rank = rank
        self.number = 0
        self.visited: list[list[int]] = []
        self.read: list[Tensor] = []
        self.was_seen: list[list[bool]] = []

    def loss(self, step: aux.Step) -> Tensor:
        rows, seen = self.memory.read(step, CLASSES)
        samples = step.index.tolist()
        assert samples == step.batch.tolist()
        self.visited.append(samples)
        self.read.append(rows)
        self.was_seen.append(seen.tolist())
        new = [
            written(row, sample, self.number, place, self.rank)
            for place, (row, sample) in enumerate(zip(rows.tolist(), samples, strict=True))
        ]
        self.number += 1
        self.memory.write(step, torch.tensor(new).reshape(-1, CLASSES))
        return step.loss * 0.0


def half(number: float) -> float:
    """Rounded to float16 by Python."""
    return float(struct.unpack("e", struct.pack("e", number))[0])


def stored(row: list[float], storage: str | int) -> list[float]:
    """What is left of a row that was stored and read again."""
    if storage == "float32":
        return row
    if storage == "float16":
        return [half(each) for each in row]
    largest = sorted(range(len(row)), key=lambda each: -row[each])[: int(storage)]
    rest = sum(row) - sum(half(row[each]) for each in largest)
    fill = rest / (len(row) - len(largest))
    return [half(row[each]) if each in largest else fill for each in range(len(row))]


class ByHand:
    """The memory of one process that is told every batch of every rank, as Python lists."""

    def __init__(self, size: int, storage: str | int = "float32") -> None:
        self.rows = [[0.0] * CLASSES for _ in range(size)]
        self.seen = [False] * size
        self.storage = storage
        self.number = 0

    def step(self, window: list[list[list[int]]]) -> list[list[list[list[float]]]]:
        """One optimizer step: for each micro-batch the samples of each rank. What each has read."""
        read, changes = [], []
        for batch in window:
            read.append([[self.rows[sample] for sample in samples] for samples in batch])
            for rank, samples in enumerate(batch):
                for place, sample in enumerate(samples):
                    new = written(self.rows[sample], sample, self.number, place, rank)
                    changes.append((sample, stored(new, self.storage)))
            self.number += 1
        for sample, row in changes:
            self.rows[sample], self.seen[sample] = row, True
        return read


def engine(device: str = "cpu", accumulate: int = 1) -> Any:
    """What a memory asks of the engine."""
    said: list[str] = []
    strategy = SimpleNamespace(root_device=torch.device(device))
    trainer = SimpleNamespace(strategy=strategy, accumulate_grad_batches=accumulate)
    return SimpleNamespace(
        trainer=trainer, said=said, say=lambda *each: said.append(" = ".join(each))
    )


class Now:
    """A step: which samples, of how many, and what waits for the optimizer."""

    def __init__(self, index: Tensor, dataset_size: int) -> None:
        self.index, self.dataset_size = index, dataset_size
        self.waiting: list[Callable[[], None]] = []
        self.after_optimizer_step = self.waiting.append


def peak(act: Callable[[], Any]) -> int:
    """The most bytes that were allocated at once, temporaries inside of operations included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = act()
    most = now = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    del kept
    return most
