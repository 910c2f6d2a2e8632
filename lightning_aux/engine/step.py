"""What an objective sees: ``Step``, and ``Pass`` for the same batch under a teacher's weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from lightning_aux.engine.distributed import data_rank, data_ranks, gather_rows, processes
from lightning_aux.engine.errors import AuxiliaryError
from lightning_aux.engine.random_states import RandomStates
from lightning_aux.engine.taps import (
    Locations,
    Tap,
    describe,
    example_of_target,
    find_logits,
    find_target,
    key_path,
)

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from lightning_aux.engine.engine import Engine

__all__ = [
    "Call",
    "Origin",
    "Pass",
    "Progress",
    "Record",
    "Repeats",
    "Step",
    "Vote",
    "VotedPass",
]


@dataclass(frozen=True)
class Progress:
    """Where training stands when a batch begins.

    Attributes:
        steps: optimizer steps that have really been taken (a step skipped by a gradient scaler is
            not one of them).
        epoch: index of the current epoch.
        fraction: ``steps`` over the steps of the whole training, ``None`` if that is unbounded.
    """

    steps: int
    epoch: int
    fraction: float | None


_LOST = {"features": "the output of", "input": "the input of"}


@dataclass
class Call:
    """One call of a module: what went in and what came out."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    returned: Any
    overwritten: bool = False
    lost: tuple[str, ...] = ()
    """What of it the model has overwritten before it could be copied: ``features``, ``input``."""
    entered: RandomStates | None = None
    """Where the random streams stood, if somebody repeats a part of the step."""
    left: RandomStates | None = None
    """Likewise when it returned."""


@dataclass
class Record:
    """Everything captured while a batch went through the module once."""

    batch: Any
    whose: str
    calls: dict[str, list[Call]] = field(default_factory=dict)
    resolved: dict[Any, Any] = field(default_factory=dict)
    spent: set[str] = field(default_factory=set)
    sequence: list[str] = field(default_factory=list)
    """The paths in the order in which their calls returned."""
    began: RandomStates | None = None
    """Where the random streams stood, if somebody repeats a part of the step."""

    def add(self, path: str, call: Call) -> None:
        self.sequence.append(path)
        if path in self.spent:
            self.spent.discard(path)
            self.calls[path] = []
        self.calls.setdefault(path, []).append(call)

    def call(self, path: str) -> Call | None:
        """The call of ``path`` that counts: the first with a gradient, or the first at all.

        A step may run the model under ``no_grad`` first, to make pseudo-labels.
        """
        calls = self.calls.get(path)
        if not calls:
            return None
        return next((each for each in calls if len(calls) > 1 and _has_grad(each)), calls[0])

    def spend(self) -> None:
        """A backward pass has freed the graph of these calls: the next ones replace them."""
        self.spent = set(self.calls)
        self.resolved.clear()
        self.sequence.clear()

    def detach(self) -> None:
        """Cut everything off from any graph: a model may switch gradients on by itself.

        Forces are derivatives.
        """
        for call in (each for calls in self.calls.values() for each in calls):
            call.arguments = tree_map_only(Tensor, Tensor.detach, call.arguments)
            call.returned = tree_map_only(Tensor, Tensor.detach, call.returned)


class Paths(Protocol):
    """Which modules of a model are captured."""

    def paths(self, path: str, asked_by: str) -> list[str]: ...
    def note_on_compilation(self) -> str: ...


class CallOfModel(Protocol):
    """Which call in a record is the model's."""

    where: str
    doubt: str
    naming: str
    remedy: str

    def of(self, record: Record, asked_by: str) -> Call: ...
    def count(self, record: Record) -> int: ...


class Origin(Protocol):
    """Who made a record: the engine, from the user's module, or a teacher with one of its own."""

    @property
    def capture(self) -> Paths: ...
    @property
    def model_call(self) -> CallOfModel: ...
    def say(self, what: str, where: str) -> None: ...


