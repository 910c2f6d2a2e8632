"""``Rehearsal``: optimizer steps that are taken and then have never been."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_aux.engine.distributed import fully_sharded_modules
from lightning_aux.engine.replay import Unobserved
from lightning_aux.functional.shards import local

if TYPE_CHECKING:
    from lightning_aux.engine.engine import Engine

__all__ = ["Rehearsal"]


class Rehearsal:
    """Restores, bit for bit, what optimizer steps change.

    Parameters, buffers, optimizer state, gradient scaler, random streams, metrics and Lightning's
    progress; what is logged meanwhile is dropped. Hooks of other callbacks do fire.
    """

    def __init__(self, engine: Engine) -> None:
        self._trainer, self._module = engine.trainer, engine.module
        self._unobserved = Unobserved(engine.module, whole_steps=True)

    def stop(self) -> None:
        """Undo what an interrupted one has left."""
        self._unobserved.restore()

    @contextmanager
    def of(self, optimizer: Any) -> Iterator[None]:
        """A block after which everything is as before it.

        Args:
            optimizer: the torch optimizer that is stepped in it.
        """
        for each in fully_sharded_modules(self._module):
            each.reshard()  # a forward without backward may have left whole parameters in place
        parameters = {
            id(each): each
            for each in (
                *self._module.parameters(),
                *(each for group in optimizer.param_groups for each in group["params"]),
            )
        }
        tensors = [local(each) for each in parameters.values()] + list(self._module.buffers())
        values = [each.clone() for each in tensors]
        state = {each: _copied(one) for each, one in optimizer.state.items()}
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        groups = deepcopy(groups)
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        scale = None if scaler is None else scaler.state_dict()
        progress = self._trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress
        counted = progress.state_dict()

        def undo() -> None:
            with torch.no_grad():
                for tensor, value in zip(tensors, values, strict=True):
                    tensor.copy_(value)
            optimizer.state.clear()
            optimizer.state.update(state)
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group.update(settings)
            if scaler is not None:
                scaler.load_state_dict(scale)
            progress.load_state_dict(counted)

        with self._unobserved.undone(undo, self._trainer.strategy.root_device):
            yield


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else deepcopy(v) for k, v in state.items()}
