"""Noticing NaN and infinite terms without waiting for the device."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["FiniteWatch"]


class FiniteWatch:
    """Values on their way from the device to the host, read when they have arrived.

    Asking a CUDA tensor for its value in every step would make the host wait for the device. Here
    the value is copied in the background and read one or a few steps later.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None, int]] = deque()

    def add(self, value: Tensor, steps: int) -> None:
        """Watch a scalar that was computed after ``steps`` optimizer steps."""
        if value.device.type != "cuda":
            self._pending.append((value.detach(), None, steps))
            return
        host = torch.empty((), dtype=value.dtype, pin_memory=True)
        host.copy_(value.detach(), non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._pending.append((host, event, steps))

    def nonfinite(self) -> Iterator[tuple[float, int]]:
        """The values that have arrived and are not finite, each with its number of steps."""
        while self._pending:
            host, event, steps = self._pending[0]
            if event is not None and not event.query():  # type: ignore[no-untyped-call]
                return
            self._pending.popleft()
            if not math.isfinite(host.item()):
                yield host.item(), steps
