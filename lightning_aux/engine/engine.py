"""The engine: one per module and fit, however many callbacks are attached.

It is the only place that knows how Lightning runs a step: it wraps ``training_step``, adds the
terms, counts real optimizer steps, and takes everything away again. Members know tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_aux.engine.attached import Attached
from lightning_aux.engine.capture import Capture
from lightning_aux.engine.clock import horizon_of
from lightning_aux.engine.errors import AuxiliaryError, near_matches
from lightning_aux.engine.heads import Heads
from lightning_aux.engine.indices import Indices
from lightning_aux.engine.logging import log_hyperparameters, log_step, logs_now
from lightning_aux.engine.patches import Patches
from lightning_aux.engine.replay import unobserved
from lightning_aux.engine.step import Call, Progress, Record, Step, StepState
from lightning_aux.engine.taps import Locations

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from lightning_aux.schedule import Horizon

__all__ = ["Engine", "TeacherLike", "TermLike"]

ATTRIBUTE = "_lightning_aux"
STATE_KEY = "lightning_aux"


class TermLike(Protocol):
    """What the engine needs of an objective."""

    observes: ClassVar[bool]
    name: str
    backward: int
    locations: Locations

    def weight_at(self, steps: int) -> float: ...
    def term(self, step: Step) -> Tensor | None: ...


class TeacherLike(Protocol):
    """What the engine needs of a teacher."""

    name: str

    def weights_in_place(self) -> AbstractContextManager[None]: ...
    def pairs(self) -> tuple[list[nn.Parameter], list[Tensor]]: ...


class Engine:
    """Attaches members to ``module`` for one fit of ``trainer``."""

    def __init__(self, trainer: Any, module: Any) -> None:
        self.trainer = trainer
        self.module = module
        self.members: dict[str, Attached] = {}
        self.locations = Locations()
        self.capture = Capture(module)
        self.heads = Heads(module)
        self.indices = Indices()
        self.deferred: list[Callable[[], None]] = []
        self.horizon: Horizon | None = None
        self.steps = 0
        self.binding = ""
        self._bound_path: str | None = None
        self._objectives: list[TermLike] = []
        self._teachers: dict[str, TeacherLike] = {}
        self._movers: list[Attached] = []
        self._preparers: list[Attached] = []
        self._candidates: list[str] = []
        self._candidate_hooks: list[str] = []
        self._patches = Patches()
        self._step_hooks: list[Any] = []
        self._restored: dict[str, Any] | None = None
        self._said: set[str] = set()
        self._now: StepState | None = None
        self._checked = self._loaded = self._started = self._detached = False
        self._attempts = trainer.global_step
        self._arguments: tuple[str, ...] = ()

    def continue_from(self, before: Engine) -> None:
        """Go on where an earlier ``fit`` of the same Trainer and module ended."""
        same = before.module is self.module and before.trainer is self.trainer
        if same and before._started and self.trainer.global_step > 0:
            self._restored = self._restored or before._entry()

    @classmethod
    def of(cls, trainer: Any, module: Any) -> Engine:
        """The engine of this fit; made by whichever callback asks first."""
        engine: Engine | None = module.__dict__.get(ATTRIBUTE)
        if engine is None or engine.trainer is not trainer:
            if engine is not None:
                engine.detach()
            engine = cls(trainer, module)
            engine._patches.set(module, ATTRIBUTE, engine)
            engine._prepare_wrapping()
        return engine

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the user's module is not attached to anything."""
        return

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())

    # --------------------------------------------------------------------------------- attaching
    def add(self, member: Attached) -> None:
        """Register a member and what it brings along."""
        known = self.members.get(member.name)
        if known is not None:
            raise AuxiliaryError(
                f"two callbacks are called {member.name!r}: a {type(known).__name__} and a "
                f"{type(member).__name__}. Give one of them another name: "
                f"{type(member).__name__}(..., name='...')."
            )
        self.members[member.name] = member
        # Sorted, so that sums of terms and updates do not depend on the order of callbacks.
        self.members = dict(sorted(self.members.items()))
        member._engine = self
        for companion in member.companions():
            self.add(companion)
        member.attach(self)

    def teach(self, teacher: TeacherLike) -> None:
        """Register a teacher under its name."""
        self._teachers[teacher.name] = teacher

    def contribute(self, objective: TermLike) -> None:
        """Register an objective: its term joins the loss."""
        self._objectives.append(objective)
        self._objectives.sort(key=lambda each: each.name)

    def teacher(self, name: str, asked_by: str) -> TeacherLike:
        """The teacher called ``name``.

        Raises:
            AuxiliaryError: there is none.
        """
        if name not in self._teachers:
            raise AuxiliaryError(
                f"{asked_by}: no teacher is called {name!r}. {near_matches(name, self._teachers)} "
                f"Add one to the Trainer's callbacks, for example EMATeacher(name={name!r})."
            )
        return self._teachers[name]

    def say(self, what: str, where: str) -> None:
        """Tell the user once what a default was bound to."""
        line = f"lightning_aux: {what} = {where}"
        if line not in self._said:
            self._said.add(line)
            rank_zero_info(line)

    def _prepare_wrapping(self) -> None:
        self.indices.install(self.trainer, self._patches)
        configure_model: Callable[[], None] = self.module.configure_model

        # Not functools.wraps: Lightning skips configure_model where it looks like its own, and
        # this is the one moment after every setup() and before the strategy wraps the module.
        def configure_model_then_heads() -> None:
            configure_model()
            self._build_heads()

        self._patches.set(self.module, "configure_model", configure_model_then_heads)

    def _build_heads(self) -> None:
        for name, member in self.members.items():
            head = member.build_head(self.module)
            if head is not None:
                self.heads.add(name, head)
                member.head = head  # type: ignore[attr-defined]
        if not self.heads:
            return
        if "FSDP" in type(self.trainer.strategy).__name__ or hasattr(
            self.trainer.strategy, "device_mesh"
        ):
            raise AuxiliaryError(
                f"heads ({', '.join(self.members)}) are not sharded yet: use a strategy that keeps "
                f"whole parameters (single device, ddp)."
            )
        self.heads.join_on_configure(self.module, self._patches)

    # ------------------------------------------------------------------------- start of training
    def check(self) -> None:
        """Raise everything that can be known to be wrong before training starts."""
        if self._checked:
            return
        self._checked = True
        self.heads.hide()
        self.capture.add(self.locations.module_paths(), "Taps")
        for member in self.members.values():
            member.check(self)

    def start(self) -> None:
        """Wrap the module and start every member; training is about to begin."""
        if self._started:
            return
        self._started = True
        saved = self._restored or {}
        self.steps = int(saved.get("steps", self.trainer.global_step))
        self.horizon = horizon_of(self.trainer, self.module.automatic_optimization)
        self.indices.settle(self.trainer)
        states = saved.get("members", {})
        missing = [name for name in self.members if name not in states] if saved else []
        if missing:
            rank_zero_warn(
                f"lightning_aux: the checkpoint has no state for {', '.join(missing)}, which "
                f"start fresh from the loaded weights."
            )
        if "heads" in saved and self.heads:
            self.heads.load(saved["heads"])
        for name, member in self.members.items():
            member.start(self, states.get(name))
        self._restored = None
        self._movers = self._overriding("after_optimizer_step")
        self._preparers = self._overriding("before_step")
        self._wrap()
        log_hyperparameters(self.trainer, self.module, self.members)

    def _overriding(self, method: str) -> list[Attached]:
        base = getattr(Attached, method)
        return [each for each in self.members.values() if getattr(type(each), method) is not base]

    def _wrap(self) -> None:
        module, patches = self.module, self._patches
        training_step = module.training_step
        self._arguments = tuple(inspect.signature(training_step).parameters)

        @wraps(training_step)
        def with_terms(*args: Any, **kwargs: Any) -> Any:
            if self._detached or not torch.is_grad_enabled():
                return training_step(*args, **kwargs)
            return self._run_step(training_step, args, kwargs)

        patches.set(module, "training_step", with_terms)

        forward = module.forward

        @wraps(forward)
        def recorded_forward(*args: Any, **kwargs: Any) -> Any:
            returned = forward(*args, **kwargs)
            if self.capture.record is not None:
                self.capture.record.add("", Call(args, kwargs, returned))
            return returned

        patches.set(module, "forward", recorded_forward)

        if not module.automatic_optimization:
            manual_backward = module.manual_backward

            @wraps(manual_backward)
            def with_terms_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
                manual_backward(self._join_backward(loss), *args, **kwargs)

            patches.set(module, "manual_backward", with_terms_backward)

        optimizers = list(self.trainer.optimizers)
        if optimizers:
            self._step_hooks.append(optimizers[0].register_step_post_hook(self._stepped))
        # Until a model call is bound, the direct children with parameters are candidates for it.
        self._candidates = [
            name for name, child in module.named_children() if any(True for _ in child.parameters())
        ]
        self._candidate_hooks = [name for name in self._candidates if name not in self.capture]
        self.capture.add(self._candidate_hooks, "the engine")

    # ---------------------------------------------------------------------------------- one step
    def progress(self) -> Progress:
        """Where training stands now."""
        total = self.horizon.total if self.horizon is not None else None
        fraction = self.steps / total if total else None
        return Progress(self.steps, self.trainer.current_epoch, fraction)

    def _run_step(self, training_step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        now = self.progress()
        self._forget_skipped_step()
        self.indices.begin_step()
        for member in self._preparers:
            member.before_step(now)
        batch, batch_idx = self._batch_of(args, kwargs)
        record = Record(batch, "student")
        state = self._now = StepState(record, batch_idx, now)
        stepped = self.steps
        try:
            self.capture.record = record
            state.output = training_step(*args, **kwargs)
            self.capture.record = None
            state.finished = True
            if not self.binding:
                self._bind(record)
            if self.module.automatic_optimization:
                return self._joined_output(state)
            if self.steps > stepped:
                self._check_joined(state)
            return state.output
        finally:
            self.capture.record = None
            self._now = None

    def _forget_skipped_step(self) -> None:
        """Drop what was deferred to an optimizer step that a gradient scaler then skipped."""
        attempts = self.trainer.global_step
        if attempts != self._attempts and len(self.trainer.optimizers) == 1:
            self.deferred.clear()
        self._attempts = attempts

    def _batch_of(self, args: Any, kwargs: Any) -> tuple[Any, int]:
        bound = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        batch = bound.get("batch", args[0] if args else next(iter(kwargs.values()), None))
        return batch, int(bound.get("batch_idx", 0))

    def _check_joined(self, state: StepState) -> None:
        late = [each for each in self._objectives if each.backward >= state.backwards]
        if late:
            raise AuxiliaryError(
                f"{type(self.module).__name__}.training_step stepped its optimizer after "
                f"{state.backwards} call(s) of self.manual_backward(loss), but {late[0].name} "
                f"joins call number {late[0].backward} (counted from 0). Call "
                f"self.manual_backward(loss) instead of loss.backward(), or set backward=...."
            )

    def _joined_output(self, state: StepState) -> Any:
        output = state.output
        if output is None:
            return None
        if isinstance(output, Tensor):
            return self._add_terms(state, output, 0)
        if "loss" not in output:
            return output  # Lightning has the message for this
        return {**output, "loss": self._add_terms(state, output["loss"], 0)}

    def _join_backward(self, loss: Tensor) -> Tensor:
        state = self._now
        if state is None or self._detached:
            return loss
        record, self.capture.record = self.capture.record, None
        position, state.backwards = state.backwards, state.backwards + 1
        try:
            return self._add_terms(state, loss, position)
        finally:
            self.capture.record = record

    def _add_terms(self, state: StepState, loss: Tensor, backward: int) -> Tensor:
        """Main + Σ weight · term, over the objectives that join this backward."""
        state.loss = loss
        steps = state.progress.steps
        values: dict[str, Any] = {}
        total = loss
        for objective in self._objectives:
            if objective.backward != backward:
                continue
            weight = objective.weight_at(steps)
            values[f"aux/{objective.name}/weight"] = weight
            if weight == 0.0 and not objective.observes:
                continue
            step = Step(self, state, objective.locations.over(self.locations), objective.name)
            term = objective.term(step)
            if term is None:
                continue
            values[f"aux/{objective.name}"] = term.detach()
            if weight != 0.0:
                total = total + weight * term
        if self.heads and backward == 0:
            total = total + self.heads.zero_term()
        if logs_now(self.trainer):
            if values:
                values |= {"aux/main": loss.detach(), "aux/total": total.detach()}
            log_step(self.module, values, self.members)
        return total

    def model_call(self, record: Record, asked_by: str) -> Call:
        """The call that maps the batch to the model's output, found in the first step.

        The module's own ``forward`` if the step called it; else the one direct child that was
        called on data (not on something another layer had computed).

        Raises:
            AuxiliaryError: neither exists.
        """
        if not self.binding:
            self._bind(record)
        if self._bound_path is None:
            raise AuxiliaryError(f"{asked_by}: {self.binding}")
        calls = record.calls.get(self._bound_path)
        if not calls:
            raise AuxiliaryError(
                f"{asked_by}: {self.binding} was not called in this step, although it was in the "
                f"first. Name the logits with Taps(logits='...')."
            )
        return calls[0]

    def _bind(self, record: Record) -> None:
        """Decide which call is the model's; ``binding`` says which, or why there is none."""
        name = type(self.module).__name__
        candidates, self._candidates = self._candidates, []
        if "" in record.calls:
            self._bound_path, self.binding = "", f"{name}.forward(...)"
        else:
            called = [path for path in candidates if path in record.calls]
            on_data = [path for path in called if not _depends_on_graph(record.calls[path][0])]
            if len(on_data) == 1:
                self._bound_path, self.binding = on_data[0], f"{name}.{on_data[0]}(...)"
            else:
                self.binding = (
                    f"{name}.training_step does not call self(...), and it is not clear which "
                    f"submodule is the model (called: {', '.join(called) or 'none'}). Call "
                    f"self(x) in training_step, or keep the whole network in one submodule."
                )
        self.capture.drop([path for path in self._candidate_hooks if path != self._bound_path])

    def teacher_record(self, name: str, state: StepState, asked_by: str) -> Record:
        """The teacher's pass over this batch; run on first use, once per step."""
        if name not in state.teachers:
            teacher = self.teacher(name, asked_by)
            call = self.model_call(state.record, asked_by)
            record = Record(state.record.batch, name)
            path = self._bound_path
            model = self.module.forward if not path else self.module.get_submodule(path)
            before, self.capture.record = self.capture.record, record
            try:
                with teacher.weights_in_place(), unobserved(self.module, state.loss.device):
                    model(*call.arguments, **call.keywords)
            finally:
                self.capture.record = before
            state.teachers[name] = record
        return state.teachers[name]

    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """A real optimizer step: teachers, memories and schedules move, once."""
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf.item()):
            self.deferred.clear()  # a fused optimizer is called but does nothing on overflow
            return
        self.steps += 1
        deferred, self.deferred = self.deferred, []
        with torch.no_grad():
            for act in deferred:
                act()
            now = self.progress()
            for member in self._movers:
                member.after_optimizer_step(now)

    # ------------------------------------------------------------------------------- checkpoints
    def save(self, checkpoint: dict[str, Any]) -> None:
        """Write our one entry into the checkpoint; the rest of it stays the user's."""
        if STATE_KEY in checkpoint or not self._started:
            return
        entry = self._entry()
        if self.heads and checkpoint.get("optimizer_states"):
            entry["heads"] |= self.heads.take_from(checkpoint["optimizer_states"])
        checkpoint[STATE_KEY] = entry

    def _entry(self) -> dict[str, Any]:
        members = {name: member.state() for name, member in self.members.items()}
        entry: dict[str, Any] = {"steps": self.steps, "members": members}
        if self.heads:
            entry["heads"] = self.heads.state()
        return entry

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Keep our entry for :meth:`start`, and give the optimizer its heads back."""
        if self._loaded or self._started:
            return
        self._loaded = True
        self._restored = checkpoint.get(STATE_KEY)
        if not self._restored:
            rank_zero_warn(
                "lightning_aux: the checkpoint was written without these callbacks; they start "
                "fresh from the loaded weights."
            )
        if self.heads and checkpoint.get("optimizer_states"):
            saved = (self._restored or {}).get("heads")
            self.heads.give_to(checkpoint["optimizer_states"], saved)

    # --------------------------------------------------------------------------------- detaching
    def detach(self) -> None:
        """Take every hook, wrapper and attribute away; safe to call twice."""
        if self._detached:
            return
        self._detached = True
        try:
            for member in self.members.values():
                member.stop()
        finally:
            for handle in self._step_hooks:
                handle.remove()
            self._step_hooks.clear()
            self.capture.clear()
            self.heads.hide()
            self._patches.undo()


def _depends_on_graph(call: Call) -> bool:
    inputs = tree_leaves((call.arguments, call.keywords))
    return any(isinstance(each, Tensor) and each.requires_grad for each in inputs)
