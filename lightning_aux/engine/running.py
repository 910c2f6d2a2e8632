"""``Running``: the user's ``training_step`` with our terms, one batch after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_aux.engine.capture import apart
from lightning_aux.engine.distributed import processes, shards_parameters
from lightning_aux.engine.errors import AuxiliaryError
from lightning_aux.engine.finite import Trouble, Verdicts
from lightning_aux.engine.logging import log_step, logs_now
from lightning_aux.engine.patches import Patches
from lightning_aux.engine.step import Record, Step, StepState
from lightning_aux.engine.stepping import Stepping

if TYPE_CHECKING:
    from lightning_aux.engine.engine import Engine, TermLike

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
        self._stepping = Stepping(engine)
        # By name already, which decides among equals.
        self._preparers = sorted(engine.overriding("before_step"), key=lambda each: each.turn)
        self._observers = engine.overriding("observe")
        self._comparers = engine.overriding("before_backward")
        self._observed = False
        self._verdicts = Verdicts()
        # Sharded models communicate inside of a term: a process that fails there cannot go on to
        # tell the others, and Lightning ends them.
        self._tells = processes() > 1 and not shards_parameters(self._trainer.strategy)
        self._failures: dict[tuple[str, int], Exception] = {}
        self._now: StepState | None = None
        self._inert: set[str] = set()
        self._stopped = False

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

        self._capture.wrap_forward(patches)

        if not module.automatic_optimization:
            manual_backward = module.manual_backward

            def with_terms_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
                # A checkpointed forward that backward runs again is not a call of the step.
                record, self._capture.record = self._capture.record, None
                try:
                    manual_backward(self._join_backward(loss), *args, **kwargs)
                finally:
                    self._capture.record = record

            patches.wrap(module, "manual_backward", with_terms_backward)

        self._stepping.wrap(patches)

    def stop(self) -> None:
        """Let go of the optimizer; wrappers that cannot be removed pass calls through."""
        self._stopped = True
        for trouble in self._verdicts.arrived(wait=True):  # of the last steps, on a GPU
            self._verdicts.clear()
            rank_zero_warn(f"lightning_aux: {self._error(trouble)}")
        self._stepping.stop()

    # ----------------------------------------------------------------------------- one batch
    def _step(self, training_step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        engine = self._engine
        self._stepping.toggled = None
        engine.indices.begin_batch(self._trainer.fit_loop.epoch_loop.total_batch_idx)

        def run_on(batch: Any) -> Any:
            if "batch" in kwargs:
                return training_step(*args, **{**kwargs, "batch": batch})
            return training_step(*((batch, *args[1:]) if args else ()), **kwargs)

        engine.passes.run_step = run_on
        now = [engine.progress(place) for place in range(len(engine.clocks))]
        for member in self._preparers:
            member.before_step(now[member.optimizer])
        record = Record(apart(self._batch_of(args, kwargs)), "student")
        batch_idx = self._trainer.fit_loop.epoch_loop.batch_idx
        state = self._now = StepState(record, batch_idx, now)
        stepped = engine.clocks.copy()
        record.began = self._capture.random_states()
        awaits_backward = False
        try:
            self._capture.record = record
            state.output = training_step(*args, **kwargs)
            self._capture.record = None
            state.finished = True
            engine.model_call.bind(record)
            if self._module.automatic_optimization:
                output = self._joined_output(state)
                awaits_backward = output is not None
                return output
            self._check_joined(state, stepped)
            return state.output
        finally:
            self._capture.record = None
            self._now = None
            if not awaits_backward:
                engine.give_back_weights()

    def _batch_of(self, args: Any, kwargs: Any) -> Any:
        if "batch" in kwargs:
            return kwargs["batch"]
        return args[0] if args else next(iter(kwargs.values()), None)

    def _joined_output(self, state: StepState) -> Any:
        output = state.output
        if isinstance(output, Tensor):
            return self._add_terms(state, output, self._engine.objectives)
        if isinstance(output, Mapping) and "loss" in output:
            loss = self._add_terms(state, output["loss"], self._engine.objectives)
            return {**output, "loss": loss}
        return output  # None skips the step; for anything else Lightning has the message

    def _join_backward(self, loss: Tensor) -> Tensor:
        state = self._now
        if state is None or self._stopped:
            return loss
        position, state.backwards = state.backwards, state.backwards + 1
        joining = [each for each in self._engine.objectives if self._joins(each, state, position)]
        try:
            return self._add_terms(state, loss, joining)
        finally:
            state.record.spend()
            state.taught.clear()

    def _joins(self, objective: TermLike, state: StepState, position: int) -> bool:
        """Whether this call of ``manual_backward`` is the one of ``objective``."""
        if objective.backward is not None:
            return objective.backward == position
        if objective.name in state.joined:
            return False
        count, toggled = len(self._stepping.optimizers), self._stepping.toggled
        if toggled is None and count > 1:
            raise AuxiliaryError(
                f"{objective.name}: {type(self._module).__name__} has {count} "
                f"optimizers, and it is not clear for which of them training_step calls "
                f"manual_backward. Call self.toggle_optimizer(...) before and "
                f"self.untoggle_optimizer(...) after, or say which call of manual_backward the "
                f"term joins: backward=0 for the first of a step."
            )
        return toggled is None or toggled == objective.optimizer

    def _check_joined(self, state: StepState, stepped: list[int]) -> None:
        for objective in self._engine.objectives:
            place = objective.optimizer
            if objective.name in state.joined or self._engine.clocks[place] == stepped[place]:
                continue
            waits = (
                f"joins call number {objective.backward} (counted from 0)"
                if objective.backward is not None
                else f"joins one for optimizer {place}"
            )
            raise AuxiliaryError(
                f"{type(self._module).__name__}.training_step stepped its optimizer after "
                f"{state.backwards} call(s) of self.manual_backward(loss), but {objective.name} "
                f"{waits}. Call self.manual_backward(loss) instead of loss.backward(), or set "
                f"backward=...."
            )

    def _add_terms(self, state: StepState, loss: Tensor, joining: list[TermLike]) -> Tensor:
        """Main + Σ weight · term, over the objectives that join this backward."""
        engine = self._engine
        self._capture.settle(state.record)
        state.loss = loss
        logs = logs_now(self._trainer)
        if self._observers and not state.observed and (logs or not self._observed):
            self._show(state)
        values: dict[str, Any] = {}
        weights: dict[str, float] = {}
        acts: dict[str, list[Callable[[], None]]] = {}
        terms: dict[str, Tensor | None] = {}
        active: list[TermLike] = []
        for objective in joining:
            state.joined.add(objective.name)
            weight = objective.weight_at(state.progress[objective.optimizer].steps)
            weights[objective.name] = values[f"aux/{objective.name}/weight"] = weight
            if weight == 0.0 and not objective.observes:
                continue
            active.append(objective)
            terms[objective.name] = self._term(objective, state, acts)
        # What only observes may see anything: with weight 0 training goes on as without it.
        judged = {
            name: term if term is None or weights[name] else torch.zeros_like(term)
            for name, term in terms.items()
        }
        used = self._judged(active, judged, state, loss) if active else {}
        total, weighted = loss, dict[str, Tensor | None]()
        for objective in active:
            name = objective.name
            if name not in used:  # what it wanted to remember of this step goes with the term
                values[f"aux/{name}/weight"] = 0.0
                if weights[name] != 0.0 and terms[name] is None:
                    weighted[name] = None
                continue
            term = terms[name]
            assert term is not None, "one that failed is not used"
            values[f"aux/{name}"] = term.detach()
            self._stepping.defer(objective.optimizer, acts[name])
            if weights[name] != 0.0:
                self._check_depends(name, term, loss)
                weighted[name] = added = weights[name] * term
                total = total + added
        for member in self._comparers:
            own = {each.name for each in joining if each.optimizer == member.optimizer}
            if own or self._module.automatic_optimization or not engine.objectives:
                member.before_backward(loss, {k: v for k, v in weighted.items() if k in own})
        if engine.heads:
            total = total + engine.heads.zero_term(self._stepping.toggled)
        if logs:
            if joining:  # several manual_backward calls of one step add up
                state.main = state.main + loss.detach()
                state.total = state.total + total.detach()
                values |= {"aux/main": state.main, "aux/total": state.total}
            log_step(self._module, values, engine.members)
        return total

    def _show(self, state: StepState) -> None:
        """Show the step to those who only look on, before any term runs the model again."""
        state.observed = self._observed = True
        engine = self._engine
        with torch.no_grad():
            for member in self._observers:
                locations = member.locations.over(engine.locations)
                step = Step(engine, state, locations, member.name, member.optimizer, _never)
                member.observe(step)

    def _term(
        self, objective: TermLike, state: StepState, acts: dict[str, list[Callable[[], None]]]
    ) -> Tensor | None:
        """The objective's term, or ``None`` where it fails and the other processes must know."""
        engine = self._engine
        locations = objective.locations.over(engine.locations)
        later = acts[objective.name] = []
        step = Step(engine, state, locations, objective.name, objective.optimizer, later.append)
        if not self._tells:
            return objective.term(step)
        try:
            return objective.term(step)
        except Exception as error:
            self._failures[objective.name, step.progress.steps] = error
            return None

    def _judged(
        self,
        active: list[TermLike],
        terms: dict[str, Tensor | None],
        state: StepState,
        loss: Tensor,
    ) -> dict[str, Tensor]:
        """The terms that are used in this step, the same on every process.

        Raises:
            AuxiliaryError: a term of this or a recent step was not finite on some process.
        """
        skips = {each.name: each for each in active if each.nonfinite == "skip"}
        steps = state.progress[active[0].optimizer].steps
        self._verdicts.add(terms, steps, loss.device)
        skipped = set()
        # To leave a term out, its value has to be known now.
        for trouble in self._verdicts.arrived(wait=bool(skips)):
            if trouble.failed or trouble.name not in skips:
                self._verdicts.clear()
                raise self._error(trouble)
            skips[trouble.name].skip()
            skipped.add(trouble.name)
        return {
            name: term for name, term in terms.items() if term is not None and name not in skipped
        }

    def _error(self, trouble: Trouble) -> Exception:
        own = self._failures.get((trouble.name, trouble.steps))
        if own is not None:
            return own
        where = f" on process {trouble.rank}" if processes() > 1 else ""
        if trouble.failed:
            return AuxiliaryError(
                f"{trouble.name}: its term could not be computed{where} after {trouble.steps} "
                f"optimizer steps; the error is in the output of that process."
            )
        value = "not finite" if trouble.value is None else trouble.value
        return AuxiliaryError(
            f"{trouble.name}: the term is {value}{where} after {trouble.steps} optimizer steps. "
            f"Look at its inputs (learning rate, precision, empty or constant batches); "
            f"nonfinite='skip' leaves such steps out and counts them."
        )

    def _check_depends(self, name: str, term: Tensor, loss: Tensor) -> None:
        if term.requires_grad or not loss.requires_grad or name in self._inert:
            return
        self._inert.add(name)
        rank_zero_warn(
            f"lightning_aux: the term of {name} has no gradient, so it changes nothing. What it "
            f"reads was computed under no_grad, detached, or belongs to frozen parameters."
        )


def _never(act: Callable[[], None]) -> None:
    """Nothing of a diagnostic waits for the optimizer."""
