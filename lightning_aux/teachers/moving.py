"""``MovingTeacher``: the base of teachers that follow the student every so often."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

from lightning_aux.engine import AuxiliaryError, Engine, Progress
from lightning_aux.schedule import Border, Interval, ScheduleError, Time
from lightning_aux.teachers.teacher import Teacher

__all__ = ["MovingTeacher"]


class MovingTeacher(Teacher):
    """A teacher that moves after real optimizer steps: every so often, from a start on.

    Args:
        name: what objectives call it by.
        every: from one move to the next: optimizer steps, ``"500 steps"``, ``"1ep"`` or ``"5%"``.
        start: the time of the first move, likewise; at 0 the first is after ``every``.
        buffers: see `Teacher`.
        optimizer: see `Teacher`.
        offload: see `Teacher`.

    Raises:
        AuxiliaryError: ``every`` or ``start`` is not a time; before training, when this training
            has no such length.
    """

    averages = True

    def __init__(
        self,
        name: str,
        every: Time,
        start: Time,
        buffers: Literal["copy", "average"] = "copy",
        optimizer: int | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__(name, buffers, optimizer, offload)
        try:
            self.interval = Interval(every, start)
        except ScheduleError as error:
            raise AuxiliaryError(f"{name}: every={every!r}, start={start!r}: {error}") from error
        self._due: Callable[[int], bool] | None = None
        self.moved_at = 0

    @property
    def from_the_start(self) -> bool:
        """Whether the weights that training begins with are the first ones here."""
        start = self.interval.start
        if isinstance(start, Border):  # where it is, is known once training starts
            horizon = None if self._engine is None else self._engine.horizon
            return horizon is not None and horizon.steps(start) == 0
        return start.amount == 0

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        self._due = engine.bind(self.interval, self.name)
        here = engine.progress(self.optimizer).steps  # where one begins that has no state
        self.moved_at = int((state or {}).get("moved_at", here))
        super().start(engine, state)

    def after_optimizer_step(self, now: Progress) -> None:
        assert self._due is not None, "bound when training starts"
        if self._due(now.steps):
            self.move(now.steps)
            self.moved_at = now.steps

    def stop(self) -> None:
        super().stop()
        self._due = None

    @abstractmethod
    def move(self, steps: int) -> None:
        """Follow the student, after ``steps`` optimizer steps; ``moved_at`` is when it last did."""

    def state(self) -> dict[str, Any]:
        return {**super().state(), "moved_at": self.moved_at}
