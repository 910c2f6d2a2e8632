"""The engine: one per module and fit, however many callbacks are attached.

It knows who is attached, starts and stops them, and keeps their state in checkpoints. How a
training step runs is in ``running``; members know tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar
from zlib import crc32

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_aux.engine.attached import Attached
from lightning_aux.engine.capture import Capture
from lightning_aux.engine.clock import horizon_of
from lightning_aux.engine.distributed import check_strategy, same_everywhere
from lightning_aux.engine.errors import AuxiliaryError, near_matches
from lightning_aux.engine.heads import Heads
from lightning_aux.engine.indices import Indices
from lightning_aux.engine.logging import log_hyperparameters, logs_now
from lightning_aux.engine.model_call import ModelCall
from lightning_aux.engine.passes import Passes
from lightning_aux.engine.patches import Patches
from lightning_aux.engine.running import Running
from lightning_aux.engine.stand_in import StandIn
from lightning_aux.engine.step import Pass, Progress, Step
from lightning_aux.engine.tail import Tail
from lightning_aux.engine.taps import Locations
from lightning_aux.functional.shards import kept_by_the_first

if TYPE_CHECKING:
    from lightning_aux.schedule import Division, Horizon

__all__ = ["Engine", "TeacherLike", "TermLike"]

Value = TypeVar("Value")
Value_co = TypeVar("Value_co", covariant=True)
ATTRIBUTE = "_lightning_aux"
STATE_KEY = "lightning_aux"


class Timed(Protocol[Value_co]):
    """A `Schedule`, or an `Interval`."""

    def bind(self, horizon: Horizon) -> Callable[[int], Value_co]: ...


class TermLike(Protocol):
    """What the engine needs of an objective."""

    observes: ClassVar[bool]
    name: str
    optimizer: int
    backward: int | None
    nonfinite: Literal["raise", "skip"]
    locations: Locations

    def weight_at(self, steps: int) -> float: ...
    def term(self, step: Step) -> Tensor: ...
    def skip(self) -> None: ...


class TeacherLike(Protocol):
    """What the engine needs of a teacher: it gives passes.

    ``follows`` says whether it has values for the student's own parameters (`pairs`).
    ``run`` is called once per step, on first use; what it returns is kept for the step and given to
    ``show`` for each objective that asks. ``reads`` is called before training.
    """

    name: str

    @property
    def ready(self) -> bool: ...
    @property
    def follows(self) -> bool: ...
    def serve(self, optimizer: int, asked_by: str) -> None: ...
    def reads(self, paths: Iterable[str], asked_by: str) -> None: ...
    def run(self, step: Step) -> Any: ...
    def show(self, taught: Any, locations: Locations, asked_by: str) -> Pass: ...
    def pairs(self) -> tuple[list[nn.Parameter], list[Tensor]]: ...


class Engine:
    """Attaches members to ``module`` for one fit of ``trainer``."""

    passes: Passes  # from the start of training on

    def __init__(self, trainer: Any, module: Any) -> None:
        self.trainer = trainer
        self.module = module
        self.members: dict[str, Attached] = {}
        self.locations = Locations()
        self.capture = Capture(module)
        self.heads = Heads(module)
        self.indices = Indices()
        self.model_call = ModelCall(module, self.capture)
        self.horizon: Horizon | None = None
        self.division: Division | None = None
        self.clocks = [0]
        self.seed = 0  # from the start of training on
        self.stand_ins: list[StandIn] = []  # for the weights, within a step
        self.objectives: list[TermLike] = []
        self._teachers: dict[str, TeacherLike] = {}
        self._patches = Patches()
        self._running: Running | None = None
        self._restored: dict[str, Any] | None = None
        self._said: set[str] = set()
        self._tails: dict[str, Tail] = {}
        self._checked = self._loaded = self._started = self._detached = False

    def continue_from(self, before: Engine) -> None:
        """Go on where an earlier ``fit`` of the same Trainer and module ended."""
        same = before.module is self.module and before.trainer is self.trainer
        if same and before._started and self.trainer.global_step > 0:
            self._restored = self._restored or before._entry()

    @classmethod
    def of(cls, trainer: Any, module: Any) -> Engine:
        """The engine of this fit; made by whichever callback asks first."""
        engine: Engine | None = module.__dict__.get(ATTRIBUTE)
        if engine is None or engine.trainer is not trainer or engine._checked:
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
        if known is member:
            return
        if known is not None:
            able = "name" in member.init_parameters()
            raise AuxiliaryError(
                f"two callbacks are called {member.name!r}: a {type(known).__name__} and a "
                f"{type(member).__name__}. "
                + (
                    f"Give one of them another name: {type(member).__name__}(..., name='...')."
                    if able
                    else "Only one can be attached; say everything in that one."
                )
            )
        self.members[member.name] = member
        # Sorted, so that sums of terms and updates do not depend on the order of callbacks.
        self.members = dict(sorted(self.members.items()))
        check_strategy(self.trainer.strategy, member.name)
        member._engine = self
        for companion in member.companions():
            self.add(companion)
        member.attach(self)

    def teach(self, teacher: TeacherLike) -> None:
        """Register a teacher under its name."""
        self._teachers[teacher.name] = teacher

    def contribute(self, objective: TermLike) -> None:
        """Register an objective: its term joins the loss."""
        self.objectives.append(objective)
        self.objectives.sort(key=lambda each: each.name)

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

    def tail(self, path: str, asked_by: str) -> Tail:
        """What follows the module at ``path``; to be asked for in ``check`` first.

        Raises:
            AuxiliaryError: there is no such module, or it names several.
        """
        if path not in self._tails:
            self._tails[path] = Tail(self, path, asked_by)
        return self._tails[path]

    def say(self, what: str, where: str) -> None:
        """Tell the user once what a default was bound to."""
        line = f"lightning_aux: {what} = {where}"
        if line not in self._said:
            self._said.add(line)
            rank_zero_info(line)

    def _prepare_wrapping(self) -> None:
        self.indices.install(self.trainer, self._patches)
        setup: Callable[..., None] = self.module.setup

        # From here on, after every callback's setup(): some of them call configure_model, and what
        # they copy of the module has nothing of ours in it.
        def setup_then_wait(*args: Any, **kwargs: Any) -> None:
            setup(*args, **kwargs)
            configure_model: Callable[[], None] = self.module.configure_model

            def configure_model_then_heads() -> None:
                configure_model()
                self._build_heads()

            # Not transparent: Lightning skips configure_model where it looks like its own, and
            # this is the one moment after every setup() and before the strategy wraps the module.
            self._patches.wrap(
                self.module, "configure_model", configure_model_then_heads, transparent=False
            )

        self._patches.wrap(self.module, "setup", setup_then_wait)

    def _build_heads(self) -> None:
        cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        built = {}
        for name, member in self.members.items():
            # From the run's seed and the name alone: the user's random stream goes on without us,
            # and the head begins the same under every strategy and beside any other.
            with torch.random.fork_rng(devices=cuda):
                torch.manual_seed((torch.initial_seed() + crc32(name.encode())) % 2**63)
                built[name] = member.build_head(self.module)
        for name, head in built.items():
            if head is not None:
                self.heads.add(name, head, self.members[name].optimizer)
                self.members[name].head = head  # type: ignore[attr-defined]
        if not self.heads:
            return
        for callback in self.trainer.callbacks:
            if any(base.__name__ == "BaseFinetuning" for base in type(callback).__mro__):
                raise AuxiliaryError(
                    f"{type(callback).__name__} keeps a list of the module's own parameters and "
                    f"cannot work with the heads of {', '.join(self.heads.names)}. Leave one out."
                )
        self.heads.shard(self.trainer.strategy)
        self.heads.join_on_configure(self.module, self.trainer.strategy, self._patches)

    # ------------------------------------------------------------------------- start of training
    def check(self) -> None:
        """Raise everything that can be known to be wrong before training starts."""
        if self._checked:
            return
        self._checked = True
        self._check_signature()
        self._check_optimizers()
        self.capture.add(self.locations.module_paths(), "Taps")
        for member in self.members.values():
            member.check(self)

    def _check_signature(self) -> None:
        if self.objectives and "dataloader_iter" in signature(self.module.training_step).parameters:
            raise AuxiliaryError(
                f"{type(self.module).__name__}.training_step(dataloader_iter) takes its batches "
                f"itself, so {self.objectives[0].name} cannot see them. Use training_step(self, "
                f"batch, batch_idx)."
            )

    def _check_optimizers(self) -> None:
        count = max(1, len(self.trainer.optimizers))
        for member in self.members.values():
            if not 0 <= member.optimizer < count:
                raise AuxiliaryError(
                    f"{member.name}: optimizer={member.optimizer} does not exist: "
                    f"{type(self.module).__name__}.configure_optimizers returned {count}, counted "
                    f"from 0."
                )

    def start(self) -> None:
        """Wrap the module and start every member; training is about to begin."""
        if self._started:
            return
        self._started = True
        saved = self._restored or {}
        # Lightning counts the steps of all optimizers together, the engine those of each.
        count = max(1, len(self.trainer.optimizers))
        # Of random numbers of ours: that of the run, also where a process resumes it that has
        # another one.
        seed = int(saved.get("seed", torch.initial_seed()))
        self.seed = same_everywhere(seed, self.trainer.strategy.root_device)
        self.clocks = list(saved.get("steps", [self.trainer.global_step // count] * count))
        self.horizon = self._measured()
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
            member.move_model(self, states.get(name))
        for name, member in self.members.items():
            member.start(self, states.get(name))
        self._restored = None
        self.passes = Passes(self)
        self._running = Running(self)
        self._running.wrap(self._patches)
        self._patches.surround(self.trainer, "save_checkpoint", self.own_weights)
        self.model_call.watch()
        log_hyperparameters(self.trainer, self.module, self.members)

    def _measured(self) -> Horizon:
        horizon = horizon_of(self.trainer, self.module.automatic_optimization)
        if self.division is None:
            return horizon
        try:
            return self.division.of(horizon)
        except ValueError as error:
            raise AuxiliaryError(f"phases {str(self.division)!r}: {error}") from error

    # --------------------------------------------------------------------------- during training
    def progress(self, optimizer: int = 0) -> Progress:
        """Where training stands now, by the steps of one of its optimizers."""
        total = self.horizon.total if self.horizon is not None else None
        steps = self.clocks[optimizer]
        fraction = steps / total if total else None
        return Progress(steps, self.trainer.current_epoch, fraction)

    @property
    def logs(self) -> bool:
        """Whether Lightning hands metrics to the loggers on this step."""
        return logs_now(self.trainer)

    def bind(self, schedule: Timed[Value], asked_by: str) -> Callable[[int], Value]:
        """``schedule`` as a function of the optimizer steps of this training.

        Raises:
            AuxiliaryError: a time in it needs a length that this training does not have.
        """
        assert self.horizon is not None, "known when training starts"
        try:
            return schedule.bind(self.horizon)
        except ValueError as error:
            raise AuxiliaryError(f"{asked_by}: {error}") from error

    @contextmanager
    def own_weights(self) -> Iterator[None]:
        """The module with its own weights, where others stand in for them within a step."""
        with ExitStack() as stack:
            for each in self.stand_ins:
                stack.enter_context(each.aside())
            yield

    def give_back_weights(self) -> None:
        """End what stands in for the module's weights."""
        for each in self.stand_ins:
            each.restore()

    def overriding(self, method: str) -> list[Attached]:
        """The members that have a ``method`` of their own."""
        base, members = getattr(Attached, method), self.members.values()
        return [each for each in members if getattr(type(each), method) is not base]

    # ------------------------------------------------------------------------------- checkpoints
    def save(self, checkpoint: dict[str, Any]) -> None:
        """Write our one entry into the checkpoint; the rest of it stays the user's."""
        # Before training has started (a failing sanity check) there is only what was loaded.
        if STATE_KEY in checkpoint:
            return
        with_optimizer = "optimizer_states" in checkpoint
        with kept_by_the_first():  # who alone writes the file, or this part of the folder
            entry = self._entry(with_optimizer) if self._started else self._restored
        if entry:
            checkpoint[STATE_KEY] = entry

    def _entry(self, with_optimizer: bool = False) -> dict[str, Any]:
        members = {name: member.state() for name, member in self.members.items()}
        entry: dict[str, Any] = {
            "steps": self.clocks.copy(),
            "seed": self.seed,
            "members": members,
        }
        if self.heads:
            entry["heads"] = self.heads.state(with_optimizer)
        return entry

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Keep our entry for `start`."""
        if self._loaded or self._started:
            return
        self._loaded = True
        self._restored = checkpoint.get(STATE_KEY)
        if not self._restored and checkpoint["global_step"] > 0:
            rank_zero_warn(
                "lightning_aux: the checkpoint was written without these callbacks; they start "
                "fresh from the loaded weights."
            )

    # --------------------------------------------------------------------------------- detaching
    def detach(self) -> None:
        """Take every hook, wrapper and attribute away.

        Safe to call twice, and to be called again if Ctrl-C interrupts it.
        """
        if self._detached:
            return
        with ExitStack() as stack:  # the last first, and the others whatever one of them raises
            ends = [*(each.stop for each in self.members.values()), self.give_back_weights]
            if self._running is not None:
                ends += [self.passes.stop, self._running.stop]
            ends += [self.capture.clear, self.heads.hide, self.heads.part, self._patches.undo]
            for end in reversed(ends):
                stack.callback(end)
        self._detached = True
