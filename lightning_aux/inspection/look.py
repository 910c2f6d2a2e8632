"""``inspect``: one batch through a module, and what can be attached to it."""

from __future__ import annotations

import math
import statistics
import traceback
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from lightning_aux.engine import Attached, AuxiliaryError, Engine, Locations, Step
from lightning_aux.engine.random_states import drawing_from
from lightning_aux.engine.taps import TARGET_KEYS
from lightning_aux.inspection.batch import leaves, size_of
from lightning_aux.inspection.found import Binding, Inspection, Leaf, Member
from lightning_aux.inspection.runs import (
    SEED,
    Runs,
    Seen,
    copied,
    current_device,
    tap_name,
    trainer_of,
)
from lightning_aux.inspection.structure import Structure, shape_of
from lightning_aux.phases import Phases
from lightning_aux.taps import Taps
from lightning_aux.teachers import StoredTeacher
from lightning_aux.teachers.teacher import Teacher

__all__ = ["inspect"]

ASSUMED_BATCHES = 100
ROUNDS = 3
_ROUND_SECONDS = 0.3  # of the steps that are timed in one round


def inspect(
    module: Any,
    batch: Any,
    callbacks: Sequence[Any] = (),
    *,
    steps: int | None = None,
    **trainer: Any,
) -> Inspection:
    """Show what a module is made of, what can be attached to it, and what callbacks would do.

    One batch goes through copies of the module, in real training steps: bindings are those of
    `Trainer.fit`. The module, the callbacks, the random streams and the disk stay as they are. Each
    of our callbacks is tried with the teachers that it needs, and all of them together; a
    term whose weight begins at 0 is tried with the largest it will have.

    Times are rough: the median of a few steps in each of three rounds, of the callback with what it
    needs less what it needs alone. The teacher's forward counts for each objective that reads it.

    Args:
        module: a LightningModule, of any package.
        batch: what ``training_step`` is given; or a DataLoader, or a LightningDataModule, of which
            the first batch is taken, and from which the length of training is known.
        callbacks: for the Trainer. Those that are not of this package are left out, and named.
        steps: steps that are timed in each round, 0 for none. Default: about 0.3 s of them.
        trainer: arguments of the Trainer that decide what a step is: ``accelerator`` (the CPU
            without it), ``precision``, ``max_epochs`` (100 without it), ``accumulate_grad_batches``
            and the like.

    Returns:
        The findings; printed, and in a notebook, they are tables, and ``.html()`` is a page.

    Raises:
        AuxiliaryError: the module is no LightningModule, or it cannot be copied.

    Examples:
        >>> import torch
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> found = inspect(BoringModel(), torch.randn(4, 32), steps=0)
        >>> found.binding("classifier").where
        'layer'
    """
    with drawing_from(SEED, current_device()):
        given, batches, samples, dataset, notes = _data(batch)
        own = _own_callbacks(module)
        kinds = {type(each) for each in own}  # Lightning's rule: the module's own come first
        chosen = [each for each in callbacks if type(each) not in kinds] + own
        ours = [each for each in chosen if isinstance(each, Attached)]
        others = [type(each).__name__ for each in chosen if not isinstance(each, Attached)]
        datamodule = batch if isinstance(batch, LightningDataModule) else None
        runs = Runs(module, ours, given, batches, samples, dataset, datamodule, trainer)
        return _Inspecting(runs, steps).found(tuple(others), notes)


def _own_callbacks(module: Any) -> list[Any]:
    """What the module brings along, of a copy: a mixin keeps those that it has made."""
    trainer_of(module)
    own: Any = copied(module).configure_callbacks()
    return list(own) if isinstance(own, Sequence) else [own] if own is not None else []


def _data(batch: Any) -> tuple[Any, int | None, int | None, str, list[str]]:
    """One batch, batches in an epoch, samples in the dataset, its name, and what was assumed."""
    loader = batch
    if isinstance(batch, LightningDataModule):
        source = copy(batch)
        source.prepare_data()
        source.setup("fit")
        loader = source.train_dataloader()
    elif not isinstance(batch, DataLoader):
        size = size_of(batch)
        assumed = f"assumed: {ASSUMED_BATCHES} batches of {size} in an epoch"
        return batch, ASSUMED_BATCHES, ASSUMED_BATCHES * size, "Dataset", [assumed]
    if not isinstance(loader, DataLoader):
        first = next(iter(loader), None)
        return _there(first), None, None, type(loader).__name__, []
    first = _there(next(iter(loader), None))
    name = type(loader.dataset).__name__
    try:
        batches: int | None = len(loader)
    except TypeError:  # an iterable dataset that does not say
        batches = None
    streams = isinstance(loader.dataset, IterableDataset)
    samples = None if streams else len(loader.dataset)  # type: ignore[arg-type]
    return first, batches, samples, name, []


