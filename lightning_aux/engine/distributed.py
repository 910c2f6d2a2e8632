"""What depends on how many processes train, and on whether they hold whole parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["gather_rows", "sharded_parameters", "shards_parameters"]


def gather_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The rows of every process one below the other, in the order of ranks; no gradient.

    Processes may bring different numbers of rows. With one process these are the tensors
    themselves.

    Args:
        tensors: ``(n, ...)`` each, with one ``n`` for all; the same trailing shapes and dtypes on
            every process.

    Returns:
        ``(sum of n, ...)`` for each, equal on every process.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensors
    count = torch.tensor([len(tensors[0])], device=tensors[0].device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = [int(each) for each in counts]
    return tuple(_gather(rows, sizes) for rows in tensors)


def shards_parameters(strategy: Any) -> bool:
    """Whether a Lightning strategy may leave every process with a part of the parameters."""
    return "FSDP" in type(strategy).__name__ or hasattr(strategy, "device_mesh")


def sharded_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters of which this process holds only a part."""
    return [name for name, each in module.named_parameters() if _is_sharded(each)]


def _gather(rows: Tensor, sizes: list[int]) -> Tensor:
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return torch.cat([each[:size] for each, size in zip(gathered, sizes, strict=True)])


def _is_sharded(parameter: nn.Parameter) -> bool:
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_fsdp_flattened"):
        return True  # DeepSpeed ZeRO-3, FSDP1
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor  # not part of every build of torch

    return isinstance(parameter, DTensor)
