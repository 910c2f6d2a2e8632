"""``AttributeSchedule``: any number of the user's as a function of training progress."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from lightning_aux.attribute_schedules.driver import Driven, Driver
from lightning_aux.attribute_schedules.places import AttributePlace, GroupPlace, Place, is_number
from lightning_aux.engine import AuxiliaryError, Engine
from lightning_aux.engine.errors import near_matches
from lightning_aux.engine.taps import describe, is_glob, plain_path
from lightning_aux.schedule import Schedule, ScheduleError

__all__ = ["AttributeSchedule"]

_OPTIMIZER = re.compile(
    r"optimizer(?:\[(?P<number>\d+)\])?(?:\.groups\[(?P<group>\d+)\])?"
    r"\.(?P<key>\w+)(?:\[(?P<index>\d+)\])?"
)
# What a learning-rate scheduler may write, beside the rate itself: momentum, cycled inversely.
_CYCLED = ("momentum", "betas")


class AttributeSchedule(Driver):
    """Sets numbers by schedules: of the optimizer, of any module, a callback or the datamodule.

    ============================================  ================================================
    path                                          what it is
    ============================================  ================================================
    ``optimizer.lr``, ``optimizer.weight_decay``  an entry of every parameter group
    ``optimizer.betas[0]``                        one number of a pair
    ``optimizer[1].lr``                           of the second optimizer
    ``optimizer.groups[0].lr``                    of one parameter group
    ``model.head.temperature``                    an attribute, or a buffer of one element
    ``model.blocks.*.scale``                      of every module that the glob names
    ``callback:SelfDistillation.temperature``     of a callback, by its class or its name
    ``datamodule.mixup``                          of the datamodule
    ============================================  ================================================

    Numbers change between optimizer steps, never within an accumulation window, and are given back
    after training. A checkpoint holds the optimizer's groups as they are at that moment, as it
    does with a learning-rate scheduler; a resumed run knows the user's own values.

    Args:
        values: path to schedule: a float, a string such as ``"cosine(0.1, 0)"``, or a `Schedule`.
        name: unique name for logs (``aux/<name>/<path>``) and checkpoints.
        optimizer: with several optimizers, the index of the one whose steps are counted, and which
            ``optimizer.`` without a number means.

    Raises:
        AuxiliaryError: a path or a schedule that cannot be read; before training, for a path that
            leads nowhere (near matches are listed) or to something that is no number, for one that
            another callback drives, and for ``optimizer.lr`` beside a learning-rate scheduler.

    Note:
        A compiled model takes a Python number as a constant and is compiled again when it changes.
        Let the number be a buffer (``self.register_buffer("scale", torch.tensor(1.0),
        persistent=False)``): that is filled in place.

    Examples:
        >>> AttributeSchedule({"optimizer.weight_decay": "cosine(0.05, 0)"}).schedules
        {'optimizer.weight_decay': Cosine(start=0.05, end=0.0, until=Duration(amount=100.0, \
unit='percent'), after=Duration(amount=0.0, unit='steps'))}
    """

    def __init__(
        self,
        values: Mapping[str, float | str | Schedule],
        name: str = "attribute_schedule",
        optimizer: int = 0,
    ) -> None:
        super().__init__(name, optimizer)
        if not values:
            raise AuxiliaryError(f"{name}: no path is named, for example {{'optimizer.lr': 0.1}}.")
        self.schedules: dict[str, Schedule] = {}
        for path, value in values.items():
            try:
                self.schedules[path] = Schedule.parse(value)
            except ScheduleError as error:
                raise AuxiliaryError(f"{name}: {path}: {error}") from error

    def find(self, engine: Engine) -> list[Driven]:
        driven = []
        for path, schedule in self.schedules.items():
            for place in self._places(path, engine):
                value = place.get()
                if not is_number(value):
                    raise AuxiliaryError(
                        f"{self.name}: {place.path} is {describe(value)}, and a schedule takes the "
                        f"place of a number."
                    )
                self._check_settable(place)
                kind = "parameter group" if isinstance(place, GroupPlace) else "attribute"
                driven.append(Driven(place, schedule, kind=kind))
        return driven

    def logged(self) -> dict[str, Any]:
        found = {}
        for path, schedule in self.schedules.items():
            for (_, group), value in zip(self._values, self._now, strict=True):
                if value is not None and group[0].schedule == schedule:
                    found[path.replace("/", "_")] = value
        return found

    def _check_settable(self, place: Place) -> None:
        try:
            place.set(place.plain())
        except (AttributeError, TypeError) as error:
            raise AuxiliaryError(f"{self.name}: {place.path} cannot be set: {error}") from error

    # --------------------------------------------------------------------------------- the paths
    def _places(self, path: str, engine: Engine) -> list[Place]:
        root = re.split(r"[.:\[]", path, maxsplit=1)[0]
        if root == "optimizer":
            return self._in_optimizer(path, engine)
        if root == "model":
            return self._in_model(path, engine)
        if root == "callback":
            return [self._in_callback(path, engine)]
        if root == "datamodule":
            source = engine.trainer.datamodule
            if source is None:
                raise AuxiliaryError(f"{self.name}: {path!r}: Trainer.fit was given no datamodule.")
            return [self._attribute(path, source, path.split(".")[1:])]
        raise AuxiliaryError(
            f"{self.name}: {path!r} begins with {root!r}; a path begins with optimizer, model, "
            f"callback:Name or datamodule, for example 'optimizer.lr' or 'model.head.temperature'."
        )

    def _in_optimizer(self, path: str, engine: Engine) -> list[Place]:
        read = _OPTIMIZER.fullmatch(path)
        if read is None:
            raise AuxiliaryError(
                f"{self.name}: {path!r} cannot be read. Write 'optimizer.lr', 'optimizer[1].lr', "
                f"'optimizer.groups[0].lr' or 'optimizer.betas[0]'."
            )
        optimizers = engine.trainer.optimizers
        number = int(read["number"]) if read["number"] else self.optimizer
        if number >= len(optimizers):
            raise AuxiliaryError(
                f"{self.name}: {path!r}: configure_optimizers returned {len(optimizers)}, counted "
                f"from 0."
            )
        optimizer, key = optimizers[number], read["key"]
        self._check_alone(path, key, optimizer, engine)
        groups = dict(enumerate(optimizer.param_groups))
        if read["group"]:
            chosen = int(read["group"])
            if chosen not in groups:
                raise AuxiliaryError(
                    f"{self.name}: {path!r}: there are {len(groups)} parameter groups, counted "
                    f"from 0."
                )
            groups = {chosen: groups[chosen]}
        places: list[Place] = []
        for place, group in groups.items():
            if key not in group or key == "params":
                keys = [each for each in group if each != "params"]
                raise AuxiliaryError(
                    f"{self.name}: {path!r}: {type(optimizer).__name__} has no {key!r}. "
                    f"{near_matches(key, keys)}"
                )
            index = int(read["index"]) if read["index"] else None
            if index is not None and (
                not isinstance(group[key], tuple | list) or index >= len(group[key])
            ):
                raise AuxiliaryError(
                    f"{self.name}: {path!r}: {key!r} is {group[key]!r}, which has no entry {index}."
                )
            where = path if len(groups) == 1 else f"{path} (group {place})"
            places.append(GroupPlace(where, optimizer, place, key, index))
        return places

    def _check_alone(self, path: str, key: str, optimizer: Any, engine: Engine) -> None:
        for config in engine.trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            cycles = key in _CYCLED and getattr(scheduler, "cycle_momentum", False)
            if scheduler.optimizer is optimizer and (key == "lr" or cycles):
                raise AuxiliaryError(
                    f"{self.name}: {path!r} is set by the {type(scheduler).__name__} that "
                    f"configure_optimizers returned. Leave one of the two out."
                )

    def _in_model(self, path: str, engine: Engine) -> list[Place]:
        *parts, key = path.split(".")[1:] or [""]
        pattern = ".".join(parts)
        named = {plain_path(name): module for name, module in engine.module.named_modules()}
        chosen = {
            name: module
            for name, module in named.items()
            if name == pattern or (is_glob(pattern) and fnmatchcase(name, pattern))
        }
        if not chosen:
            raise AuxiliaryError(
                f"{self.name}: {path!r}: no module has the path {pattern!r}. "
                f"{near_matches(pattern, [name for name in named if name])}"
            )
        having = {name: module for name, module in chosen.items() if hasattr(module, key)}
        if not having:
            numbers = {
                each
                for module in chosen.values()
                for each in (*vars(module), *module._buffers)
                if not each.startswith("_") and is_number(getattr(module, each, None))
            }
            raise AuxiliaryError(
                f"{self.name}: {path!r}: {type(next(iter(chosen.values()))).__name__} has no "
                f"attribute {key!r}. {near_matches(key, sorted(numbers))}"
            )
        return [
            AttributePlace(".".join(filter(None, ("model", name, key))), module, key)
            for name, module in having.items()
        ]

    def _in_callback(self, path: str, engine: Engine) -> Place:
        name, *rest = path.removeprefix("callback:").split(".")
        callbacks = [*engine.trainer.callbacks, *engine.members.values()]
        known = {type(each).__name__: each for each in callbacks}
        known |= {each.name: each for each in engine.members.values()}
        if name not in known:
            raise AuxiliaryError(
                f"{self.name}: {path!r}: no callback is called {name!r}. "
                f"{near_matches(name, list(known))}"
            )
        same = {id(each) for each in callbacks if type(each).__name__ == name}
        if len(same) > 1:
            raise AuxiliaryError(
                f"{self.name}: {path!r}: there are {len(same)} of {name}. Say which by its name, "
                f"for example 'callback:{getattr(known[name], 'name', name)}.{'.'.join(rest)}'."
            )
        return self._attribute(path, known[name], rest)

    def _attribute(self, path: str, owner: Any, parts: list[str]) -> Place:
        if not parts:
            raise AuxiliaryError(f"{self.name}: {path!r} names no attribute.")
        for position, part in enumerate(parts):
            if not hasattr(owner, part):
                held = getattr(owner, "__dict__", {})
                numbers = [each for each, value in held.items() if is_number(value)]
                raise AuxiliaryError(
                    f"{self.name}: {path!r}: {type(owner).__name__} has no attribute {part!r}. "
                    f"{near_matches(part, numbers)}"
                )
            if position < len(parts) - 1:
                owner = getattr(owner, part)
        return AttributePlace(path, owner, parts[-1])
