"""The script of the memory's tests: every fit of two processes, in one start of them."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import WeightedRandomSampler

from lightning_aux import Step
from lightning_aux.engine.finite import Verdicts
from lightning_aux.objectives.memory import SampleMemory
from tests.contract.strategies.places import PLACES, Place, ddp, train
from tests.contract.training import quiet_trainer
from tests.objectives.remembering import Now, Summing, Visits, engine, numbered, peak

SIZE = 11  # the first process holds six rows, the second five
WINDOW = 2
STORAGES: tuple[str | int, ...] = ("float32", "float16", 2)
LAG = 3


def lists(rank: int) -> list[list[int]]:
    """Batches of none to four samples; the same sample often in both processes, or twice in one."""
    draw = torch.Generator().manual_seed(5 + rank)
    found = []
    for number in range(8):
        size = (number + 2 * rank) % 5
        found.append(torch.randint(SIZE, (size,), generator=draw).tolist())
    return found


def weighted() -> WeightedRandomSampler:
    weights = torch.arange(1.0, SIZE + 1)
    return WeightedRandomSampler(weights, 12, generator=torch.Generator().manual_seed(3))


LOADERS: dict[str, Callable[[int], Any]] = {
    "lists": lambda rank: numbered(SIZE, batch_sampler=lists(rank)),
    "padded": lambda rank: numbered(SIZE, batch_size=4, shuffle=True),
    "weighted": lambda rank: numbered(SIZE, batch_size=2, sampler=weighted()),
}


def trained(
    rank: int,
    loader: str = "lists",
    storage: str | int = "float32",
    epochs: int = 2,
    devices: int = 2,
    **arguments: Any,
) -> tuple[Visits, L.Trainer, Summing]:
    visits, module = Visits(rank, storage), Summing()
    trainer = quiet_trainer(
        [visits],
        devices=devices,
        strategy=ddp() if devices > 1 else "auto",
        max_epochs=epochs,
        accumulate_grad_batches=WINDOW,
        use_distributed_sampler=loader != "lists",
    )
    trainer.fit(module, LOADERS[loader](rank), **arguments)
    return visits, trainer, module


def noted(visits: Visits) -> dict[str, Any]:
    return {
        "rows": visits.memory.rows,
        "seen": visits.memory.seen,
        "state": visits.state(),
        "visited": visits.visited,
        "read": visits.read,
        "was seen": visits.was_seen,
    }


def plain(rank: int, **arguments: Any) -> dict[str, Any]:
    return noted(trained(rank, **arguments)[0])


def saved(rank: int, folder: Path) -> dict[str, Any]:
    """Half of a training, and its file."""
    visits, trainer, _ = trained(rank, epochs=1)
    trainer.save_checkpoint(folder / "two.ckpt")
    return noted(visits)


def resumed(rank: int, folder: Path, name: str, storage: str | int) -> dict[str, Any]:
    return noted(trained(rank, storage=storage, ckpt_path=folder / name)[0])


def twice(rank: int) -> dict[str, Any]:
    """Two calls of ``fit``."""
    visits, trainer, module = trained(rank, epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, LOADERS["lists"](rank))
    return noted(visits)


class Failing(Visits):
    """Fails on the second process before it has read anything."""

    def loss(self, step: Step) -> Tensor:
        if self.rank == 1:
            raise RuntimeError("a mistake of the second process")
        return super().loss(step)


def raised(act: Callable[[], Any]) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def failing(rank: int) -> dict[str, Any]:
    """As on a GPU, where the processes learn of it some steps later."""
    arrived = Verdicts.arrived

    def late(self: Verdicts, wait: bool = False) -> Any:
        return arrived(self, wait) if wait or len(self._pending) > LAG else iter(())

    Verdicts.arrived = late  # type: ignore[method-assign, assignment]
    visits = Failing(rank)
    trainer = quiet_trainer([visits], devices=2, strategy=ddp(), use_distributed_sampler=False)
    try:
        message = raised(lambda: trainer.fit(Summing(), LOADERS["lists"](rank)))
    finally:
        Verdicts.arrived = arrived  # type: ignore[method-assign]
    return {"raised": message, "steps": trainer.global_step}


def other_data(rank: int) -> dict[str, Any]:
    """Each process has a dataset of its own."""
    trainer = quiet_trainer([Visits(rank)], devices=2, strategy=ddp(), max_steps=2)
    data = numbered(8 + rank, batch_size=2)
    return {"raised": raised(lambda: trainer.fit(Summing(), data))}


class OfSharded(Visits):
    """The batch of the contract's models is not the index."""

    def loss(self, step: Step) -> Tensor:
        samples = step.index.tolist()
        rows, seen = self.memory.read(step, 2)
        self.visited.append(samples)
        self.was_seen.append(seen.tolist())
        ones = torch.ones(len(samples))
        self.memory.write(step, torch.stack([rows[:, 0] + ones, step.index.float()], dim=1))
        return step.loss * 0.0