class Pass:
    """One pass of the batch through the module, with the student's or a teacher's weights.

    Everything is looked up on first use and once, however many objectives ask.
    """

    def __init__(self, origin: Origin, record: Record, locations: Locations, asked_by: str) -> None:
        self._origin = origin
        self._record = record
        self._locations = locations
        self._asked_by = asked_by

    @property
    def batch(self) -> Any:
        """The batch as ``training_step`` received it."""
        return self._record.batch

    @property
    def resolved(self) -> dict[Any, Any]:
        """What has been looked up, by what it is and the tap; without it, it is looked up again."""
        return self._record.resolved

    @property
    def returned(self) -> Any:
        """What the model returned: the module's own ``forward``, or the submodule bound instead."""
        return self._origin.model_call.of(self._record, self._asked_by).returned

    @property
    def logits(self) -> Tensor:
        """The model's logits, ``(batch, classes)`` or with further dimensions.

        Taken from what the module's ``forward`` returned (a tensor, ``.logits``, a ``"logits"``
        key or the first entry of a tuple) unless a tap says otherwise.

        Raises:
            AuxiliaryError: no logits were found, or the tap does not lead to a tensor.
        """
        logits: Tensor = self._once(("logits", self._locations.logits), self._find_logits)
        return logits

    @property
    def target(self) -> Tensor:
        """The labels of the batch: its second element or one of the usual keys, or the tap.

        Raises:
            AuxiliaryError: the batch has none there.
        """
        target: Tensor = self._once(("target", self._locations.target), self._find_target)
        return target

    @property
    def mask(self) -> Tensor | None:
        """Which examples count, where the ``mask`` tap says so; ``None``: all of them.

        Raises:
            AuxiliaryError: the tap does not lead to a tensor.
        """
        tap = self._locations.mask
        if tap is None:
            return None
        mask: Tensor = self._once(("mask", tap), lambda: self._in_batch(tap, "mask"))
        return mask

    def features(self, path: Tap | None = None) -> Any:
        """The output of the module at ``path``; ``{path: output}`` for a glob.

        Args:
            path: module path, glob or callable; without it the ``features`` tap.
        """
        return self._captured("features", path or self._needed("features"))

    def input(self, path: Tap | None = None) -> Any:
        """The first positional argument of the module at ``path``, or of the model without one."""
        path = path or self._locations.input
        if path is None:
            return _first_argument(self._origin.model_call.of(self._record, self._asked_by))
        return self._captured("input", path)

    # ------------------------------------------------------------------------------- lookups
    def _once(self, key: Any, find: Any) -> Any:
        if key not in self._record.resolved:
            self._record.resolved[key] = find()
        return self._record.resolved[key]

    def _needed(self, tap: str) -> Tap:
        chosen: Tap | None = getattr(self._locations, tap)
        if chosen is None:
            raise AuxiliaryError(
                f"{self._asked_by}: no {tap} were named. Give a module path, for example "
                f"Taps({tap}='encoder') or step.{tap}('encoder')."
            )
        return chosen

    def _captured(self, kind: str, path: Tap) -> Any:
        """The ``"features"`` (output) or the ``"input"`` of the modules at ``path``."""
        if not isinstance(path, str):
            return self._once((kind, path, self._locations), lambda: path(self))
        found = {}
        for each in self._origin.capture.paths(path, self._asked_by):
            call = self._record.call(each)
            if call is None:
                when = "in this training step"
                if self._record.whose != "student":
                    when = f"when {self._record.whose} ran {self._origin.model_call.where}"
                raise AuxiliaryError(
                    f"{self._asked_by}: the module {each!r} was not called {when}, so it has no "
                    f"output to read. Name a module that runs every time, or say how the whole "
                    f"model runs: {self._origin.model_call.remedy}."
                    f"{self._origin.capture.note_on_compilation()}"
                )
            if kind in call.lost:
                raise AuxiliaryError(
                    f"{self._asked_by}: {_LOST[kind]} {each!r} was overwritten in place by the "
                    f"model, in this step and not in the first. Let the operation after it be one "
                    f"that is not in place."
                )
            found[each] = call.returned if kind == "features" else _first_argument(call)
        return found.get(path, found)

    def _find_logits(self) -> Tensor:
        tap = self._locations.logits
        if tap is None:
            model_call = self._origin.model_call
            call = model_call.of(self._record, self._asked_by)
            if model_call.doubt:
                raise AuxiliaryError(f"{self._asked_by}: {model_call.doubt}")
            found = find_logits(call.returned)
            if found is None:
                raise AuxiliaryError(
                    f"{self._asked_by}: no logits in what {model_call.where} returned "
                    f"({describe(call.returned)}). {model_call.naming}"
                )
            logits, where = found
            if self._record.whose == "student":
                count = model_call.count(self._record)
                which = f", the first with a gradient of {count} calls" if count > 1 else ""
                self._origin.say("logits", f"{model_call.where}{where}{which}")
        else:
            logits = self._captured("features", tap)
            if not isinstance(logits, Tensor) and (found := find_logits(logits)) is not None:
                logits = found[0]
        if not isinstance(logits, Tensor):
            raise AuxiliaryError(
                f"{self._asked_by}: the logits tap {tap!r} leads to {describe(logits)}, not to a "
                f"tensor. Name the module or the entry that holds one tensor."
            )
        if logits.numel() == 0:
            raise AuxiliaryError(
                f"{self._asked_by}: the batch is empty (logits of shape {tuple(logits.shape)}). "
                f"Drop empty batches in the dataloader."
            )
        return logits

    def _find_target(self) -> Tensor:
        if self._locations.target is not None:
            return self._in_batch(self._locations.target, "target")
        found = find_target(self.batch)
        if found is None:
            raise AuxiliaryError(
                f"{self._asked_by}: the batch has no target: it is {describe(self.batch)}. Name "
                f"one by its key path, for example "
                f"Taps(target={example_of_target(self.batch)!r})."
            )
        self._origin.say("target", found[1])
        return self._tensor(found[0], "target", found[1])

    def _in_batch(self, tap: Tap, what: str) -> Tensor:
        """What a tap leads to that is a key path into the batch, or a callable."""
        if not isinstance(tap, str):
            return self._tensor(tap(self), what, f"the {what} tap")
        value = key_path(self.batch, tap, f"{self._asked_by}, {what}")
        return self._tensor(value, what, repr(tap))

    def _tensor(self, value: Any, what: str, where: str) -> Tensor:
        if not isinstance(value, Tensor):
            raise AuxiliaryError(
                f"{self._asked_by}: the {what} at {where} is {describe(value)}, not a tensor. Name "
                f"a tensor with Taps({what}=...)."
            )
        return value


