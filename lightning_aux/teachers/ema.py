"""``EMATeacher``: the exponential moving average of the student's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from lightning_aux.engine import AuxiliaryError, Engine, Progress
from lightning_aux.engine.clock import accumulates
from lightning_aux.functional import ema_decay, power_decay, power_exponent
from lightning_aux.schedule import Duration, Schedule, Time
from lightning_aux.teachers.moving import MovingTeacher
from lightning_aux.weights.offload import before_writing

__all__ = ["EMATeacher"]


class EMATeacher(MovingTeacher):
    """A teacher that is the exponential moving average of the student.

    After every real optimizer step ``φ ← d·φ + (1 − d)·θ`` (Tarvainen & Valpola 2017, "Mean
    teachers are better role models", arXiv:1703.01780, section 2), in float32 also for half
    precision weights; never per micro-batch, never for a step that a gradient scaler skips.

    ``d`` is a constant, a schedule (self-supervised training lets it rise to 1: Grill et al. 2020,
    "Bootstrap your own latent", arXiv:2006.07733, section 3.3), given by a half-life, or that of
    the power-function average (Karras et al. 2024, "Analyzing and Improving the Training Dynamics
    of Diffusion Models", arXiv:2312.02696, section 3.1), which forgets its beginning and is always
    as long as the same share of training. Checkpoints that hold two such averages give every
    other length after training: `lightning_aux.weights.synthesize_ema`.

    Args:
        decay: ``d`` in [0, 1] of one optimizer step: a float, or a schedule of it such as
            ``"cosine(0.996, 1)"``.
        name: what objectives call it by.
        warmup: use ``min(d, (1 + n) / (10 + n))`` at step ``n`` of the average, so that it
            forgets the initial weights early in training.
        every: update after every this many optimizer steps, or so often (``"1ep"``), with the
            decay of all steps in between: its length in steps does not change.
        start: optimizer steps, or time (``"10%"``), before averaging begins; until then the
            teacher is the student as it is now, and at ``start`` the average begins from the
            weights of that moment.
        buffers: ``"copy"`` takes BatchNorm statistics from the live module at each update,
            ``"average"`` averages floating-point buffers too. Integer buffers are always copied.
        optimizer: with several optimizers, the index of the one whose steps move this teacher.
            Default: that of the objectives that name it, else the first.
        half_life: in place of ``decay``: the time (``"500 steps"``, ``"2%"``) after which a
            weight's influence on the average has halved.
        length: in place of ``decay``: the power-function average whose standard deviation is this
            share of training, between 0 and 0.28; 0.05 and 0.10 are the paper's.
        lookahead: K virtual steps of the student before every real one, on the same batch, which
            are averaged in and then undone: the teacher knows where the student is going (Du et
            al. 2022, "Learning from Future: A Novel Self-Training Framework for Semantic
            Segmentation", arXiv:2209.06993, FST-D). Costs K more steps for each step. Unlike the
            authors' code, optimizer state, buffers and random numbers (torch's, Python's, NumPy's)
            are restored too.
        offload: keep the average in host memory. An update then runs beside the next step, and the
            device has no second copy of the parameters; but each step in which an objective asks
            this teacher copies the average to the device. For an average that is evaluated
            (`EMAWeights`) or rarely asked. On CUDA, weights may be written to in the optimizer's
            step only: a clamp between two steps is an error in the next one, and one past torch's
            notice (through ``.data``) spoils the average.

    Raises:
        AuxiliaryError: ``decay`` outside [0, 1], two of ``decay``, ``half_life`` and ``length``,
            a ``length`` without an exponent, an ``every`` of zero, what is not a time; before
            training, when a time needs a length that this training has not, when objectives of
            different optimizers name it, or the strategy shards parameters in another way than
            FSDP2, or at all with ``offload``.

    Note:
        The memory is one more copy of the parameters in float32. Sharded by FSDP2, each process
        averages its part; a teacher's pass gathers parameters as the student's does, and for its
        time each process keeps one more copy of its part.
    """

    def __init__(
        self,
        decay: float | str | Schedule = 0.999,
        name: str = "ema",
        warmup: bool = False,
        every: Time = 1,
        start: Time = 0,
        buffers: Literal["copy", "average"] = "copy",
        optimizer: int | None = None,
        half_life: int | str | Duration | None = None,
        length: float | None = None,
        lookahead: int = 0,
        offload: bool = False,
    ) -> None:
        super().__init__(name, every, start, buffers, optimizer, offload)
        own = None if decay == 0.999 else decay
        given = {"decay": own, "half_life": half_life, "length": length}
        named = [f"{key}={value!r}" for key, value in given.items() if value is not None]
        if len(named) > 1:
            raise AuxiliaryError(f"{name}: {' and '.join(named)} both say how long it remembers.")
        if isinstance(decay, int | float) and not 0.0 <= decay <= 1.0:
            raise AuxiliaryError(
                f"{name}: decay={decay} must lie in [0, 1]; 0.999 averages over about the last "
                f"1000 updates."
            )
        try:
            self.decay = Schedule.parse(decay)
            self.half_life = None if half_life is None else Duration.parse(half_life)
            self.gamma = None if length is None else power_exponent(length)
        except ValueError as error:
            said = named[0] if named else f"decay={decay!r}"
            raise AuxiliaryError(f"{name}: {said}: {error}") from error
        if lookahead < 0 or (lookahead and self.interval.every != Duration(1, "steps")):
            raise AuxiliaryError(
                f"{name}: lookahead={lookahead} counts virtual steps before every real one: not "
                f"negative, and only with every=1."
            )
        self.warmup = warmup
        self.lookahead = lookahead
        self._decay_at: Callable[[int], float] | None = None
        self._began = 0

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        self._decay_at = self._bound_decay(engine)
        here = engine.progress(self.optimizer).steps
        self._began = int((state or {}).get("began", here))
        super().start(engine, state)

    def _bound_decay(self, engine: Engine) -> Callable[[int], float]:
        """``d`` by the number of optimizer steps before the one that is averaged in."""
        if self.half_life is None:
            return engine.bind(self.decay, f"{self.name}: decay={str(self.decay)!r}")
        assert engine.horizon is not None, "known when training starts"
        try:
            steps = engine.horizon.steps(self.half_life)
        except ValueError as error:
            raise AuxiliaryError(f"{self.name}: half_life: {error}") from error
        if steps == 0:
            raise AuxiliaryError(
                f"{self.name}: half_life={str(self.half_life)!r} is less than one optimizer step."
            )
        return lambda step: 0.5 ** (1 / steps)

    def check(self, engine: Engine) -> None:
        super().check(engine)
        if self.lookahead and (
            accumulates(engine.trainer) or not engine.module.automatic_optimization
        ):
            raise AuxiliaryError(
                f"{self.name}: lookahead={self.lookahead} repeats whole steps, which works with "
                f"automatic optimisation and accumulate_grad_batches=1, also in a "
                f"GradientAccumulationScheduler."
            )

    def before_step(self, now: Progress) -> None:
        super().before_step(now)
        if self.lookahead:  # whose virtual steps are undone outside of an optimizer
            before_writing()

    def after_virtual_step(self, now: Progress) -> None:
        if self.store is not None:
            self.store.update(self._decay_of(now.steps))
            before_writing()

    def begin(self, module: nn.Module) -> None:
        if self.from_the_start:
            self.store = self.new_store(module)

    def move(self, steps: int) -> None:
        if self.store is None:
            self.store = self.new_store(self.engine.module)
            self._began = steps
            self.defer_buffers(0.0)
            return
        # Those that were passed over are averaged in as if the weights had not moved since.
        decay = 1.0
        for step in range(self.moved_at, steps):
            decay *= self._decay_of(step)
        self.store.update(decay)
        self.updates += 1
        self.defer_buffers(decay)

    def _decay_of(self, step: int) -> float:
        assert self._decay_at is not None, "bound when training starts"
        count = step - self._began
        if self.gamma is not None:
            return power_decay(count + 1, self.gamma)
        decay = self._decay_at(step)
        if not 0.0 <= decay <= 1.0:
            raise AuxiliaryError(
                f"{self.name}: decay={str(self.decay)!r} is {decay} after {step} optimizer steps; "
                f"it has to stay in [0, 1]."
            )
        return ema_decay(decay, count, self.warmup)

    def stop(self) -> None:
        super().stop()
        self._decay_at = None

    def state(self) -> dict[str, Any]:
        state = {**super().state(), "began": self._began}
        if self.gamma is not None:  # what a synthesis of other lengths has to know
            state |= {"gamma": self.gamma, "steps": self.moved_at - self._began}
        return state
