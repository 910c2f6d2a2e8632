"""Tensors of which each process holds a part (DTensors), and the parts themselves.

Everything here leaves a plain tensor as it is, so a formula on parameters is written once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "gathered",
    "is_sharded",
    "kept_by_the_first",
    "like",
    "local",
    "part_of",
    "saved",
    "sum_over_parts",
    "sums_over_parts",
]

_BY_THE_FIRST: ContextVar[bool] = ContextVar("kept by the first", default=False)


def is_sharded(tensor: Tensor) -> TypeGuard[Any]:
    """Whether ``tensor`` is a DTensor."""
    # Where nobody has imported the module there is no DTensor, and the import costs a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that this process holds, sharing its memory; no gradient."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()


def like(part: Tensor, tensor: Tensor) -> Tensor:
    """``part``, of the shape of ``local(tensor)``, distributed as ``tensor`` is."""
    if not is_sharded(tensor):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def gathered(tensor: Tensor) -> Tensor:
    """The whole of ``tensor`` on every process: a collective where it is sharded; no gradient."""
    whole: Tensor = tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()
    return whole


def saved(tensor: Tensor) -> Tensor:
    """``tensor``, of a sharded one the whole on the CPU: a collective, as `gathered` is.

    Within `kept_by_the_first` other processes get a tensor of that shape without values (on torch's
    device ``meta``), so that they hold one whole tensor at a time.
    """
    if not is_sharded(tensor):
        return tensor
    whole = gathered(tensor)
    if _BY_THE_FIRST.get() and dist.get_rank() > 0:
        return torch.empty_like(whole, device="meta")
    return whole.cpu()


@contextmanager
def kept_by_the_first() -> Iterator[None]:
    """A block in which the first process alone keeps what is `saved`: it writes the file."""
    token = _BY_THE_FIRST.set(True)
    try:
        yield
    finally:
        _BY_THE_FIRST.reset(token)


def part_of(whole: Tensor, tensor: Tensor) -> Tensor:
    """The part of ``whole`` that belongs where ``local(tensor)`` is; nothing is communicated.

    Args:
        whole: of the shape of ``tensor``, the same on every process.
        tensor: how it is distributed.
    """
    if not is_sharded(tensor):
        return whole
    from torch.distributed.tensor import distribute_tensor

    placed = whole.to(tensor.device)
    spread = distribute_tensor(placed, tensor.device_mesh, tensor.placements, src_data_rank=None)
    part: Tensor = spread.to_local()
    return part


def sum_over_parts(values: list[Tensor], tensors: list[Tensor]) -> Tensor:
    """The sum of ``values`` over the list and over the processes that hold other parts.

    Args:
        values: scalars, one for each tensor, computed from ``local(tensor)``.
        tensors: how each of them is distributed; a dimension of the mesh that holds copies is not
            summed over.

    Returns:
        The same scalar on every process; one collective for each way of distributing.
    """
    total = values[0].new_zeros(())
    parts: dict[Any, Tensor] = {}
    for value, tensor in zip(values, tensors, strict=True):
        if is_sharded(tensor):
            way = (tensor.device_mesh, tensor.placements)
            parts[way] = parts[way] + value if way in parts else value.clone()
        else:
            total = total + value
    for (mesh, placements), part in parts.items():
        _reduce(part, mesh, placements)
        total = total + part
    return total


def sums_over_parts(values: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Each of ``values`` summed over the processes that hold other parts of its tensor.

    Args:
        values: ``(n,)``, one for each tensor, computed from ``local(tensor)``.
        tensors: n of them; see `sum_over_parts`.

    Returns:
        ``(n,)``, the same on every process; one collective for each way of distributing.
    """
    ways: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if is_sharded(tensor):
            ways.setdefault((tensor.device_mesh, tensor.placements), []).append(place)
    values = values.clone()
    for (mesh, placements), places in ways.items():
        part = values[places]
        _reduce(part, mesh, placements)
        values[places] = part
    return values


def _reduce(part: Tensor, mesh: Any, placements: Any) -> None:
    """Sum ``part`` in place over the dimensions of the mesh that hold other parts."""
    for dimension, placement in enumerate(placements):
        if placement.is_shard():
            dist.all_reduce(part, group=mesh.get_group(dimension))
