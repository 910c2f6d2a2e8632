"""Time: how long this training is, in optimizer steps, from what the Trainer knows."""

from __future__ import annotations

import math
from typing import Any

from lightning_aux.schedule import Horizon

__all__ = ["accumulates", "horizon_of"]


def horizon_of(trainer: Any, automatic: bool) -> Horizon:
    """The steps of each epoch and of the whole training.

    Like ``Trainer.estimated_stepping_batches``, and also with a ``GradientAccumulationScheduler``,
    where that property refuses. In manual optimisation one step of the first optimizer per
    batch is assumed. Unbounded training has no total; iterable data has no steps per epoch.
    """
    batches = trainer.num_training_batches
    limit = trainer.max_steps if trainer.max_steps not in (None, -1) else None
    if limit is not None:  # Lightning counts the steps of all optimizers
        limit //= max(1, len(trainer.optimizers))
    epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else None
    if not math.isfinite(batches):
        return Horizon(total=limit, epoch_steps=None)

    windows = _accumulation_by_epoch(trainer) if automatic else {0: 1}
    length = max(windows) + 1
    sizes = [windows[max(start for start in windows if start <= epoch)] for epoch in range(length)]
    epoch_steps = tuple(math.ceil(batches / size) for size in sizes)
    if epochs is None:
        return Horizon(total=limit, epoch_steps=epoch_steps)
    total = sum(epoch_steps[:epochs]) + max(0, epochs - length) * epoch_steps[-1]
    return Horizon(total=total if limit is None else min(total, limit), epoch_steps=epoch_steps)


def accumulates(trainer: Any) -> bool:
    """Whether an optimizer step may be made of several micro-batches, in some epoch."""
    return any(size != 1 for size in _accumulation_by_epoch(trainer).values())


def _accumulation_by_epoch(trainer: Any) -> dict[int, int]:
    """First epoch to micro-batches per optimizer step."""
    for callback in trainer.callbacks:
        scheduling = getattr(callback, "scheduling", None)
        if scheduling and hasattr(callback, "get_accumulate_grad_batches"):
            return {0: 1, **scheduling}
    return {0: trainer.accumulate_grad_batches}
