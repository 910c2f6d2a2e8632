"""``EMATeacher``: the exponential moving average of the student's weights."""

from __future__ import annotations

from typing import Literal

from torch import nn

from lightning_aux.engine import AuxiliaryError, Progress
from lightning_aux.functional import ema_decay
from lightning_aux.teachers.teacher import Teacher

__all__ = ["EMATeacher"]


class EMATeacher(Teacher):
    """A teacher that is the exponential moving average of the student.

    After every real optimizer step ``φ ← d·φ + (1 − d)·θ`` (Tarvainen & Valpola 2017, "Mean
    teachers are better role models", arXiv:1703.01780, section 2), in float32 also for half
    precision weights; never per micro-batch, never for a step that a gradient scaler skips.

    Args:
        decay: ``d`` in [0, 1].
        name: what objectives call it by.
        warmup: use ``min(decay, (1 + n) / (10 + n))`` at update ``n``, so that the average
            forgets the initial weights early in training.
        every: update after every this many optimizer steps.
        start: optimizer steps before averaging begins; until then the teacher is the student as it
            is now, and at ``start`` the average begins from the weights of that moment.
        buffers: ``"copy"`` takes BatchNorm statistics from the live module at each update,
            ``"average"`` averages floating-point buffers too. Integer buffers are always copied.
        optimizer: with several optimizers, the index of the one whose steps move this teacher.
            Default: that of the objectives that name it, else the first.

    Raises:
        AuxiliaryError: ``decay`` outside [0, 1], ``every`` below 1, negative ``start``; before
            training, when objectives of different optimizers name it, or the strategy shards
            parameters in another way than FSDP2.

    Note:
        The memory is one more copy of the parameters in float32. Sharded by FSDP2, each process
        averages its part; a teacher's pass gathers parameters as the student's does, and for its
        time each process keeps one more copy of its part.
    """

    def __init__(
        self,
        decay: float = 0.999,
        name: str = "ema",
        warmup: bool = False,
        every: int = 1,
        start: int = 0,
        buffers: Literal["copy", "average"] = "copy",
        optimizer: int | None = None,
    ) -> None:
        super().__init__(name, buffers, optimizer)
        if not 0.0 <= decay <= 1.0:
            raise AuxiliaryError(
                f"{name}: decay={decay} must lie in [0, 1]; 0.999 averages over about the last "
                f"1000 updates."
            )
        if every < 1 or start < 0:
            raise AuxiliaryError(
                f"{name}: every={every} and start={start} are counted in optimizer steps: every "
                f"is at least 1, start at least 0."
            )
        self.decay = decay
        self.warmup = warmup
        self.every = every
        self.start_step = start

    def begin(self, module: nn.Module) -> None:
        if self.start_step == 0:
            self.store = self.new_store(module)

    def after_optimizer_step(self, now: Progress) -> None:
        since = now.steps - self.start_step
        if since < 0 or since % self.every:
            return
        if self.store is None:
            self.store = self.new_store(self.engine.module)
            self.defer_buffers(0.0)
        else:
            decay = ema_decay(self.decay, self.updates, self.warmup)
            self.store.update(decay)
            self.updates += 1
            self.defer_buffers(decay)
