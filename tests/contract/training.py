"""Training runs for the contract, and what is compared between two of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader

from lightning_aux.engine import Attached
from lightning_aux.objective import Objective
from lightning_aux.registry import ENTRIES
from tests.contract.models import Samples


def is_pure(objective: Objective) -> bool:
    """Whether it has no head, no teacher, no memory and no path into the model."""
    kind = type(objective)
    own = (kind.build_head, kind.check, kind.companions, kind.start, kind.before_step)
    base = (
        Objective.build_head,
        Objective.check,
        Objective.companions,
        Objective.start,
        Objective.before_step,
    )
    return own == base and not objective.needs and not objective.reads


TERMS = [name for name, entry in ENTRIES.items() if entry.objective is not None]
PER_SAMPLE_TERMS = [name for name in TERMS if ENTRIES[name].per_sample]
# Where a training is expensive, these train in one: what is compared there holds for all of them
# together and for what each of them logs and keeps.
TOGETHER = [
    # Terms of logits and labels alone.
    [
        name
        for name in PER_SAMPLE_TERMS
        if all(isinstance(each, Objective) and is_pure(each) for each in ENTRIES[name].make(1.0))
    ],
    # What neither adds a term nor changes the model: averages, teachers nobody asks, diagnostics.
    [
        name
        for name, entry in ENTRIES.items()
        if entry.objective is None and entry.inert and entry.sharded
    ],
]
INERT = [name for name, entry in ENTRIES.items() if entry.inert]

every_entry = pytest.mark.parametrize("entry", ENTRIES)
every_term = pytest.mark.parametrize("entry", TERMS)
every_per_sample_term = pytest.mark.parametrize("entry", PER_SAMPLE_TERMS)


def callbacks(entry: str, weight: float | str = 0.5) -> list[Attached]:
    """What the registry attaches under this name."""
    return ENTRIES[entry].make(weight)


def shared(entry: str) -> str:
    """The entry whose training stands for this one where several train together."""
    return next((group[0] for group in TOGETHER if entry in group), entry)


def together(entry: str, weight: float | str = 0.5) -> list[Attached]:
    """What is attached in the training of `shared(entry)`."""
    names = next((group for group in TOGETHER if entry in group), [entry])
    return [each for name in names for each in callbacks(name, weight)]


every_trained = pytest.mark.parametrize(
    "entry",
    [
        pytest.param(
            name,
            marks=[pytest.mark.stands_for(*group) for group in TOGETHER if group[0] == name],
        )
        for name in ENTRIES
        if shared(name) == name
    ],
)


def quiet_trainer(added: Sequence[L.Callback] = (), **arguments: Any) -> L.Trainer:
    """A Trainer on one CPU process that neither prints, logs nor saves, unless told to."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": any(isinstance(each, Checkpoint) for each in added),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": list(added),
    }
    return L.Trainer(**(quiet | arguments))


def loader(n: int = 40, batch_size: int = 8, indexed: bool = False, **arguments: Any) -> DataLoader:
    """Batches of the samples, in order."""
    return DataLoader(Samples(n, indexed), batch_size=batch_size, **arguments)


def fit(
    module: L.LightningModule,
    added: Sequence[L.Callback] = (),
    data: Any = None,
    val: Any = None,
    ckpt_path: Any = None,
    **arguments: Any,
) -> L.Trainer:
    """Train from a fixed random state and return the Trainer."""
    trainer = quiet_trainer(added, **arguments)
    L.seed_everything(1, verbose=False)
    trainer.fit(module, loader() if data is None else data, val, ckpt_path=ckpt_path)
    return trainer


def seeded(kind: type[L.LightningModule], *args: Any, **arguments: Any) -> Any:
    """A module whose initial weights are those of every other seeded module of its shape."""
    L.seed_everything(2, verbose=False)
    return kind(*args, **arguments)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of parameters and buffers by name."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def optimizer_state(trainer: L.Trainer) -> list[Any]:
    """Everything that the optimizers would save, flattened."""
    return tree_flatten([each.state_dict() for each in trainer.optimizers])[0]


def random_state() -> list[Any]:
    """The random streams of torch, python and numpy."""
    legacy = numpy.random.get_state()
    return [torch.get_rng_state(), random.getstate(), legacy[1].tolist(), legacy[2:]]


def identical(left: Any, right: Any) -> bool:
    """Whether two nests of tensors and plain values are equal to the last bit."""
    (a, tree), (b, other) = tree_flatten(left), tree_flatten(right)
    return tree == other and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Over all entries of two state dicts with the same keys."""
    assert left.keys() == right.keys()
    return max(float((left[key].double() - right[key].double()).abs().max()) for key in left)