def _there(batch: Any) -> Any:
    if batch is None:
        raise AuxiliaryError("inspect: the training dataloader gives no batch.")
    return batch


class _Look(Attached):
    """Asks for what objectives ask for, in the first step."""

    def __init__(self, structure: Callable[[], Structure]) -> None:
        super().__init__("inspect")
        self.structure = structure
        self.bindings: list[Binding] = []
        self.beliefs: list[Binding] = []
        self.leaves: list[Leaf] = []
        self._said: dict[str, str] = {}

    def attach(self, engine: Engine) -> None:
        say = engine.say

        def noted(what: str, where: str) -> None:
            self._said[what] = where
            say(what, where)

        engine.__dict__["say"] = noted

    def observe(self, step: Step) -> None:
        engine = self.engine
        taps = engine.locations
        logits = self._bind("logits", taps.logits, lambda: step.logits)
        self.bindings.insert(0, self._model_call(engine))  # which is known by now
        target = self._bind("target", taps.target, lambda: step.target)
        mask = None
        if taps.mask is not None:
            mask = self._bind("mask", taps.mask, lambda: step.mask)
        if taps.features is not None:
            self._bind("features", taps.features, step.features)
        if taps.input is not None:
            self._bind("input", taps.input, step.input)
        self._suggest(step.batch, logits)
        self.beliefs = self.structure().finish(logits)
        self.leaves = list(self._layout(step, target, mask))

    def _model_call(self, engine: Engine) -> Binding:
        call = engine.model_call
        if engine.locations.forward is not None:
            where = tap_name(engine.locations.forward)
            return Binding("model", where, why="by Taps: what a teacher runs again")
        if "does not call self" in call.where:
            return Binding("model", "", error=call.where)
        return Binding("model", call.where, why=call.doubt or "what a teacher runs again")

    def _bind(self, what: str, tap: Any, find: Callable[[], Any]) -> Tensor | None:
        try:
            found = find()
        except AuxiliaryError as error:
            self.bindings.append(Binding(what, "", error=str(error).removeprefix("inspect: ")))
            return None
        where = self._said.get(what, "") if tap is None else tap_name(tap)
        first = next((each for each in tree_leaves(found) if isinstance(each, Tensor)), None)
        shape = None if first is None else shape_of(first)
        why = "by default" if tap is None else "by Taps"
        self.bindings.append(Binding(what, where, shape, why))
        return first

    def _suggest(self, batch: Any, logits: Tensor | None) -> None:
        """Where no target is found: what is called like one, or could be class indices."""
        (target,) = (each for each in self.bindings if each.what == "target")
        if target.error is None:
            return
        fitting = [
            path
            for path, value in leaves(batch)
            if isinstance(value, Tensor)
            and (path.rpartition(".")[2].lower() in TARGET_KEYS or _are_classes(value, logits))
        ]
        if fitting:
            taps = " or ".join(f"Taps(target={path!r})" for path in fitting)
            place = self.bindings.index(target)
            said, _, _ = target.error.partition(" Name one by")
            self.bindings[place] = replace(target, error=f"{said} It may be {taps}.")

    def _layout(self, step: Step, target: Tensor | None, mask: Tensor | None) -> Iterator[Leaf]:
        try:
            given = [each for each in tree_leaves(step.given()) if isinstance(each, Tensor)]
        except AuxiliaryError:
            given = []
        for path, value in leaves(step.batch):
            roles = [
                role
                for role, holds in (
                    ("target", value is target and target is not None),
                    ("mask", value is mask and mask is not None),
                    ("input of the model", any(value is each for each in given)),
                )
                if holds
            ]
            yield _leaf(path, value, roles)


