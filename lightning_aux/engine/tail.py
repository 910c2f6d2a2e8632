"""``Tail``: what a training step does from one module on, to be done again by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_aux.engine.capture import is_as_returned
from lightning_aux.engine.errors import AuxiliaryError
from lightning_aux.engine.step import Record
from lightning_aux.engine.taps import modules_at, plain_path

if TYPE_CHECKING:
    from lightning_aux.engine.engine import Engine

__all__ = ["Tail"]


class Tail:
    """Knows which modules have run before one module was called first, and what they returned.

    These are the largest modules beside it and beside what contains it. While a step is repeated
    they return what they returned in the step itself, with its graph, so that only what follows is
    computed again and one backward goes through all. What the user computes before outside of
    modules is computed again too.

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

    def _children(self, path: str) -> list[str]:
        found = [each for each in self._named if each and each.rpartition(".")[0] == path]
        return [each for each in found if each != path]

    def _watch(self, paths: list[str]) -> None:
        for path in paths:
            if type(self._named[path]).forward is nn.Module.forward:  # a list: nobody calls it
                self._watch(self._children(path))
            else:
                self._beside.append(path)
        self._capture.add([each for each in paths if each in self._beside], self._asked_by)

    def remembered(self, record: Record) -> dict[nn.Module, Callable[..., Any]]:
        """For each module that ran before, what to call in place of its ``forward``.

        Raises:
            AuxiliaryError: the module was not called, or what came before it was overwritten.
        """
        if self.path not in record.sequence:
            raise AuxiliaryError(
                f"{self._asked_by}: the module {self.path!r} was not called in this training step, "
                f"so nothing comes after it. Name a module that runs every time."
                f"{self._capture.note_on_compilation()}"
            )
        before = record.sequence[: record.sequence.index(self.path)]
        found = {}
        for path in list(self._beside):
            count = before.count(path)
            if count:
                found[self._named[path]] = self._in_turn(path, record, count)
            elif path not in record.sequence and (inner := self._children(path)):
                self._beside.remove(path)  # called by another name than __call__: look inside
                self._watch(inner)
        return found

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
            if call is None:
                return forward(*arguments, **keywords)
            if is_as_returned(call):
                return call.returned
            return tree_map_only(Tensor, Tensor.clone, call.returned)

        return remember
