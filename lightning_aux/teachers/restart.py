"""``Restart``: the student begins again from its initial weights, with a fresh optimizer."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from torch import nn

from lightning_aux.engine import Engine
from lightning_aux.weights import WeightStore

__all__ = ["Restart"]


class Restart:
    """What training began with, and the way back to it.

    Weights, buffers, the optimizers' settings (their state is dropped) and the learning-rate
    schedulers return to what they were; heads of objectives, gradient scaler and progress go on.

    Attributes:
        due: whether the next training step is the first of a new generation.
    """

    def __init__(self) -> None:
        self.due = False
        self._engine: Engine | None = None
        self._initial: WeightStore | None = None
        self._groups: list[list[dict[str, Any]]] = []
        self._schedulers: list[dict[str, Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine": None, "_initial": None}

    def start(
        self,
        engine: Engine,
        new_store: Callable[[nn.Module], WeightStore],
        state: dict[str, Any] | None,
    ) -> None:
        """Keep what is there, or what there was when the run that is resumed began."""
        self._engine, self.due = engine, False
        self._initial = new_store(engine.module)
        if state is None:
            self._groups = [
                [_settings(group) for group in optimizer.param_groups]
                for optimizer in engine.trainer.optimizers
            ]
            self._schedulers = [
                deepcopy(config.scheduler.state_dict())
                for config in engine.trainer.lr_scheduler_configs
            ]
            return
        self.due = bool(state["due"])
        self._initial.load_state_dict(state["weights"], "restart", state["buffers"])
        self._groups, self._schedulers = state["groups"], state["schedulers"]

    def before_step(self) -> None:
        """Begin again, if that is due: before the step, so that whoever looks after the last one
        (validation, a checkpoint) still sees what was trained.
        """
        if not self.due:
            return
        assert self._engine is not None
        assert self._initial is not None
        trainer = self._engine.trainer
        self._initial.give()
        for optimizer, groups in zip(trainer.optimizers, self._groups, strict=True):
            optimizer.state.clear()
            # A group that was added since (layers unfrozen later) keeps its settings.
            for group, settings in zip(optimizer.param_groups, groups, strict=False):
                group.update(deepcopy(settings))
        for config, state in zip(trainer.lr_scheduler_configs, self._schedulers, strict=True):
            config.scheduler.load_state_dict(deepcopy(state))
        self.due = False

    def stop(self) -> None:
        """Leave nothing behind."""
        if self._initial is not None:
            self._initial.close()

    def state(self) -> dict[str, Any]:
        """Tensors and plain values."""
        assert self._initial is not None
        return {
            "due": self.due,
            "weights": self._initial.state_dict(),
            "buffers": self._initial.buffers,
            "groups": self._groups,
            "schedulers": self._schedulers,
        }


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Of a parameter group everything but the parameters."""
    return {key: deepcopy(value) for key, value in group.items() if key != "params"}
