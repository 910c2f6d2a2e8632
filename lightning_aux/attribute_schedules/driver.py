"""``Driver``: the base of callbacks that set numbers of the user's by schedules, and undo it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info

from lightning_aux.attribute_schedules.places import Place
from lightning_aux.engine import Attached, AuxiliaryError, Engine, Progress
from lightning_aux.schedule import Schedule

__all__ = ["Driven", "Driver", "as_table"]


@dataclass
class Driven:
    """One place with what drives it.

    Attributes:
        place: where the number is.
        schedule: its values.
        factor: what they are multiplied by (a profile over the depth of the model).
        kind: what holds the number, for the table.
        own: the user's number, given back after training.
    """

    place: Place
    schedule: Schedule
    factor: float = 1.0
    kind: str = ""
    own: float | int = 0.0


class Driver(Attached):
    """Sets numbers between optimizer steps, never within an accumulation window.

    Args:
        name: unique name for logs and checkpoints.
        optimizer: with several optimizers, the index of the one whose steps are counted.
    """

    turn = -1  # whoever measures or changes something else finds the numbers of this step
    drives_rates: ClassVar[bool] = False
    """Whether 0 switches off what is driven."""

    def __init__(self, name: str, optimizer: int = 0) -> None:
        super().__init__(name)
        self.optimizer = optimizer
        self.driven: list[Driven] = []
        self._values: list[tuple[Callable[[int], float], list[Driven]]] = []
        self._now: list[float | None] = []

    @abstractmethod
    def find(self, engine: Engine) -> list[Driven]:
        """What to drive; called once everything of the user's exists, before training starts."""

    def check(self, engine: Engine) -> None:
        found = self.find(engine)
        others = {
            each.place.identity: member.name
            for member in engine.members.values()
            if isinstance(member, Driver) and member is not self
            for each in member.driven
        }
        for each in found:
            other = others.get(each.place.identity)
            if other is not None:
                raise AuxiliaryError(
                    f"{self.name}: {each.place.path} is driven by {other} already. Let each "
                    f"number have one schedule."
                )
            others[each.place.identity] = self.name
            each.own = each.place.plain()
        self.driven = found
        rank_zero_info(f"lightning_aux: {self.name} drives\n{as_table(found)}")

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        kept = (state or {}).get("own", {})
        for each in self.driven:
            own, driven = kept.get(each.place.path, (each.own, None))
            if each.place.plain() == driven:  # restored from the checkpoint: not the user's
                each.own = own
        groups: dict[Schedule, list[Driven]] = {}
        for each in self.driven:
            groups.setdefault(each.schedule, []).append(each)
        self._values = [(engine.bind(key, self.name), group) for key, group in groups.items()]
        self._now = [None] * len(groups)

    def before_step(self, now: Progress) -> None:
        for position, (value_at, group) in enumerate(self._values):
            value = value_at(now.steps)
            if value == self._now[position]:
                continue
            self._now[position] = value
            for each in group:
                each.place.set(value * each.factor if each.factor != 1.0 else value)

    def after_restart(self) -> None:
        self._now = [None] * len(self._now)  # parameter groups have their first settings again

    def stop(self) -> None:
        for each in self.driven:
            each.place.give_back(each.own)
        self.driven, self._values, self._now = [], [], []

    def state(self) -> dict[str, Any]:
        return {"own": {each.place.path: [each.own, each.place.plain()] for each in self.driven}}


def as_table(driven: Sequence[Driven]) -> str:
    """A line for each place: where, of what kind, the user's own value, the schedule."""
    rows = [("where", "what", "before", "schedule")]
    for each in driven:
        times = "" if each.factor == 1.0 else f"{each.factor:.4g} · "
        rows.append((each.place.path, each.kind, f"{each.own:g}", f"{times}{each.schedule}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
