"""``SWATeacher``: the equal average of the student's weights at chosen times."""

from __future__ import annotations

from typing import Literal

from lightning_aux.schedule import Time
from lightning_aux.teachers.moving import MovingTeacher

__all__ = ["SWATeacher"]


class SWATeacher(MovingTeacher):
    """Stochastic weight averaging: the mean of the weights at the end of each cycle.

    ``φ ← (n·φ + θ) / (n + 1)`` with ``n`` the number of weights averaged so far (Izmailov et al.
    2018, "Averaging Weights Leads to Wider Optima and Better Generalization", arXiv:1803.05407,
    algorithm 1). With a cyclical learning rate, ``every`` is the length of its cycle and the
    weights are taken where the rate is smallest; with a constant one it is usually an epoch.

    Args:
        name: what objectives, and `EMAWeights`, call it by.
        start: the time of the first weights that count (``"75%"``, ``"10ep"`` or optimizer
            steps). Until then the teacher is the student as it is now. At 0 the first are those
            after ``every``: the weights that training begins with are not averaged.
        every: from one to the next.
        buffers: ``"copy"`` or ``"average"``, see `EMATeacher`. Either way running statistics of
            BatchNorm are not those of the mean weights: ``lightning-aux export`` recomputes them
            (``--recompute-batch-norm``), `EMAWeights` evaluates with what is here.
        optimizer: see `EMATeacher`.
        offload: see `EMATeacher`.

    Raises:
        AuxiliaryError: see `EMATeacher`.
    """

    def __init__(
        self,
        name: str = "swa",
        start: Time = "75%",
        every: Time = "1ep",
        buffers: Literal["copy", "average"] = "copy",
        optimizer: int | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__(name, every, start, buffers, optimizer, offload)

    def move(self, steps: int) -> None:
        decay = self.updates / (self.updates + 1)
        if self.store is None:
            self.store = self.new_store(self.engine.module)
        else:
            self.store.update(decay)
        self.updates += 1
        self.defer_buffers(decay)
