"""``Tail``: what a training step does from one module on, to be done again by itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_aux.engine.capture import apart, is_as_returned
from lightning_aux.engine.errors import AuxiliaryError
from lightning_aux.engine.step import Record
from lightning_aux.engine.taps import modules_at, plain_path

if TYPE_CHECKING:
    from lightning_aux.engine.engine import Engine

__all__ = ["Tail"]

_CHECKPOINT = torch.utils.checkpoint.__name__


class Tail:
    """Knows which modules have run before one module was called first, and what they returned.

    These are the largest modules beside it and beside what contains it. While a step is repeated
    they return what they returned in the step itself, with its graph, and leave the random streams
    where they left them there, so that only what follows is computed again and one backward goes
    through all. What the user computes before outside of modules is computed again too, with the
    same random numbers.

    A function that ``torch.utils.checkpoint`` will run again has no part that could be remembered:
    within it all modules run, unless the function is one of them.

    Args:
        engine: captures the calls.
        path: the module that the tail begins with.
        asked_by: begins the message of an error.

    Raises:
        AuxiliaryError: there is no such module.
    """

    def __init__(self, engine: Engine, path: str, asked_by: str) -> None:
        self._capture = engine.capture
        self._asked_by = asked_by
        self.path, *more = modules_at(engine.module, path, asked_by)
        if more:
            raise AuxiliaryError(
                f"{asked_by}: {path!r} names {1 + len(more)} modules ({self.path!r}, {more[0]!r}, "
                f"...), and the tail begins with one."
            )
        self._named: dict[str, nn.Module] = {}
        for name, module in engine.module.named_modules():
            self._named.setdefault(plain_path(name), module)
        self._beside: list[str] = []
        here = ""
        for part in self.path.split("."):
            inside = f"{here}.{part}" if here else part
            self._watch([each for each in self._children(here) if each != inside])
            here = inside
        self._capture.add([self.path], asked_by)
        self._capture.draws_on = engine.trainer.strategy.root_device

    def _children(self, path: str) -> list[str]:
        found = [each for each in self._named if each and each.rpartition(".")[0] == path]
        return [each for each in found if each != path]

    def _watch(self, paths: list[str]) -> None:
        for path in paths:
            if type(self._named[path]).forward is nn.Module.forward:  # a list: nobody calls it
                self._watch(self._children(path))
            else:
                self._beside.append(path)
        added = [each for each in paths if each in self._beside]
        self._capture.add(added, self._asked_by)
        self._capture.note_random(added, "left")

    def remembered(
        self, record: Record, draw: Callable[[], None]
    ) -> dict[nn.Module, Callable[..., Any]]:
        """For each module that ran before, and the first of the tail, what to call as ``forward``.

        Args:
            record: of the step.
            draw: called when the tail begins.

        Raises:
            AuxiliaryError: the module was not called, or what came before it was overwritten; in
                the repetition, where the tail begins within a checkpointed function.
        """
        if self.path not in record.sequence:
            raise AuxiliaryError(
                f"{self._asked_by}: the module {self.path!r} was not called in this training step, "
                f"so nothing comes after it. Name a module that runs every time."
                f"{self._capture.note_on_compilation()}"
            )
        before = record.sequence[: record.sequence.index(self.path)]
        found = {self._named[self.path]: self._beginning(draw)}
        for path in list(self._beside):
            count = before.count(path)
            if count:
                found[self._named[path]] = self._in_turn(path, record, count)
            elif path not in record.sequence and (inner := self._children(path)):
                self._beside.remove(path)  # called by another name than __call__: look inside
                self._watch(inner)
        return found

    def _beginning(self, draw: Callable[[], None]) -> Callable[..., Any]:
        forward, begun = self._named[self.path].forward, False

        def begin(*arguments: Any, **keywords: Any) -> Any:
            nonlocal begun
            if not begun:
                begun = True
                if _checkpointed() is not None:
                    raise AuxiliaryError(
                        f"{self._asked_by}: {self.path!r} is called within torch.utils.checkpoint, "
                        f"which would run it again with other masks than those of the loss. Name a "
                        f"module after the checkpointed part, or leave checkpointing off there."
                    )
                draw()
            return forward(*arguments, **keywords)

        return begin

    def _in_turn(self, path: str, record: Record, count: int) -> Callable[..., Any]:
        calls = record.calls[path][:count]
        for call in calls:
            if "features" in call.lost:
                raise AuxiliaryError(
                    f"{self._asked_by}: the output of {path!r} was overwritten in place by the "
                    f"model, in this step and not in the first. Let the operation after it be one "
                    f"that is not in place."
                )
        forward = self._named[path].forward
        rest = iter(calls)

        def remember(*arguments: Any, **keywords: Any) -> Any:
            call = next(rest, None)
            if call is None or _checkpointed() == "in part":
                return forward(*arguments, **keywords)
            if call.left is not None:
                call.left.restore()
            returned = apart(call.returned)
            if not torch.is_grad_enabled():  # as it is within a reentrant checkpoint
                return tree_map_only(Tensor, Tensor.detach, returned)
            if is_as_returned(call):
                return returned
            return tree_map_only(Tensor, Tensor.clone, returned)

        return remember


def _checkpointed() -> Literal["whole", "in part"] | None:
    """Whether ``torch.utils.checkpoint`` runs the module that asks by itself, or what calls it."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and _module_of(frame) == nn.Module.__module__:
        frame = frame.f_back
    if _module_of(frame) == _CHECKPOINT:
        return "whole"
    while frame is not None and _module_of(frame) != __package__ + ".passes":
        if _module_of(frame) == _CHECKPOINT:
            return "in part"
        frame = frame.f_back
    return None


def _module_of(frame: FrameType | None) -> str | None:
    return None if frame is None else frame.f_globals.get("__name__")
