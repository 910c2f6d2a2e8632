"""``StandIn``: other values in the model's parameters for a while, and their own back after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["BEFORE_WRITING", "StandIn"]

BEFORE_WRITING: list[Callable[[], None]] = []
"""Called before anything here writes: whoever still reads the weights has the device wait."""


class StandIn:
    """Values that stand in for those of some parameters, whose own come back bit for bit.

    They are written into the parameters' memory, so that whoever holds a parameter or its address
    (a compiled graph, flattened weights) sees them, and past torch's count of changes: what is
    undone is none, and a graph that was recorded before `aside` can still be differentiated after.

    Args:
        whose: begins the message of an error.
        derive: returns the values for parameters that have their own.
    """

    def __init__(self, whose: str, derive: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> None:
        self.whose = whose
        self._derive = derive
        self._live: list[Tensor] = []
        self.own: list[Tensor] = []

    @property
    def in_place(self) -> bool:
        """Whether the parameters have other values than their own."""
        return bool(self._live)

    @torch.no_grad()
    def put(self, parameters: Sequence[Tensor]) -> None:
        """Give ``parameters`` the values that follow from their own."""
        self.restore()
        _wait()
        values = self._derive(parameters)
        self.own = [each.detach().clone() for each in parameters]
        self._live = list(parameters)  # noted before anything changes
        _write(self._live, values)

    @torch.no_grad()
    def restore(self) -> None:
        """Give the parameters their own values back; to be called again if interrupted."""
        try:
            if self._live:
                _wait()
        finally:  # whatever there is to say, the weights come back
            _write(self._live, self.own)
            self._live, self.own = [], []

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The parameters with their own values for a time; if these change, so do the others."""
        parameters = self._live
        self.restore()
        try:
            yield
        finally:
            if parameters:
                with torch.inference_mode(False):
                    self.put(parameters)


def _wait() -> None:
    for each in BEFORE_WRITING:
        each()


def _write(parameters: list[Tensor], values: Sequence[Tensor]) -> None:
    if parameters:
        torch._foreach_copy_([each.data for each in parameters], list(values))
