"""``Runs``: a few training steps on one batch, of copies that are thrown away."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_aux.attribute_schedules.driver import Driver
from lightning_aux.engine import Attached, AuxiliaryError, Engine, Step
from lightning_aux.engine.engine import ATTRIBUTE
from lightning_aux.engine.random_states import drawing_from
from lightning_aux.engine.taps import is_glob, modules_at
from lightning_aux.inspection.batch import repeating
from lightning_aux.inspection.held import bytes_of_head, held
from lightning_aux.objective import Objective
from lightning_aux.teachers.teacher import Teacher

__all__ = ["SEED", "Runs", "Seen", "copied", "current_device", "tap_name", "trainer_of"]

Value = TypeVar("Value")
SEED = 0
WARM_UP = 3
_LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
_PREFIX = "lightning_aux: "
_QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 100,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
}


@dataclass
class Seen:
    """What one run has shown of the callbacks in it.

    Attributes:
        error: why it ended before its last step.
        asked: by name of a member, the teachers that it asked for.
        read: by name, the module paths that it reads.
        found: by name, what its steps looked up, and where that was.
        driven: by name, what it sets.
        terms: by name, the value of its term in the first step.
        bytes: by position among the callbacks.
        heads: by position, how many parameters.
        silent: names of objectives whose weight stayed 0.
        warned: what the engine warned of.
        seconds: of each step after the first few.
        device: where it ran.
    """

    error: Exception | None = None
    asked: dict[str, list[str]] = field(default_factory=dict)
    read: dict[str, list[str]] = field(default_factory=dict)
    found: dict[str, dict[str, str]] = field(default_factory=dict)
    driven: dict[str, list[str]] = field(default_factory=dict)
    terms: dict[str, float] = field(default_factory=dict)
    bytes: dict[int, int] = field(default_factory=dict)
    heads: dict[int, int] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    warned: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    device: str = ""


class Runs:
    """Trains copies of a module, of callbacks among these, on one batch.

    Args:
        module: never changed.
        callbacks: never changed.
        batch: never changed; each step has a copy.
        batches: in an epoch, ``None`` if unknown.
        samples: in the dataset, ``None`` if it has no index.
        dataset: name of its class.
        datamodule: of which the hooks that concern a batch are called.
        trainer: arguments of the Trainer.
    """

    def __init__(
        self,
        module: Any,
        callbacks: Sequence[Attached],
        batch: Any,
        batches: int | None,
        samples: int | None,
        dataset: str,
        datamodule: Any,
        trainer: Mapping[str, Any],
    ) -> None:
        self.module = module
        self.callbacks = list(callbacks)
        self.batch = batch
        self._data = batches, samples, dataset
        self._datamodule = datamodule
        self._arguments = {**_QUIET, **trainer}

    def watched(self, chosen: Sequence[int], steps: int = 3) -> Seen:
        """What the chosen callbacks bind to and hold in the first steps."""
        seen = Seen()
        self._fit(chosen, [], _Watching(seen, steps), seen)
        return seen

    def timed(self, chosen: Sequence[int], steps: int) -> Seen:
        """How long each of some steps takes with the chosen callbacks.

        Epochs are as long as it needs: what the module does between them is not part of a step.
        """
        seen = Seen()
        self._fit(chosen, [], _Timing(seen, steps + WARM_UP), seen, at_least=steps + WARM_UP)
        return seen

    def looked_at(self, chosen: Sequence[int], look: Attached, before: Any) -> Seen:
        """One step with ``look`` attached, and ``before(module)`` called on the copy first."""
        seen = Seen()
        with torch.compiler.set_stance("force_eager"):  # into a graph no hook would get
            self._fit(chosen, [look], _Timing(seen, 1), seen, before)
        return seen

    def _fit(
        self,
        chosen: Sequence[int],
        extra: list[Attached],
        watcher: _Timing,
        seen: Seen,
        before: Callable[[Any], None] | None = None,
        at_least: int = 1,
    ) -> None:
        batches, samples, dataset = self._data
        arguments = dict(self._arguments)
        if at_least > 1:
            batches = None if batches is None else max(batches, at_least)
            arguments |= {"limit_train_batches": None, "max_steps": -1}
        with _quiet(seen), drawing_from(SEED, current_device()):
            module, members = copied((self.module, [self.callbacks[each] for each in chosen]))
            module.__dict__["configure_callbacks"] = list  # its own are among those chosen
            watcher.members = dict(zip(chosen, members, strict=True))
            if before is not None:
                before(module)
            trainer = trainer_of(module)(**arguments, callbacks=[*members, *extra, watcher])
            loader = repeating(self.batch, batches, samples, dataset)
            seen.device = str(trainer.strategy.root_device)
            try:
                if self._datamodule is None:
                    trainer.fit(module, loader)
                else:
                    trainer.fit(module, datamodule=_with_loader(self._datamodule, loader))
                raise AuxiliaryError("the Trainer's arguments leave no step to be taken")
            except _Enough:
                pass
            except Exception as error:
                seen.error = _cause(error)


class _Enough(Exception):
    """The last step has been seen."""


class _Timing(Callback):
    """Takes the time from one batch to the next, and ends the run."""

    def __init__(self, seen: Seen, steps: int) -> None:
        self.seen = seen
        self.members: dict[int, Attached] = {}
        self._steps = steps
        self._times: list[float] = []
        self._began = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        engine: Engine | None = pl_module.__dict__.get(ATTRIBUTE)
        for member in engine.members.values() if engine is not None else ():
            if isinstance(member, Objective):
                self.seen.silent.add(member.name)
                total = (engine.horizon.total if engine and engine.horizon else None) or 10_000
                later = range(0, total, max(1, total // 200))
                member.__dict__["weight_at"] = self._when_on(member.name, member.weight_at, later)

    def _when_on(
        self, name: str, weight_at: Callable[[int], float], later: Iterable[int]
    ) -> Callable[[int], float]:
        """The weight, or the largest that it will be: a term that begins at 0 is looked at too."""
        on, asked = 0.0, 0

        def weight(steps: int) -> float:
            nonlocal on, asked
            on = on or weight_at(steps)
            if not on and asked < 4:  # a teacher may not be ready in the first step
                asked += 1
                on = max(map(weight_at, later), key=abs)
            if on:
                self.seen.silent.discard(name)
            return on

        return weight

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._began = _now(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._times.append(_now(trainer) - self._began)
        # Nothing that ends an epoch or training is to run.
        if len(self._times) >= min(self._steps, trainer.num_training_batches):
            self.seen.seconds = self._times[WARM_UP:]
            self.last(trainer, pl_module)
            raise _Enough

    def last(self, trainer: Any, module: Any) -> None:
        """Look once more before the run ends."""


class _Watching(_Timing):
    """Notes what members ask the engine for, which it has made when every ``setup`` is over."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        engine: Engine | None = pl_module.__dict__.get(ATTRIBUTE)
        if engine is None:
            return
        teacher, add, say = engine.teacher, engine.capture.add, engine.say
        said: dict[str, str] = {}

        def noted_teacher(name: str, asked_by: str) -> Any:
            names = self.seen.asked.setdefault(asked_by, [])
            names += [name] if name not in names else []
            return teacher(name, asked_by)

        def noted_add(paths: Any, asked_by: str) -> None:
            for path in (chosen := list(paths)):
                found = list(modules_at(pl_module, path, asked_by)) if is_glob(path) else [path]
                self.seen.read.setdefault(asked_by, []).extend(found)
            add(chosen, asked_by)

        def noted_say(what: str, where: str) -> None:
            said[what] = where
            say(what, where)

        # The engine is thrown away with the copy of the module.
        engine.__dict__.update(teacher=noted_teacher, say=noted_say)
        engine.capture.__dict__["add"] = noted_add
        for member in engine.members.values():
            if isinstance(member, Objective):
                self._watch_term(member, said)
            elif type(member).observe is not Attached.observe:
                member.__dict__["observe"] = self._noting(member, member.observe, said)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        engine: Engine | None = pl_module.__dict__.get(ATTRIBUTE)
        for member in engine.members.values() if engine is not None else ():
            if isinstance(member, Driver):
                self.seen.driven[member.name] = [
                    f"{each.place.path} ({each.own:g} before)" for each in member.driven
                ]

    def _watch_term(self, objective: Objective, said: dict[str, str]) -> None:
        term = self._noting(objective, objective.term, said)

        def noted_term(step: Step) -> Tensor:
            value: Tensor = term(step)
            self.seen.terms.setdefault(objective.name, float(value.detach()))
            return value

        objective.__dict__["term"] = noted_term

    def _noting(
        self, member: Attached, work: Callable[[Step], Any], said: dict[str, str]
    ) -> Callable[[Step], Any]:
        """``work``, with what it looks up in the step noted."""

        def noted(step: Step) -> Any:
            before = dict(step.resolved)
            step.resolved.clear()  # looked up again, so that it is known who does
            try:
                return work(step)
            finally:
                places = self.seen.found.setdefault(member.name, {})
                for kind, tap, *_ in step.resolved:
                    places.setdefault(kind, said.get(kind, "?") if tap is None else tap_name(tap))
                step.resolved.update({**before, **step.resolved})

        return noted

    def last(self, trainer: Any, module: Any) -> None:
        engine: Engine | None = module.__dict__.get(ATTRIBUTE)
        everyone = [] if engine is None else list(engine.members.values())
        for place, member in self.members.items():
            own = [member, *member.companions()]
            others = [each for each in everyone if each not in own]
            head = getattr(member, "head", None)
            if isinstance(head, nn.Module):
                self.seen.heads[place] = sum(each.numel() for each in head.parameters())
            self.seen.bytes[place] = held(member, module, others)
            self.seen.bytes[place] += bytes_of_head(head, trainer.optimizers)
            if isinstance(member, Teacher) and member.store is not None:
                weights = self.seen.driven.setdefault(member.name, [])
                weights.append(f"a copy of the weights of {type(module).__name__}")


