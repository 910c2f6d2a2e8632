"""The layout of a batch by key path, and one batch in place of a whole dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import repeat
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_aux.engine import AuxiliaryError
from lightning_aux.engine.taps import key_path

__all__ = ["leaves", "repeating", "size_of"]

_DEEP = 6  # batches that are nested deeper, or in themselves, are shown down to here


def leaves(batch: Any) -> Iterator[tuple[str, Any]]:
    """Every value in a batch with the key path that leads to it, as `Taps` takes it.

    Values that no key path reaches (a key with a dot in it) are left out.
    """
    for path, value in _below("", batch, 0):
        try:
            reached = key_path(batch, path, "inspect") if path else batch
        except AuxiliaryError:
            continue
        if reached is value:
            yield path, value


def _below(path: str, here: Any, depth: int) -> Iterator[tuple[str, Any]]:
    parts = _parts(here) if depth < _DEEP else {}
    if not parts:
        yield path, here
    for key, value in parts.items():
        yield from _below(f"{path}.{key}" if path else key, value, depth + 1)


def _parts(here: Any) -> dict[str, Any]:
    if isinstance(here, Tensor | str | bytes | int | float | None):
        return {}
    if isinstance(here, Mapping):
        return {str(key): value for key, value in here.items()}
    if isinstance(here, tuple) and hasattr(here, "_fields"):
        return dict(zip(here._fields, here, strict=True))
    if isinstance(here, Sequence):
        return {str(place): value for place, value in enumerate(here)}
    # Batches of graphs and data classes; some say by themselves what they have.
    keys = here.keys() if callable(getattr(here, "keys", None)) else _attributes(here)
    return {str(key): getattr(here, str(key), None) for key in keys if not str(key).startswith("_")}


def _attributes(here: Any) -> list[str]:
    """The names of the attributes that an object was given."""
    slots = [name for kind in type(here).__mro__ for name in getattr(kind, "__slots__", ())]
    return [*getattr(here, "__dict__", {}), *(name for name in slots if hasattr(here, name))]


def size_of(batch: Any) -> int:
    """How many examples there are, by the first tensor that has a dimension."""
    tensors = (value for _, value in leaves(batch) if isinstance(value, Tensor))
    return next((each.shape[0] for each in tensors if each.ndim), 1)


def repeating(batch: Any, batches: int | None, samples: int | None, name: str) -> DataLoader[Any]:
    """A DataLoader that gives one batch again and again, and is otherwise as long as another.

    Each time it is a copy: a model may write into what it is given.

    Args:
        batch: what it gives.
        batches: in an epoch; ``None``: nobody knows.
        samples: in the dataset; ``None``: it is iterable and has no index.
        name: of the dataset's class, for messages.
    """
    size = size_of(batch)
    if samples is None:
        methods = {} if batches is None else {"__len__": lambda self: batches * size}
        stream = type(name, (_Stream,), methods)()
        return DataLoader(stream, batch_size=size, collate_fn=lambda _: deepcopy(batch))
    order = _Batches(batches or -(-samples // size), size, samples)
    dataset = type(name, (_Samples,), {})(samples)
    return DataLoader(dataset, batch_sampler=order, collate_fn=lambda _: deepcopy(batch))


class _Samples(Dataset[int]):
    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        return index


class _Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return repeat(0)


class _Batches:
    """The indices of the samples, from the first on."""

    def __init__(self, batches: int, size: int, samples: int) -> None:
        self.batches, self.batch_size, self.samples = batches, size, samples

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.batches):
            first = number * self.batch_size
            yield [place % self.samples for place in range(first, first + self.batch_size)]
