"""``Phases``: named stretches of training that schedules and callbacks can refer to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_aux.engine import Attached, AuxiliaryError, Engine, Progress
from lightning_aux.schedule import Division, ScheduleError

__all__ = ["Phases"]


class Phases(Attached):
    """Divides training into named phases.

    Every time in a schedule can then be the border of one: ``"linear(0, 1, until=warmup.end)"``,
    ``"during(0.5, main)"``, ``DropoutSchedule(0.1, until="warmup.end")``.

    At a border ``on_phase_end(trainer, module, phase)`` and then
    ``on_phase_start(trainer, module, phase)`` are called on every callback that has such a method,
    and ``on_phase_end(phase)``, ``on_phase_start(phase)`` on the LightningModule: after every
    ``on_train_batch_start`` of the first batch of the new phase and before its ``training_step``,
    with gradients on and under the precision of that step; after validation and checkpoints of the
    old one. ``trainer.global_step`` is then what the border says. The last phase ends with
    training, in ``on_train_end``, if its last step was taken. A resumed run calls nothing twice.
    The index of the phase is logged as ``aux/phases/index``.

    Args:
        phases: names and lengths, ``"warmup: 10%, main: 70%, cool: rest"``, or a mapping of names
            to lengths: optimizer steps, ``"500 steps"``, ``"10ep"``, ``"30%"`` of training;
            ``"rest"`` is what the others leave.
        optimizer: with several optimizers, the index of the one whose steps are counted.

    Raises:
        AuxiliaryError: names or lengths that are none; before training, when a phase would have no
            optimizer step or the phases are longer than training.

    Examples:
        >>> Phases("warmup: 10%, main: rest").division.lengths["main"] is None
        True
    """

    turn = -2

    def __init__(self, phases: str | Mapping[str, str | int], optimizer: int = 0) -> None:
        super().__init__("phases")
        self.optimizer = optimizer
        try:
            self.division = Division(phases)
        except ScheduleError as error:
            raise AuxiliaryError(f"phases: {error}") from error
        self.began: dict[str, int] = {}
        """Optimizer steps taken when each phase began, as far as training has come."""
        self._ended: set[str] = set()
        self._borders: dict[str, tuple[int, int]] = {}
        self._index = -1

    def attach(self, engine: Engine) -> None:
        engine.division = self.division

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        assert engine.horizon is not None, "known when training starts"
        self._borders = dict(engine.horizon.phases)
        kept = state or {}
        self.began = dict(kept.get("began", {}))
        self._ended = set(kept.get("ended", ()))
        spans = ", ".join(f"{name} {a} to {b}" for name, (a, b) in self._borders.items())
        rank_zero_info(f"lightning_aux: phases in optimizer steps: {spans}")

    def before_step(self, now: Progress) -> None:
        self._reach(now)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._reach(self.engine.progress(self.optimizer))

    def _reach(self, now: Progress) -> None:
        for index, (name, (start, end)) in enumerate(self._borders.items()):
            if name not in self.began and now.steps >= start:
                self.began[name] = now.steps
                rank_zero_info(
                    f"lightning_aux: phase {name!r} begins after {now.steps} optimizer steps, in "
                    f"epoch {now.epoch}"
                )
                self._call("on_phase_start", name)
            if name not in self._ended and now.steps >= end:
                self._ended.add(name)
                self._call("on_phase_end", name)
            if start <= now.steps < end:
                self._index = index

    def _call(self, hook: str, name: str) -> None:
        trainer, module = self.engine.trainer, self.engine.module
        for callback in trainer.callbacks:
            if callable(own := getattr(callback, hook, None)):
                own(trainer, module, name)
        if callable(own := getattr(module, hook, None)):
            own(name)

    def logged(self) -> dict[str, Any]:
        return {"index": float(self._index)}

    def stop(self) -> None:
        self._borders = {}

    def state(self) -> dict[str, Any]:
        return {"began": dict(self.began), "ended": sorted(self._ended)}
