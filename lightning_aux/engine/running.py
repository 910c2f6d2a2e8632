"""``Running``: the user's ``training_step`` with our terms, one batch after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_aux.engine.attached import Attached
from lightning_aux.engine.capture import versions
from lightning_aux.engine.errors import AuxiliaryError
from lightning_aux.engine.logging import log_step, logs_now
from lightning_aux.engine.patches import Patches
from lightning_aux.engine.replay import Unobserved
from lightning_aux.engine.step import Call, Record, Step, StepState

if TYPE_CHECKING:
    from lightning_aux.engine.engine import Engine

__all__ = ["Running"]


class Running:
    """Wraps the module's methods for the time of training and runs its steps.

    The terms are computed inside the user's ``training_step``: only there do precision, gradient
    scaling, accumulation and the strategy's gradient synchronisation treat them as the user's.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._module = engine.module
        self._trainer = engine.trainer
        self._capture = engine.capture
        self._movers = self._overriding("after_optimizer_step")
        self._preparers = self._overriding("before_step")
        self._unobserved = Unobserved(self._module)
        self._deferred: list[Callable[[], None]] = []
        self._now: StepState | None = None
        self._attempts = self._trainer.global_step
        self._hooks: list[Any] = []
        self._inert: set[str] = set()
        self._stopped = False

    def _overriding(self, method: str) -> list[Attached]:
        base, members = getattr(Attached, method), self._engine.members.values()
        return [each for each in members if getattr(type(each), method) is not base]

    # ----------------------------------------------------------------------------- wrapping
    def wrap(self, patches: Patches) -> None:
        """Replace the module's ``training_step``, ``forward`` and ``manual_backward``."""
        module = self._module
        training_step = module.training_step

        def with_terms(*args: Any, **kwargs: Any) -> Any:
            if self._stopped or not torch.is_grad_enabled():
                return training_step(*args, **kwargs)
            return self._step(training_step, args, kwargs)

        patches.wrap(module, "training_step", with_terms)

        forward = module.forward

        def recorded_forward(*args: Any, **kwargs: Any) -> Any:
            if self._capture.record is None:
                return forward(*args, **kwargs)
            before = versions(args)
            returned = forward(*args, **kwargs)
            call = Call(args, kwargs, returned, overwritten=versions(args) != before)
            self._capture.record.add("", call)
            return returned

        patches.wrap(module, "forward", recorded_forward)

        if not module.automatic_optimization:
            manual_backward = module.manual_backward

            def with_terms_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
                manual_backward(self._join_backward(loss), *args, **kwargs)

            patches.wrap(module, "manual_backward", with_terms_backward)

        # Fires for real steps only: not for micro-batches, nor when a gradient scaler skips one.
        for optimizer in list(self._trainer.optimizers)[:1]:
            self._hooks.append(optimizer.register_step_post_hook(self._stepped))

    def stop(self) -> None:
        """Let go of the optimizer; wrappers that cannot be removed pass calls through."""
        self._stopped = True
        while self._hooks:
            self._hooks.pop().remove()

    # ----------------------------------------------------------------------------- one batch
    def _step(self, training_step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        engine = self._engine
        now = engine.progress()
        self._forget_skipped_step()
        engine.indices.begin_batch(self._trainer.fit_loop.epoch_loop.total_batch_idx)
        for member in self._preparers:
            member.before_step(now)
        record = Record(self._batch_of(args, kwargs), "student")
        batch_idx = self._trainer.fit_loop.epoch_loop.batch_idx
        state = self._now = StepState(record, batch_idx, now, self._deferred.append)
        stepped = engine.steps
        try:
            self._capture.record = record
            state.output = training_step(*args, **kwargs)
            self._capture.record = None
            state.finished = True
            engine.model_call.bind(record)
            if self._module.automatic_optimization:
                return self._joined_output(state)
            if engine.steps > stepped:
                self._check_joined(state)
            return state.output
        finally:
            self._capture.record = None
            self._now = None

    def _batch_of(self, args: Any, kwargs: Any) -> Any:
        if "batch" in kwargs:
            return kwargs["batch"]
        return args[0] if args else next(iter(kwargs.values()), None)

    def _joined_output(self, state: StepState) -> Any:
        output = state.output
        if isinstance(output, Tensor):
            return self._add_terms(state, output, 0)
        if isinstance(output, Mapping) and "loss" in output:
            return {**output, "loss": self._add_terms(state, output["loss"], 0)}
        return output  # None skips the step; for anything else Lightning has the message

    def _join_backward(self, loss: Tensor) -> Tensor:
        state = self._now
        if state is None or self._stopped:
            return loss
        record, self._capture.record = self._capture.record, None
        position, state.backwards = state.backwards, state.backwards + 1
        try:
            return self._add_terms(state, loss, position)
        finally:
            self._capture.record = record
            state.record.spend()
            state.teachers.clear()

    def _check_joined(self, state: StepState) -> None:
        late = [each for each in self._engine.objectives if each.backward >= state.backwards]
        if late:
            raise AuxiliaryError(
                f"{type(self._module).__name__}.training_step stepped its optimizer after "
                f"{state.backwards} call(s) of self.manual_backward(loss), but {late[0].name} "
                f"joins call number {late[0].backward} (counted from 0). Call "
                f"self.manual_backward(loss) instead of loss.backward(), or set backward=...."
            )

    def _add_terms(self, state: StepState, loss: Tensor, backward: int) -> Tensor:
        """Main + Σ weight · term, over the objectives that join this backward."""
        engine = self._engine
        state.loss = loss
        values: dict[str, Any] = {}
        total = loss
        joining = False
        for objective in engine.objectives:
            if objective.backward != backward:
                continue
            joining = True
            weight = objective.weight_at(state.progress.steps)
            values[f"aux/{objective.name}/weight"] = weight
            if weight == 0.0 and not objective.observes:
                continue
            locations = objective.locations.over(engine.locations)
            deferred = len(self._deferred)
            term = objective.term(Step(engine, state, locations, objective.name))
            if term is None:  # refused: what it wanted to remember of this step goes with it
                del self._deferred[deferred:]
                continue
            values[f"aux/{objective.name}"] = term.detach()
            if weight != 0.0:
                self._check_depends(objective.name, term, loss)
                total = total + weight * term
        if engine.heads and backward == 0:
            total = total + engine.heads.zero_term()
        if logs_now(self._trainer):
            if joining:  # several manual_backward calls of one step add up
                state.main = state.main + loss.detach()
                state.total = state.total + total.detach()
                values |= {"aux/main": state.main, "aux/total": state.total}
            log_step(self._module, values, engine.members)
        return total

    def _check_depends(self, name: str, term: Tensor, loss: Tensor) -> None:
        if term.requires_grad or not loss.requires_grad or name in self._inert:
            return
        self._inert.add(name)
        rank_zero_warn(
            f"lightning_aux: the term of {name} has no gradient, so it changes nothing. What it "
            f"reads was computed under no_grad, detached, or belongs to frozen parameters."
        )

    def teacher_record(self, name: str, state: StepState, asked_by: str) -> Record:
        """The teacher's pass over this batch; run on first use, once per step."""
        if name not in state.teachers:
            engine = self._engine
            teacher = engine.teacher(name, asked_by)
            record = Record(state.record.batch, name)
            forward = engine.locations.forward
            if forward is None:
                run = engine.model_call.again(state.record, asked_by)
            else:
                run = partial(forward, self._module, record.batch)
            before, self._capture.record = self._capture.record, record
            try:
                with teacher.weights_in_place(), self._unobserved(state.loss.device):
                    returned = run()
            finally:
                self._capture.record = before
            if forward is not None:
                record.calls[""] = [Call((), {}, returned)]
            state.teachers[name] = record
        return state.teachers[name]

    # ----------------------------------------------------------------------------- optimizer
    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """A real optimizer step: teachers, memories and schedules move, once."""
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf.item()):
            self._deferred.clear()  # a fused optimizer is called but does nothing on overflow
            return
        self._engine.steps += 1
        deferred = self._deferred.copy()
        self._deferred.clear()
        with torch.no_grad():
            for act in deferred:
                act()
            now = self._engine.progress()
            for member in self._movers:
                member.after_optimizer_step(now)

    def _forget_skipped_step(self) -> None:
        """Drop what was deferred to an optimizer step that a gradient scaler then skipped."""
        attempts = self._trainer.global_step
        if attempts != self._attempts and len(self._trainer.optimizers) == 1:
            self._deferred.clear()
        self._attempts = attempts
