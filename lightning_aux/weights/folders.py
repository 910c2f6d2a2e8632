"""Distributed checkpoints: folders that every process has written its part of the weights to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from lightning_aux.engine import AuxiliaryError

__all__ = ["read_folder"]

# What Lightning calls the weights there: ModelParallelStrategy (FSDP2), FSDPStrategy.
_ROOTS = ("state_dict", "model")


def read_folder(path: Path) -> dict[str, Any]:
    """What Lightning has saved there, but for the optimizers; one process reads it all.

    Its weights are read one by one, when they are looked at.
    """
    rest = path / "meta.pt"
    saved: dict[str, Any] = {}
    if rest.is_file():
        saved = torch.load(rest, map_location="cpu", weights_only=True, mmap=True)
    return {**saved, "state_dict": _Weights(path)}


class _Weights(Mapping[str, Any]):
    """Weights by name; each is put together from the parts of all processes when it is asked for.

    Args:
        folder: of the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._reader = folder, _Reader(folder)
        # By key in the folder; an entry that is a dictionary has one for each of its values.
        self._paths: dict[str, tuple[Any, ...]] = self._reader.index.planner_data or {}
        roots = {path[0] for path in self._paths.values()}
        self._root = next((each for each in _ROOTS if each in roots), "")
        self._keys: dict[str, list[str]] = {}
        for key, path in self._paths.items():
            if path[0] == self._root and len(path) > 1:
                self._keys.setdefault(path[1], []).append(key)
        if not self._keys:
            raise ValueError(f"it has no weights under {' or '.join(map(repr, _ROOTS))}")

    def __getitem__(self, name: str) -> Any:
        wanted: dict[str, Any] = {}
        for key in self._keys[name]:
            held = self._reader.index.state_dict_metadata[key]
            wanted[key] = None
            if isinstance(held, TensorStorageMetadata):
                wanted[key] = torch.empty(held.size, dtype=held.properties.dtype)
        planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            _load_state_dict(wanted, self._reader, planner=planner, no_dist=True)
        except CheckpointException as error:  # no Exception to Python
            _, (cause, _) = next(iter(error.failures.items()))
            raise AuxiliaryError(
                f"{str(self._folder)!r}: {name!r} cannot be read with weights_only=True: {cause}"
            ) from error
        nested = unflatten_state_dict(wanted, {key: self._paths[key] for key in wanted})
        return nested[self._root][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class _Reader(FileSystemReader):
    """Reads the index once, not for every tensor."""

    @cached_property
    def index(self) -> Metadata:
        return super().read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index


class _Planner(DefaultLoadPlanner):
    """Nothing that is read can run."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)