def sharded(rank: int) -> dict[str, Any]:
    place: Place = PLACES["fsdp2"]
    visits = OfSharded(rank)
    train(place, [visits])
    return {**noted(visits), "size": len(visits.engine.indices._loader.dataset)}  # type: ignore


def one_writes(rank: int) -> dict[str, Any]:
    """Both meet the same samples; the second process writes nothing, and then neither does."""
    told, index = engine(), torch.tensor([3, 4, 3])
    told.indices = SimpleNamespace(current=lambda _: index)
    memory = SampleMemory()
    memory.begin(told, "memory", None)
    read = []
    for writes in (rank == 0, False, False):
        now: Any = Now(index, SIZE)
        memory.fetch()
        rows, seen = memory.read(now, 2)
        read.append((rows, seen.tolist()))
        memory.write(now, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
        for act in now.waiting if writes else []:
            act()
        memory.settle()
    return {"read": read}


def size(rank: int) -> dict[str, Any]:
    """Steps of two micro-batches and what is saved, of more samples than a training here has."""
    told, draw = engine(accumulate=WINDOW), torch.Generator().manual_seed(rank)
    values, samples, batch = torch.rand(64, 1000), 200_001, 64

    def act() -> Any:
        memory = SampleMemory("top-5")
        memory.begin(told, "memory", None)
        for _ in range(3):
            waiting: list[Any] = []
            for _ in range(WINDOW):
                now: Any = Now(torch.randint(samples, (batch,), generator=draw), samples)
                told.indices = SimpleNamespace(current=lambda _, index=now.index: index)
                memory.fetch()
                memory.read(now, 1000)
                memory.write(now, values)
                waiting += now.waiting
            for each in waiting:
                each()
            del waiting, now
            memory.settle()
        return memory

    kept = []
    training = peak(lambda: kept.append(act()))
    saving = peak(kept[0].state)
    return {"said": told.said, "training": training, "saving": saving}


def jobs(rank: int, folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {
        f"{storage}": partial(plain, rank, storage=storage) for storage in STORAGES
    }
    found["padded"] = partial(plain, rank, loader="padded", epochs=3)
    found["weighted"] = partial(plain, rank, loader="weighted", epochs=3)
    found["saved"] = partial(saved, rank, folder)
    for storage in STORAGES:
        found[f"resumed {storage}"] = partial(resumed, rank, folder, "one.ckpt", storage)
    found["resumed by as many"] = partial(resumed, rank, folder, "two.ckpt", "float32")
    found["twice"] = partial(twice, rank)
    found["other data"] = partial(other_data, rank)
    found["one writes"] = partial(one_writes, rank)
    found["size"] = partial(size, rank)
    found["sharded"] = partial(sharded, rank)
    found["failing"] = partial(failing, rank)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ.get("LOCAL_RANK", "0"))
    for name, job in jobs(rank, folder).items():
        try:
            ended = job()
        except Exception:
            ended = {"error": traceback.format_exc()}
        torch.save(ended, folder / f"{name}.{rank}.pt")