Vote: TypeAlias = Callable[[list[Tensor]], Tensor]


class VotedPass(Pass):
    """The passes of a teacher that has several sets of weights, as one.

    `logits` are what they agree on, features and inputs are the mean over the sets; what the
    model returned is that of the first.
    """

    def __init__(self, passes: list[Pass], vote: Vote) -> None:
        first = passes[0]
        super().__init__(first._origin, first._record, first._locations, first._asked_by)
        self._passes = passes
        self._vote = vote

    @property
    def logits(self) -> Tensor:
        return self._vote([each.logits for each in self._passes])

    def features(self, path: Tap | None = None) -> Any:
        return _mean([each.features(path) for each in self._passes])

    def input(self, path: Tap | None = None) -> Any:
        return _mean([each.input(path) for each in self._passes])


class Step(Pass):
    """The current training step, as one objective sees it.

    Besides what a `Pass` offers (with the student's weights, gradients included).
    """

    def __init__(
        self,
        engine: Engine,
        state: StepState,
        locations: Locations,
        asked_by: str,
        optimizer: int,
        defer: Callable[[Callable[[], None]], None],
    ) -> None:
        super().__init__(engine, state.record, locations, asked_by)
        self._engine = engine
        self._state = state
        self._optimizer = optimizer
        self._defer = defer

    @property
    def module(self) -> nn.Module:
        """The user's LightningModule."""
        module: nn.Module = self._engine.module
        return module

    @property
    def batch_idx(self) -> int:
        """Index of the batch in its epoch."""
        return self._state.batch_idx

    @property
    def output(self) -> Any:
        """What ``training_step`` returned.

        Raises:
            AuxiliaryError: in manual optimisation the term is computed before the step returns.
        """
        if not self._state.finished:
            raise AuxiliaryError(
                f"{self._asked_by}: step.output does not exist yet: in manual optimisation the "
                f"term joins manual_backward, before training_step returns. Use step.returned, "
                f"step.logits or step.features instead."
            )
        return self._state.output

    @property
    def loss(self) -> Tensor:
        """The user's own loss of this step, before any term of ours."""
        return self._state.loss

    @property
    def progress(self) -> Progress:
        """Steps of the objective's optimizer, epoch, and the fraction of training that is done."""
        return self._state.progress[self._optimizer]

    @property
    def logs(self) -> bool:
        """Whether metrics are logged on this step; what only they need can wait for one."""
        return self._engine.logs

    @property
    def index(self) -> Tensor:
        """Dataset indices of the samples, int64 ``(batch,)`` on the batch's device.

        Only for objectives that declare ``needs = ("index",)``.
        """
        if self._state.index is None:
            index, device = self._engine.indices.current(self._asked_by), self.loss.device
            if device.type == "cuda":  # from pinned memory the host need not wait for the copy
                index = index.pin_memory()
            self._state.index = index.to(device, non_blocking=True)
        return self._state.index

    @property
    def dataset_size(self) -> int:
        """Number of samples in the training dataset; needs ``needs = ("index",)``."""
        return self._engine.indices.dataset_size(self._asked_by)

    def teacher(self, name: str) -> Pass:
        """What the teacher ``name`` says of the same batch.

        One forward per step and teacher: no gradient, evaluation mode, the user's random stream
        and BatchNorm statistics untouched.

        Raises:
            AuxiliaryError: no teacher of that name is attached.
        """
        teacher, taught = self._engine.teacher(name, self._asked_by), self._state.taught
        if name not in taught:
            taught[name] = teacher.run(self)
        return teacher.show(taught[name], self._locations, self._asked_by)

    def again(self, *arguments: Any, **keywords: Any) -> Pass:
        """One more pass through the model with the student's weights, with a gradient.

        Dropout draws other masks, from random numbers of its own; BatchNorm normalises by this
        pass, but running statistics and the user's random stream are left as one pass leaves them.

        Args:
            arguments: what the model is called on; without any, on what the step called it on.
            keywords: likewise.

        Raises:
            AuxiliaryError: the model's call in this step is not known, or, without arguments, the
                model writes into its own input.
        """
        record = self._engine.passes.student(self._state, self._asked_by, arguments, keywords)
        return Pass(self._engine, record, self._locations, self._asked_by)

    def after(self, path: str) -> Repeats:
        """Repetitions of this step from the module at ``path`` on, declared with ``engine.tail``.

        Everything that ran before that module's call is taken from the step itself, gradients
        included; what is computed before it outside of modules is computed again, with the random
        numbers that the step drew there. From that call on the random numbers are our own.
        """
        return Repeats(self, path)

    def weights(self, teacher: str) -> tuple[list[nn.Parameter], list[Tensor]]:
        """The trainable parameters and, in the same order, the teacher's values of them."""
        return self._engine.teacher(teacher, self._asked_by).pairs()

    def gathered(self, rows: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """What ``rows()`` returns here, and that of all processes one below the other.

        For statistics of the whole batch, without a gradient: several processes then learn what
        one would. Every process has to come here in the same steps; one on which ``rows`` fails
        brings none, so that the others do not wait for it, and raises its error afterwards.

        Args:
            rows: returns ``(n, width)``; ``n`` may differ between processes.
        """
        if processes() == 1:
            own = rows().detach()
            return own, own
        try:
            own = rows().detach()
        except Exception:
            gather_rows(torch.zeros(0, device=self.loss.device))
            raise
        # In one dtype, also beside a process that has none to say.
        everywhere = gather_rows(own.flatten().float()).to(own.dtype)
        return own.float().to(own.dtype), everywhere.reshape(-1, own.shape[1])

    def uniform(self, count: int, *shape: int) -> Tensor:
        """Random numbers in [0, 1) for the examples of this batch, ``(count, *shape)`` in float32.

        From the run's seed, the objective's name and the place in training, never from the user's
        random stream: a resumed run draws the same, and several processes draw for their examples
        what one would draw for the batch of all (of which process r has every n-th from r on).
        """
        trainer = self._engine.trainer
        where = (self._asked_by, trainer.fit_loop.epoch_loop.total_batch_idx)
        seed = (self._engine.seed + crc32(repr(where).encode())) % 2**63
        generator = torch.Generator(self.loss.device).manual_seed(seed)
        rank, ranks = data_rank(trainer.strategy), data_ranks(trainer.strategy)
        size = (count * ranks, *shape)
        return torch.rand(size, generator=generator, device=self.loss.device)[rank::ranks]

    def given(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model was called on in this step: positional and keyword arguments.

        Raises:
            AuxiliaryError: the model's call is not known, or it writes into its own input.
        """
        return self._engine.model_call.given(self._record, self._asked_by)

    def evaluated(self, weights: AbstractContextManager[None], whose: str) -> Record:
        """The model's call once more, in evaluation mode and without gradient; for teachers.

        Args:
            weights: a block in which other weights are in the module.
            whose: they are, in words.
        """
        return self._engine.passes.evaluated(weights, self._state, whose, self._asked_by)

    def after_optimizer_step(self, act: Callable[[], None]) -> None:
        """Have ``act()`` called once the optimizer has really stepped.

        Memories move this way: under accumulation all micro-batches of a window see the same
        memory, and a step that a gradient scaler skips moves nothing.
        """
        self._defer(act)


class Repeats:
    """A step from one module on, as often as asked; see `Step.after`."""

    def __init__(self, step: Step, path: str) -> None:
        self._step = step
        self._path = path

    def loss(self) -> Tensor:
        """The user's loss, from their ``training_step`` run once more.

        What it logs, and what it does to metrics and buffers, is undone; other things that it
        changes are not.

        Raises:
            AuxiliaryError: in manual optimisation, where the step also takes optimizer steps.
        """
        step = self._step
        return step._engine.passes.loss_again(step._state, step._asked_by, self._path)

    def again(self) -> Pass:
        """The model's call once more."""
        step = self._step
        passes = step._engine.passes
        record = passes.student(step._state, step._asked_by, (), {}, tail=self._path)
        return Pass(step._engine, record, step._locations, step._asked_by)


@dataclass
class StepState:
    """What all objectives share of one training step."""

    record: Record
    batch_idx: int
    progress: list[Progress]
    output: Any = None
    finished: bool = False
    observed: bool = False
    backwards: int = 0
    passes: int = 0
    joined: set[str] = field(default_factory=set)
    index: Tensor | None = None
    taught: dict[str, Any] = field(default_factory=dict)
    """What each teacher that was asked has of this step."""
    main: Tensor | float = 0.0
    total: Tensor | float = 0.0
    _loss: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        assert self._loss is not None, "the loss is set before any objective runs"
        return self._loss

    @loss.setter
    def loss(self, value: Tensor) -> None:
        self._loss = value


def _mean(values: list[Any]) -> Any:
    """The mean of tensors, or of every tensor in structures of one shape."""

    def mean(*each: Any) -> Any:
        averages = isinstance(each[0], Tensor) and each[0].is_floating_point()
        return sum(each[1:], each[0]) / len(each) if averages else each[0]

    return tree_map(mean, *values)


def _has_grad(call: Call) -> bool:
    leaves = tree_leaves(call.returned)
    return any(isinstance(each, Tensor) and each.requires_grad for each in leaves)


def _first_argument(call: Call) -> Any:
    if call.arguments:
        return call.arguments[0]
    return next(iter(call.keywords.values()))
