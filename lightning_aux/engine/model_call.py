"""``ModelCall``: which call in the user's step is the model's, and how to make it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_aux.engine.capture import Capture, Given, apart
from lightning_aux.engine.distributed import is_fully_sharded
from lightning_aux.engine.errors import AuxiliaryError
from lightning_aux.engine.step import Call, Record

__all__ = ["ModelCall", "WholeCall"]


class ModelCall:
    """The call that maps the batch to the model's output, found in the first step.

    It is the module's own ``forward`` if the step calls it; else the one direct child that is
    called on data, not on something another layer has computed.

    Attributes:
        where: the call in words, or why there is none; empty before the first step.
        doubt: why the output of that call may not be the logits; usually empty.
    """

    naming = (
        "Name them: Taps(logits='path.of.a.module') or Taps(logits=lambda p: p.returned['...'])."
    )
    remedy = "Taps(forward=lambda module, batch: ...)"

    def __init__(self, module: nn.Module, capture: Capture, step: str = "training_step") -> None:
        self._module = module
        self._step = step
        self._capture = capture
        self._path: str | None = None
        self._candidates: list[str] = []
        self._own_hooks: list[str] = []
        self.where = ""
        self.doubt = ""

    def watch(self) -> None:
        """Record the direct children that have parameters, until a call is bound."""
        self._candidates = [
            name
            for name, child in self._module.named_children()
            if any(True for _ in child.parameters())
        ]
        self._own_hooks = [name for name in self._candidates if name not in self._capture]
        self._capture.add(self._own_hooks, "the engine")
        self._capture.note_random(self._candidates, "entered")

    def bind(self, record: Record) -> None:
        """Decide which call it is, once, from what the first step called."""
        if self.where:
            return
        name = type(self._module).__name__
        called = [path for path in self._candidates if path in record.calls]
        on_data = [path for path in called if not _depends_on_graph(record.call(path))]
        say = "say how to run it: Taps(logits='...', forward=lambda module, batch: ...)"
        if "" in record.calls:
            self._path, self.where = "", f"{name}.forward(...)"
        elif len(on_data) == 1:
            self._path, self.where = on_data[0], f"{name}.{on_data[0]}(...)"
            later = [path for path in called if path != self._path]
            if later:  # a teacher could run that part, but the logits come out of another
                self.doubt = (
                    f"{name}.{self._step} does not call self(...), and after {self._path!r} it "
                    f"calls {', '.join(map(repr, later))}: it is not clear which of them gives "
                    f"the logits. Call self(x) in {self._step}, or {say}."
                )
        else:
            self.where = (
                f"{name}.{self._step} does not call self(...), and it is not clear which "
                f"submodule is the model (called: {', '.join(called) or 'none'}). Call self(x) in "
                f"{self._step}, or {say}."
            )
        self._capture.drop([path for path in self._own_hooks if path != self._path])

    def of(self, record: Record, asked_by: str) -> Call:
        """The model's call in this record.

        Raises:
            AuxiliaryError: there is none.
        """
        self.bind(record)
        if self._path is None:
            raise AuxiliaryError(f"{asked_by}: {self.where}")
        call = record.call(self._path)
        if call is None:
            raise AuxiliaryError(
                f"{asked_by}: {self.where} was not called in this step, although it was in the "
                f"first. Name the logits with Taps(logits='...')."
            )
        return call

    def count(self, record: Record) -> int:
        """How often the step made this call."""
        return len(record.calls.get(self._path or "", ()))

    def given(self, record: Record, asked_by: str) -> Given:
        """What the model was called on; not to be written to.

        Raises:
            AuxiliaryError: it is not known, or the model has overwritten it.
        """
        call = self.of(record, asked_by)
        if call.overwritten or "input" in call.lost:
            raise AuxiliaryError(
                f"{asked_by}: {self.where} writes into its own input, so a second pass cannot see "
                f"what the model saw. Begin it with x = x.clone(), or use operations that "
                f"are not in place."
            )
        return call.arguments, call.keywords

    def again(
        self,
        record: Record,
        asked_by: str,
        arguments: tuple[Any, ...] = (),
        keywords: Mapping[str, Any] = MappingProxyType({}),
    ) -> Callable[[], Any]:
        """A function that makes the model's call of this record once more.

        Args:
            record: where the model was called.
            asked_by: begins the message of an error.
            arguments: with these and ``keywords`` instead, if there are any.
            keywords: likewise.

        Raises:
            AuxiliaryError: there is none, or the model has overwritten its input.
        """
        self.of(record, asked_by)
        if not arguments and not keywords:
            arguments, keywords = self.given(record, asked_by)
        model: Any = self._module.forward  # past its hooks, which have nothing to do with a teacher
        if self._path:
            model = self._module.get_submodule(self._path)
        elif is_fully_sharded(self._module):  # whose hooks gather its parameters
            model = self._module

        def call_again() -> Any:
            again, named = apart((tuple(arguments), dict(keywords)))
            return model(*again, **named)

        return call_again


class WholeCall:
    """The call of a model that is always run as a whole, by us.

    Attributes:
        where: the call in words.
    """

    doubt = ""

    def __init__(self, where: str, teacher: str) -> None:
        self.where = where
        self.remedy = f"{teacher}(forward=lambda module, batch: ...)"
        self.naming = f"Return them: {self.remedy}."

    def of(self, record: Record, asked_by: str) -> Call:
        """The one call."""
        return record.calls[""][0]

    def count(self, record: Record) -> int:
        """How often it was made."""
        return 1


def _depends_on_graph(call: Call | None) -> bool:
    assert call is not None, "asked only for modules that were called"
    inputs = tree_leaves((call.arguments, call.keywords))
    return any(isinstance(each, Tensor) and each.requires_grad for each in inputs)
