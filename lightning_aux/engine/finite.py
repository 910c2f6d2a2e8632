"""Terms that are not finite, or fail: noticed on every process, without waiting for the device."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_aux.engine.distributed import processes

__all__ = ["LAG", "Trouble", "Verdicts"]

LAG = 16
"""After at most this many further steps a value that was computed on a GPU is looked at."""

FINE, NONFINITE, FAILED = 0, 1, 2


@dataclass(frozen=True)
class Trouble:
    """One term of one step that is not to be used.

    Attributes:
        name: of the objective.
        steps: optimizer steps taken before.
        rank: the process where it happened; the highest, if there are several.
        value: the term, if it was computed on this process.
        failed: whether computing it raised an error there.
    """

    name: str
    steps: int
    rank: int
    value: float | None
    failed: bool


class Verdicts:
    """What all processes together think of each step's terms.

    A term that is NaN on one process only would end training there and leave the others waiting for
    its gradients. Here each process tells the others, with one small collective, so that all of
    them act on the same step. Values on a CUDA device travel to the host in the background: asking
    at once would make the host wait for the device in every step.
    """

    def __init__(self) -> None:
        self._together = processes() > 1
        self._rank = dist.get_rank() if self._together else 0
        self._world = processes()
        self._pending: deque[
            tuple[Tensor | list[list[Any]], torch.cuda.Event | None, list[str], int]
        ] = deque()

    def add(self, terms: dict[str, Tensor | None], steps: int, device: torch.device) -> None:
        """Judge the terms of a step; ``None`` stands for one whose computation failed.

        Every process has to bring the same names in the same order.
        """
        if not self._together and device.type == "cpu":  # nobody to tell, nothing to wait for
            own = [math.nan if term is None else term.item() for term in terms.values()]
            kinds = [FAILED if term is None else NONFINITE for term in terms.values()]
            marks = [FINE if math.isfinite(x) else kind for x, kind in zip(own, kinds, strict=True)]
            self._pending.append(([marks, own], None, list(terms), steps))
            return
        each = [
            torch.full((), math.nan, device=device) if term is None else term.detach().to(device)
            for term in terms.values()
        ]
        values = torch.stack([term.to(torch.float32) for term in each])
        # In float32 whatever the default dtype is: the ranks of a large run are not whole in bf16.
        codes = torch.stack([term.isfinite() for term in each]).logical_not().to(torch.float32)
        codes *= NONFINITE
        for place, term in enumerate(terms.values()):
            if term is None:
                codes[place] = FAILED
        if self._together:
            # A failure counts for more than any value, on whichever process.
            codes = torch.where(codes > 0, codes * self._world + self._rank, codes)
            dist.all_reduce(codes, op=dist.ReduceOp.MAX)
        judged = torch.stack([codes, values])
        event = None
        if device.type == "cuda":
            host = torch.empty(judged.shape, dtype=judged.dtype, pin_memory=True)
            judged = host.copy_(judged, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._pending.append((judged, event, list(terms), steps))

    def arrived(self, wait: bool = False) -> Iterator[Trouble]:
        """The troubles of the steps whose values are on the host.

        Args:
            wait: for the device, so that the latest step is among them.
        """
        while self._pending:
            judged, event, names, steps = self._pending[0]
            if event is not None and not wait:
                # Several processes have to look at a step at the same time, whatever the state of
                # their devices; a single one may look as soon as the values are there.
                due = len(self._pending) > LAG
                if not due and (self._together or not event.query()):  # type: ignore[no-untyped-call]
                    return
            if event is not None:
                event.synchronize()
            self._pending.popleft()
            codes, values = judged.tolist() if isinstance(judged, Tensor) else judged
            for name, code, value in zip(names, codes, values, strict=True):
                if code != FINE:
                    kind, rank = divmod(int(code), self._world)
                    own = rank == self._rank
                    yield Trouble(name, steps, rank, value if own else None, kind == FAILED)

    def clear(self) -> None:
        """Forget the steps that have not been looked at."""
        self._pending.clear()
