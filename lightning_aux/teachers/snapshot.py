"""``SnapshotTeacher``, the student as it was at regular times, and ``VotedTeacher``, several."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from lightning_aux.engine import (
    AuxiliaryError,
    Engine,
    Locations,
    Pass,
    Progress,
    Record,
    Vote,
    VotedPass,
)
from lightning_aux.functional import majority_vote, mean_vote
from lightning_aux.schedule import Schedule, Time
from lightning_aux.teachers.moving import MovingTeacher
from lightning_aux.teachers.restart import Restart
from lightning_aux.teachers.teacher import Teacher
from lightning_aux.weights import WeightStore
from lightning_aux.weights.store import mean_of_buffers

__all__ = ["SnapshotTeacher", "VotedTeacher"]


class _Snapshots(MovingTeacher):
    """Keeps the last so many snapshots, the newest last; no objective learns before the first.

    Args:
        name: what objectives call it by.
        every: from one snapshot to the next.
        start: the time of the first.
        optimizer: see `Teacher`.
        offload: see `Teacher`.
    """

    def __init__(
        self, name: str, every: Time, start: Time, optimizer: int | None, offload: bool = False
    ) -> None:
        super().__init__(name, every, start, "copy", optimizer, offload)
        self.ring: list[WeightStore] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "ring": []}

    @property
    def ready(self) -> bool:
        return bool(self.ring)

    def take(self, keep: int) -> None:
        """Take a snapshot of the live weights, and keep the last ``keep``."""
        while len(self.ring) > keep:
            self.ring.pop(0).close()
        if len(self.ring) == keep:  # the oldest gives its memory to the newest
            self.ring.append(self.ring.pop(0))
            self.ring[-1].update(0.0)
        else:
            self.ring.append(self.new_store(self.engine.module))
        self.updates += 1
        self.defer_buffers(0.0)

    def take_buffers(self) -> None:
        for each in self.ring:
            each.follow()
        if self.pending is not None:
            self.ring[-1].update_buffers(0.0)
            self.pending = None
            self.settle()

    def settle(self) -> None:
        """Called when the newest snapshot is complete."""

    def stop(self) -> None:
        super().stop()
        for each in self.ring:
            each.restore()
            each.close()

    def _drop(self) -> None:
        super()._drop()
        for each in self.ring:
            each.close()
        self.ring = []

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        super().start(engine, state)
        if state is None:
            return
        self._drop()
        for saved in state["snapshots"]:
            self.ring.append(self.new_store(engine.module))
            self.ring[-1].load_state_dict(saved["weights"], self.name, saved["buffers"])
        self.pending = state.get("pending")
        self.settle()

    def state(self) -> dict[str, Any]:
        newest = self.ring[-1] if self.ring else None
        state = super().state()
        state["snapshots"] = [
            {
                "weights": each.state_dict(
                    each.buffers_after(self.pending)
                    if each is newest and self.pending is not None
                    else None
                ),
                "buffers": each.buffers,
            }
            for each in self.ring
        ]
        state["pending"] = self.pending if newest is not None and newest.buffers else None
        return state


class SnapshotTeacher(_Snapshots):
    """A teacher that is the student as it was at the last of regular times.

    The previous epoch (``every="1ep"``, the default); the mean of the last so many (``window``:
    the local mean teacher of Zang et al. 2024, "Overcoming the Pitfalls of Vision-Language Model
    Finetuning for OOD Generalization", arXiv:2401.15914, section 3.2, with equal weights); the
    previous generation (``restart``).

    With ``restart`` the student begins again from its initial weights, with a fresh optimizer and
    learning-rate schedule, after every snapshot: born-again networks (Furlanello et al. 2018,
    arXiv:1805.04770), iterated self-distillation (Borup & Andersen 2021, "Even your Teacher Needs
    Guidance", arXiv:2102.13088), and further pre-training with self-distillation (Lee et al. 2022,
    arXiv:2210.02871, algorithm 1) with ``every`` half of the training. The first generation trains
    without a teacher.

    Until the first snapshot objectives that name this teacher have no weight.

    Args:
        name: what objectives call it by.
        every: from one snapshot to the next: ``"1ep"``, ``"500 steps"``, ``"50%"`` or optimizer
            steps.
        start: the time of the first snapshot; at 0 the weights that training begins with are the
            first, but with ``restart`` there is none before the end of the first generation.
        window: how many snapshots the teacher is the mean of, or a schedule of that number
            (rounded down, at least 1). Memory: one copy of the parameters for each, and one.
        restart: whether the student begins again after each snapshot. Validation and checkpoints
            between a snapshot and the next training step still see the trained student.
        optimizer: see `EMATeacher`.
        offload: see `EMATeacher`; of all snapshots, their mean and what ``restart`` keeps.

    Raises:
        AuxiliaryError: a ``window`` below 1, ``window`` or ``start`` beside ``restart``; and see
            `EMATeacher`.
    """

    turn = -2  # a restart comes before whatever is set for the step

    def __init__(
        self,
        name: str = "snapshot",
        every: Time = "1ep",
        start: Time = 0,
        window: int | str | Schedule = 1,
        restart: bool = False,
        optimizer: int | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__(name, every, start, optimizer, offload)
        if isinstance(window, int) and window < 1:
            raise AuxiliaryError(f"{name}: window={window} counts snapshots: at least 1.")
        if restart and (window != 1 or not self.from_the_start):
            raise AuxiliaryError(
                f"{name}: with restart=True the teacher is the one generation before, so window="
                f"{window!r} and start={start!r} have no meaning. Leave them out."
            )
        try:
            self.window = Schedule.parse(window)
        except ValueError as error:
            raise AuxiliaryError(f"{name}: window: {error}") from error
        self._window_at: Callable[[int], float] | None = None
        self._restart = Restart() if restart else None

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        self._window_at = engine.bind(self.window, f"{self.name}: window={str(self.window)!r}")
        if self._restart is not None:
            self._restart.start(engine, self.new_store, (state or {}).get("restart"))
        super().start(engine, state)

    def begin(self, module: nn.Module) -> None:
        if self.from_the_start and self._restart is None:
            self.ring.append(self.new_store(module))
            self.settle()

    def move(self, steps: int) -> None:
        assert self._window_at is not None, "bound when training starts"
        self.take(max(1, int(self._window_at(steps))))
        self.settle()
        if self._restart is not None:
            self._restart.due = True

    def settle(self) -> None:
        if not self.ring:
            return
        if len(self.ring) == 1:
            if self.store is not self.ring[0] and self.store is not None:
                self.store.close()
            self.store = self.ring[0]
            return
        if self.store is None or any(self.store is each for each in self.ring):
            self.store = self.new_store(self.engine.module)
        self.store.mean_of(self.ring)

    def buffers_now(self) -> dict[str, Tensor] | None:
        if self.pending is None or len(self.ring) < 2:
            return super().buffers_now()
        *older, newest = self.ring
        return mean_of_buffers(
            [*(each.buffers for each in older), newest.buffers_after(self.pending)]
        )

    def before_step(self, now: Progress) -> None:
        super().before_step(now)
        if self._restart is not None and self._restart.due:
            for each in self.engine.members.values():  # the buffers of what was trained
                if isinstance(each, Teacher):
                    each.take_buffers()
            self._restart.before_step()
            for member in self.engine.members.values():
                member.after_restart()

    def stop(self) -> None:
        super().stop()
        self._window_at = None
        if self._restart is not None:
            self._restart.stop()

    def state(self) -> dict[str, Any]:
        state = super().state()
        if self._restart is not None:
            state["restart"] = self._restart.state()
        return state


class VotedTeacher(_Snapshots):
    """A teacher whose prediction is what the last K snapshots of the student agree on.

    Zhu et al. 2023, "Improving Differentiable Architecture Search via Self-Distillation",
    arXiv:2302.05629, section 3. One forward for each snapshot in every step. Features are the mean
    over the snapshots, and so is the distance that is logged.

    Until the first snapshot objectives that name this teacher have no weight.

    Args:
        name: what objectives call it by.
        snapshots: K, how many have a vote. Memory: one copy of the parameters for each.
        every: from one snapshot to the next.
        start: the time of the first; at 0 the weights that training begins with.
        vote: ``"mean"`` of the probabilities, ``"logits"`` for the mean of the logits (for
            regression: of the predictions), or ``"majority"``: the share of snapshots that predict
            each class.
        dim: class dimension of the logits.
        optimizer: see `EMATeacher`.

    Raises:
        AuxiliaryError: fewer than one snapshot, an unknown vote; and see `EMATeacher`. Weights of
            this teacher (``EMAAnchor(space="weight")``, `EMAWeights`) do not exist.
    """

    averages = False

    def __init__(
        self,
        name: str = "voted",
        snapshots: int = 3,
        every: Time = "1ep",
        start: Time = 0,
        vote: Literal["mean", "logits", "majority"] = "mean",
        dim: int = -1,
        optimizer: int | None = None,
    ) -> None:
        super().__init__(name, every, start, optimizer)
        if snapshots < 1:
            raise AuxiliaryError(f"{name}: snapshots={snapshots} have a vote: at least 1.")
        votes: dict[str, Vote] = {
            "mean": partial(mean_vote, dim=dim),
            "majority": partial(majority_vote, dim=dim),
            "logits": _mean,
        }
        if vote not in votes:
            raise AuxiliaryError(
                f"{name}: vote={vote!r} is unknown. Choose one of {', '.join(map(repr, votes))}."
            )
        self.snapshots = snapshots
        self.vote = votes[vote]

    def begin(self, module: nn.Module) -> None:
        if self.from_the_start:
            self.ring.append(self.new_store(module))

    def move(self, steps: int) -> None:
        self.take(self.snapshots)

    def weights_in_place(self) -> list[AbstractContextManager[None]]:
        return [each.in_place() for each in self.ring]

    @property
    def stores(self) -> list[WeightStore]:
        return self.ring

    def show(self, taught: list[Record], locations: Locations, asked_by: str) -> Pass:
        passes = [Pass(self.engine, each, locations, asked_by) for each in taught]
        return VotedPass(passes, self.vote)

    def pairs(self) -> tuple[list[nn.Parameter], list[Tensor]]:
        raise AuxiliaryError(
            f"{self.name}: a VotedTeacher has {self.snapshots} sets of weights, not one to be near "
            f"to. SnapshotTeacher(window={self.snapshots}) has their mean."
        )


def _mean(logits: list[Tensor]) -> Tensor:
    total: Tensor = sum(logits[1:], logits[0])
    return total / len(logits)