def _are_classes(value: Tensor, logits: Tensor | None) -> bool:
    """Whether a tensor has a class for each row of the logits, whatever their class dimension."""
    if logits is None or logits.ndim < 2 or value.is_floating_point() or value.is_complex():
        return False
    at_the_end = logits.shape[-1], logits.shape[:-1]
    second = logits.shape[1], logits.shape[:1] + logits.shape[2:]
    return any(
        value.shape == shape and value.numel() > 0 and int(value.max()) < classes
        for classes, shape in (at_the_end, second)
    )


def _leaf(path: str, value: Any, roles: Sequence[str] = ()) -> Leaf:
    shape = shape_of(value) if isinstance(value, Tensor) else None
    return Leaf(path, type(value).__name__, shape, tuple(roles))


class _Inspecting:
    """All runs of one inspection; callbacks are known by their place in the list."""

    def __init__(self, runs: Runs, steps: int | None) -> None:
        self._runs = runs
        self._callbacks = runs.callbacks
        self._names = [getattr(each, "name", type(each).__name__) for each in runs.callbacks]
        self._steps = steps
        # What says something to all the others.
        self._general = {
            place for place, each in enumerate(runs.callbacks) if isinstance(each, Taps | Phases)
        }
        self._taps = {place for place in self._general if isinstance(runs.callbacks[place], Taps)}
        self._teachers = {
            place
            for place, each in enumerate(runs.callbacks)
            if isinstance(each, Teacher | StoredTeacher)
        }
        self._blamed: dict[int, str] = {}
        self._tries: dict[int, _Try] = {}

    def found(self, others: tuple[str, ...], notes: list[str]) -> Inspection:
        structure, look, seen = self._survey()
        name = type(self._runs.module).__name__
        found = Inspection(
            name,
            seen.device,
            modules=structure.found(look.beliefs),
            batch=tuple(look.leaves),
            bindings=(*look.bindings, *look.beliefs),
            others=others,
            notes=tuple(notes),
        )
        if seen.error is not None:
            given = tuple(_leaf(*each) for each in leaves(self._runs.batch))
            error = _own_error(name, seen.error, structure.running)
            return replace(found, batch=given, bindings=(), error=error)
        self._blame_taps(look.bindings)
        everywhere = frozenset(range(len(self._callbacks)))
        self._full = self._runs.watched(sorted(everywhere))
        tries = [self._try(place) for place in sorted(everywhere)]
        together = None
        if self._full.error is not None and not any(each.seen.error for each in tries):
            together = _said(self._full.error)
        times = self._times(
            {place: each for place, each in enumerate(tries) if not each.seen.error}
        )
        members = [self._member(place, each, times) for place, each in enumerate(tries)]
        plain = times.get(frozenset())
        seconds = statistics.median(plain) if plain else None
        return replace(found, members=tuple(members), together=together, seconds=seconds)

    def _survey(self) -> tuple[Structure, _Look, Seen]:
        """One step, seen from outside, with `Taps` if they fit the module."""
        structures: list[Structure] = []
        look = _Look(lambda: structures[-1])
        for taps in (self._taps, set()):
            seen = self._runs.looked_at(
                sorted(taps), look, lambda module: structures.append(Structure(module))
            )
            if not (taps and isinstance(seen.error, AuxiliaryError)):
                break
            self._blamed = dict.fromkeys(taps, str(seen.error))
            self._general -= taps  # the others are looked at without
        structure = structures[-1]
        if not look.bindings and seen.error is None:
            look.bindings.append(Binding("logits", "", error=_UNSEEN))
        if not look.beliefs:
            look.beliefs = structure.finish(None)
        if not look.leaves:
            look.leaves = [_leaf(*each) for each in leaves(self._runs.batch)]
        return structure, look, seen

    def _blame_taps(self, bindings: list[Binding]) -> None:
        for place in self._taps & self._general:
            for each in bindings:
                if each.error and getattr(self._callbacks[place].locations, each.what, None):
                    self._blamed.setdefault(place, each.error)

    # ------------------------------------------------------------------------------ the callbacks
    def _try(self, place: int) -> _Try:
        """A few steps with the callback at ``place`` and what it needs."""
        if place in self._tries:
            return self._tries[place]
        needed = self._general - {place}
        self._tries[place] = _Try(Seen(), frozenset({place}))  # for those that need each other
        while True:
            chosen = frozenset({*needed, place})
            seen = self._runs.watched(sorted(chosen))
            asked = {name for names in seen.asked.values() for name in names}
            more = {
                other
                for other, name in enumerate(self._names)
                if other not in chosen and name in asked
            }
            broken = [self._names[each] for each in sorted(more) if self._try(each).seen.error]
            if broken:
                seen = Seen(AuxiliaryError(f"it needs {broken[0]!r}, which fails itself"))
            if seen.error is not None and not more and asked - set(self._names):
                # A teacher that is not there: the message is to name those that are.
                others = self._teachers - chosen if place not in self._teachers else set[int]()
                more = {each for each in others if not self._try(each).seen.error}
            if not more or broken:
                break
            needed |= more
        if seen.error is not None and self._full.error is None:
            # It is nothing without the others: what it does among them is what it will do.
            seen, chosen = self._full, frozenset(range(len(self._callbacks)))
        found = self._tries[place] = _Try(seen, chosen)
        return found

    def _times(self, tries: dict[int, _Try]) -> dict[frozenset[int], list[float]]:
        """The median time of a step with each set of callbacks, in each round."""
        if self._steps == 0:
            return {}
        steps = self._steps
        if steps is None:
            once = self._runs.timed([], 3).seconds
            step = statistics.median(once) if once else _ROUND_SECONDS
            steps = min(20, max(3, math.ceil(_ROUND_SECONDS / step)))
        sets = {frozenset[int]()}
        for place, one in tries.items():
            sets |= {one.chosen, one.chosen - {place}}
        medians: dict[frozenset[int], list[float]] = {each: [] for each in sets}
        for _ in range(ROUNDS):  # one after the other, so that a slow minute is slow for all
            for each in sorted(sets, key=sorted):
                seconds = self._runs.timed(sorted(each), steps).seconds
                if seconds:
                    medians[each].append(statistics.median(seconds))
        return {each: found for each, found in medians.items() if len(found) == ROUNDS}

    def _member(self, place: int, one: _Try, times: dict[frozenset[int], list[float]]) -> Member:
        callback, name, seen = self._callbacks[place], self._names[place], one.seen
        with_it, without = times.get(one.chosen), times.get(one.chosen - {place})
        seconds, spread = None, 0.0
        if with_it and without:
            added = [late - early for late, early in zip(with_it, without, strict=True)]
            seconds, spread = statistics.median(added), (max(added) - min(added)) / 2
        error = self._blamed.get(place) or (_said(seen.error) if seen.error else None)
        notes = [] if seen is self._full else list(seen.warned)
        if name in seen.silent and not error:
            notes.append("its weight stayed 0, so its term was not computed")
        return Member(
            name,
            type(callback).__name__,
            tuple(_binds(callback, name, seen)),
            seen.heads.get(place, 0),
            seen.bytes.get(place, 0),
            seen.terms.get(name),
            seconds,
            spread,
            tuple(notes),
            error,
        )


