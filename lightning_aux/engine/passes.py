"""``Passes``: the step's batch through the model once more, for a teacher or with a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import Tensor

from lightning_aux.engine.capture import apart
from lightning_aux.engine.distributed import data_rank
from lightning_aux.engine.errors import AuxiliaryError
from lightning_aux.engine.random_states import RandomStates, seed_everything
from lightning_aux.engine.replay import Unobserved
from lightning_aux.engine.step import Call, Record, StepState

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from lightning_aux.engine.engine import Engine

__all__ = ["Passes"]


class Passes:
    """Runs the model again, and records what passes through the tapped modules meanwhile."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._capture = engine.capture
        self._unobserved = Unobserved(engine.module)
        self._unobserved_step = Unobserved(engine.module, whole_steps=True)

    run_step: Callable[[Any], Any]
    """The user's own ``training_step`` on another batch, with the other arguments of this one."""

    def stop(self) -> None:
        """Undo what an interrupted pass has left."""
        self._unobserved.restore()
        self._unobserved_step.restore()
        self.__dict__.pop("run_step", None)

    def evaluated(
        self, weights: AbstractContextManager[None], state: StepState, whose: str, asked_by: str
    ) -> Record:
        """A pass with other weights, in evaluation mode and without gradient.

        Args:
            weights: a block in which they are in the module.
            state: of the step.
            whose: they are, in words.
            asked_by: begins the message of an error.
        """
        engine = self._engine
        record = Record(state.record.batch, whose)
        forward = engine.locations.forward
        if forward is None:
            run = engine.model_call.again(state.record, asked_by)
        else:
            run = partial(forward, engine.module, apart(record.batch))
        with (
            self._capture.recording(record),
            weights,
            self._unobserved.evaluated(state.loss.device),
        ):
            returned = run()
        if forward is not None:
            record.calls[""] = [Call((), {}, returned)]
        record.detach()
        return record

    def student(
        self,
        state: StepState,
        asked_by: str,
        arguments: tuple[Any, ...],
        keywords: Mapping[str, Any],
        tail: str | None = None,
    ) -> Record:
        """A pass with the student's weights and gradients; run whenever asked.

        Args:
            state: of the step.
            asked_by: begins the message of an error.
            arguments: of the model, in place of the step's own.
            keywords: likewise.
            tail: the module that the pass begins with; what ran before is taken from the step.
        """
        engine = self._engine
        record = Record(state.record.batch, "the second pass")
        run = engine.model_call.again(state.record, asked_by, arguments, keywords)
        seed = self._seed(state, asked_by)
        with self._capture.recording(record):
            if tail is None:
                device, draw = state.loss.device, partial(seed_everything, seed)
                with self._unobserved.repeated(device, draw):
                    run()
            else:
                entered = engine.model_call.of(state.record, asked_by).entered
                with self._from(tail, entered, seed, state, self._unobserved, asked_by):
                    run()
        return record

    def loss_again(self, state: StepState, asked_by: str, tail: str) -> Tensor:
        """The user's loss from their whole ``training_step``, of which the tail is computed anew.

        Raises:
            AuxiliaryError: the step returns no loss.
        """
        began, seed = state.record.began, self._seed(state, asked_by)
        with (
            self._capture.recording(None),
            self._from(tail, began, seed, state, self._unobserved_step, asked_by),
        ):
            output = self.run_step(apart(state.record.batch))
        return self._loss_in(output, asked_by)

    def loss_of(self, batch: Any, seed: int, asked_by: str) -> Tensor:
        """The user's loss of some batch, from their whole ``training_step``, with gradients.

        Args:
            batch: on the device, as ``training_step`` takes it.
            seed: of the random numbers that the step draws.
            asked_by: begins the message of an error.

        Raises:
            AuxiliaryError: the step returns no loss.
        """
        device = self._engine.trainer.strategy.root_device
        with (
            self._capture.recording(None),
            torch.compiler.set_stance("force_eager"),
            self._unobserved_step.repeated(device, partial(seed_everything, seed)),
        ):
            return self._loss_in(self.run_step(batch), asked_by)

    def _loss_in(self, output: Any, asked_by: str) -> Tensor:
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise AuxiliaryError(
                f"{asked_by}: {type(self._engine.module).__name__}.training_step, run once more on "
                f"the same batch, returned {type(loss).__name__}, no loss. Give loss=... instead."
            )
        return loss

    def _seed(self, state: StepState, asked_by: str) -> int:
        """Of the next pass: from the run's seed and the place alone.

        So a resumed run draws the same, and processes that see other data draw other masks.
        """
        trainer = self._engine.trainer
        state.passes += 1
        where = (asked_by, trainer.fit_loop.epoch_loop.total_batch_idx, state.passes)
        drawn = crc32(repr((*where, data_rank(trainer.strategy))).encode())
        return (self._engine.seed + drawn) % 2**63

    @contextmanager
    def _from(
        self,
        tail: str,
        began: RandomStates | None,
        seed: int,
        state: StepState,
        unobserved: Unobserved,
        asked_by: str,
    ) -> Iterator[None]:
        """What comes before the tail is as it was, random numbers too; then ``seed`` counts."""
        rest = self._engine.tail(tail, asked_by)
        known = rest.remembered(state.record, partial(seed_everything, seed))
        # A compiled model does not say where its random streams stood.
        draw = partial(seed_everything, seed) if began is None else began.restore
        # What is compiled would have the modules that remember compiled into it.
        with (
            torch.compiler.set_stance("force_eager"),
            unobserved.repeated(state.loss.device, draw, known),
        ):
            yield