def _now(trainer: Any) -> float:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def copied(value: Value) -> Value:
    """A copy of a module, or of a module and callbacks.

    Raises:
        AuxiliaryError: it cannot be copied.
    """
    try:
        return deepcopy(value)
    except Exception as error:
        raise AuxiliaryError(
            f"inspect works on copies, so that the module stays as it is, but copy.deepcopy of it "
            f"or of a callback fails: {type(error).__name__}: {error}. A module that was just made "
            f"can usually be copied."
        ) from error


def tap_name(tap: Any) -> str:
    """A tap in a few words."""
    return repr(tap) if isinstance(tap, str) else getattr(tap, "__qualname__", repr(tap))


def trainer_of(module: Any) -> Any:
    """The Trainer of the package whose LightningModule it is."""
    for base in type(module).__mro__:
        if base.__name__ == "LightningModule":
            return import_module(base.__module__.partition(".core.")[0]).Trainer
    raise AuxiliaryError(
        f"inspect: a {type(module).__name__} is no LightningModule. Put it into one whose "
        f"training_step(batch, batch_idx) returns the loss."
    )


def _with_loader(datamodule: Any, loader: Any) -> Any:
    """The datamodule, prepared already, with another dataloader for training."""
    other = copy(datamodule)
    other.__dict__.update(
        prepare_data=lambda: None, setup=lambda stage: None, train_dataloader=lambda: loader
    )
    return other


def _cause(error: Exception) -> Exception:
    """What of ours is behind an exception, or itself."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, AuxiliaryError):
        cause = cause.__cause__
    return cause or error


def current_device() -> torch.device:
    """Whose random stream a run may draw from, beside that of the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@contextmanager
def _quiet(seen: Seen) -> Iterator[None]:
    """What Lightning says of each run is of no interest; what we warn of is."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [each.level for each in loggers]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for each in loggers:
                each.setLevel(logging.ERROR)
            yield
        finally:
            for each, level in zip(loggers, levels, strict=True):
                each.setLevel(level)
            lines = [str(each.message) for each in caught]
            seen.warned = [each.removeprefix(_PREFIX) for each in lines if each.startswith(_PREFIX)]