@dataclass(frozen=True)
class _Try:
    """What was seen of a callback, and the places of those that ran: its own, and its needs."""

    seen: Seen
    chosen: frozenset[int]


_UNSEEN = (
    "nothing was seen of the step: training_step returned no loss for this batch, or, in manual "
    "optimisation, it calls loss.backward() instead of self.manual_backward(loss)"
)


def _binds(callback: Attached, name: str, seen: Seen) -> Iterator[str]:
    names = [name, *(each.name for each in callback.companions())] if seen.asked else [name]
    for what, where in sorted(seen.found.get(name, {}).items()):
        yield f"{what} = {where}"
    if isinstance(callback, Taps):
        for what in Locations.__dataclass_fields__:
            tap = getattr(callback.locations, what)
            if tap is not None:
                yield f"{what} = {tap_name(tap)}"
    for teacher in seen.asked.get(name, ()):
        yield f"teacher {teacher}"
    if "index" in getattr(callback, "needs", ()):
        yield "indices of the samples"
    read = dict.fromkeys(path for each in names for path in seen.read.get(each, ()))
    if read:
        yield f"reads {', '.join(read)}"
    driven = [place for each in names for place in seen.driven.get(each, ())]
    if driven:
        yield ", ".join(driven)


def _said(error: Exception) -> str:
    """An error of ours has a message that is enough; of others it helps to know where."""
    if isinstance(error, AuxiliaryError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _own_error(name: str, error: Exception, running: Sequence[str]) -> str:
    inside = f", in the module {running[-1]!r}" if running else ""
    return f"a training step of {name} fails without any callback{inside}: {_said(error)}"
