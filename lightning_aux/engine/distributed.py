"""What depends on the strategy: how many processes train, and who holds which parameters."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_aux.engine.errors import AuxiliaryError

__all__ = [
    "anywhere",
    "check_strategy",
    "data_rank",
    "fully_sharded_modules",
    "gather_rows",
    "has_flat_parameters",
    "is_fully_sharded",
    "processes",
    "same_everywhere",
    "shard",
    "shards_parameters",
]


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def data_rank(strategy: Any) -> int:
    """Which of the processes that see different data this one is; those of one share a number."""
    return int(getattr(strategy, "distributed_sampler_kwargs", {}).get("rank", 0))


def same_everywhere(number: int, device: torch.device) -> int:
    """The number that the first process has."""
    if processes() == 1:
        return number
    # As two halves: seeds have 64 bits without a sign.
    halves = torch.tensor([number >> 32, number & 0xFFFFFFFF], device=device)
    dist.broadcast(halves, 0)
    high, low = halves.tolist()
    return int(high) << 32 | int(low)


def anywhere(here: bool, device: torch.device) -> bool:
    """Whether it is so on some process; all of them have to ask, and wait for each other."""
    if processes() == 1:
        return here
    told = torch.tensor([float(here)], device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told)


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
    if processes() == 1:
        return tensors
    count = torch.tensor([len(tensors[0])], device=tensors[0].device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = [int(each) for each in counts]
    return tuple(_gather(rows, sizes) for rows in tensors)


def check_strategy(strategy: Any, asked_by: str) -> None:
    """Refuse strategies whose training step we cannot follow.

    Raises:
        AuxiliaryError: DeepSpeed, whose engine steps and accumulates by itself.
    """
    if _is(strategy, "DeepSpeedStrategy"):
        raise AuxiliaryError(
            f"{asked_by}: DeepSpeed steps, accumulates and partitions in an engine of its own, so "
            f"neither terms nor teachers could be shown to be right there. Use ddp, or "
            f"ModelParallelStrategy (FSDP2) for sharded parameters."
        )


def shards_parameters(strategy: Any) -> bool:
    """Whether every process may hold a part of the parameters only."""
    return _is(strategy, "FSDPStrategy") or _is(strategy, "ModelParallelStrategy")


def has_flat_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters that are parts of something else (FSDP1, DeepSpeed ZeRO-3)."""
    return [
        name
        for name, each in module.named_parameters()
        if hasattr(each, "ds_id") or hasattr(each, "_fsdp_flattened")
    ]


def fully_sharded_modules(module: nn.Module) -> list[Any]:
    """The submodules that ``fully_shard`` (FSDP2) has been applied to."""
    return [each for each in module.modules() if is_fully_sharded(each)]


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` (FSDP2) has been applied to ``module`` itself."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where it is not imported, nobody has
    kind = getattr(fsdp, "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


def shard(head: nn.Module, strategy: Any, asked_by: str) -> None:
    """Have ``head`` sharded like the user's model, from the values that rank 0 has.

    Outside of ``fully_shard`` nothing would synchronise its gradients, and an optimizer's fused
    operations refuse plain tensors beside sharded ones.

    Raises:
        AuxiliaryError: a strategy whose way of sharding heads do not support.
    """
    if not _is(strategy, "ModelParallelStrategy"):
        raise AuxiliaryError(
            f"the head of {asked_by} cannot be sharded by {type(strategy).__name__}. Use "
            f"ModelParallelStrategy (FSDP2), or a strategy that keeps whole parameters (single "
            f"device, ddp)."
        )
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    head.to(strategy.root_device)
    for tensor in [*head.parameters(), *head.buffers()]:
        dist.broadcast(tensor.detach(), 0)
    # The model may be computed in a lower precision than the head: what comes in is cast.
    dtypes = {each.dtype for each in head.parameters()}
    policy = MixedPrecisionPolicy(param_dtype=dtypes.pop() if len(dtypes) == 1 else None)
    fully_shard(head, mesh=strategy.device_mesh["data_parallel"], mp_policy=policy)


def _is(strategy: Any, name: str) -> bool:
    """Whether ``strategy`` is of Lightning's class ``name``, in either of its namespaces."""
    return any(base.__name__ == name for base in type(strategy).__mro__)


def _gather(rows: Tensor, sizes: list[int]) -> Tensor:
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return torch.cat([each[:size] for each, size in zip(gathered, sizes, strict=True)])
