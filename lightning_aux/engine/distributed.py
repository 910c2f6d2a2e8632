"""What depends on the strategy: how many processes train, and who holds which parameters."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_aux.engine.errors import AuxiliaryError

__all__ = [
    "Route",
    "anywhere",
    "check_strategy",
    "collect_rows",
    "data_rank",
    "data_ranks",
    "from_everyone",
    "fully_sharded_modules",
    "gather_rows",
    "has_flat_parameters",
    "is_fully_sharded",
    "processes",
    "rank",
    "same_everywhere",
    "shard",
    "shards_parameters",
]


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of all processes this one is."""
    return dist.get_rank() if processes() > 1 else 0


def data_rank(strategy: Any) -> int:
    """Which of the processes that see different data this one is; those of one share a number."""
    return int(getattr(strategy, "distributed_sampler_kwargs", {}).get("rank", 0))


def data_ranks(strategy: Any) -> int:
    """How many processes, or groups of them, see different data."""
    return int(getattr(strategy, "distributed_sampler_kwargs", {}).get("num_replicas", 1))


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


def from_everyone(value: Any) -> list[Any]:
    """The plain values that all processes have, in the order of ranks."""
    values = [value] * processes()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of every process one below the other, in the order of ranks; no gradient.

    Args:
        rows: ``(n, ...)`` with the same trailing shape and dtype on every process; the numbers of
            rows may differ.
    """
    if processes() == 1:
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(processes())]
    dist.all_gather(counts, count)
    sizes = [int(each) for each in counts]
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return torch.cat([each[:size] for each, size in zip(gathered, sizes, strict=True)])


class Route:
    """The way between the processes that hold rows and those that ask for them.

    Row i is held by process ``i mod processes``, in place ``i // processes``. All processes make
    and use a route together, whatever each of them asks for, also if that is nothing.

    Args:
        index: of the rows that this process asks for, int64 ``(n,)`` on the CPU; duplicates too.
        device: where rows travel from and to.

    Attributes:
        places: of the rows that are asked for from this process, int64 on ``device``: in the order
            of ranks, and then in that of their ``index``.
    """

    def __init__(self, index: Tensor, device: torch.device) -> None:
        holder = index.remainder(processes())
        order = holder.argsort(stable=True)
        asked = holder.bincount(minlength=processes())
        answered = torch.empty_like(asked, device=device)
        dist.all_to_all_single(answered, asked.to(device))
        self._asked, self._answered = asked.tolist(), answered.tolist()
        self._order, self._back = order.to(device), order.argsort().to(device)
        self.places = self.send((index // processes()).to(device))

    def __len__(self) -> int:
        """How many rows this process asks for."""
        return len(self._order)

    def bring(self, rows: Tensor) -> Tensor:
        """The rows of ``index``, from those at ``places`` of every process."""
        return _exchanged(rows, self._answered, self._asked)[self._back]

    def send(self, rows: Tensor) -> Tensor:
        """What belongs to ``places``, from what every process has for its ``index``."""
        return _exchanged(rows[self._order], self._asked, self._answered)


def collect_rows(rows: Tensor, size: int, block: int) -> Tensor | None:
    """All rows on the CPU of the first process, ``None`` on the others.

    Args:
        rows: that this process holds: row i is held by process ``i mod processes``.
        size: how many there are in all.
        block: how many bytes the first process receives at a time, about.
    """
    world = processes()
    whole = rows.new_empty((size, *rows.shape[1:]), device="cpu") if rank() == 0 else None
    step = max(1, block // (math.prod(rows.shape[1:]) * rows.element_size() * world))
    for start in range(0, -(-size // world), step):
        counts = [len(range(each, size, world)[start : start + step]) for each in range(world)]
        some = rows[start : start + step].contiguous()
        # As bytes: not every backend knows every dtype.
        sent = (some.flatten(1) if some.ndim > 1 else some[:, None]).view(torch.uint8)
        to_first = [len(some), *[0] * (world - 1)]
        received = _exchanged(sent, to_first, [0] * world if whole is None else counts)
        if whole is not None:
            arrived = received.view(rows.dtype).reshape(-1, *rows.shape[1:])
            for each, part in enumerate(torch.split(arrived, counts)):
                whole[each::world][start : start + step] = part.cpu()
    return whole


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


def _exchanged(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """Rows from every process, in the order of ranks, for as many to each of them."""
    found = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(found, rows, received, sent)
    return found
