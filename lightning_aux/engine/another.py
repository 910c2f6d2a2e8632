"""``AnotherModel``: a module beside the user's that is run on the same batches, as a teacher is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_aux.engine.capture import Capture, apart
from lightning_aux.engine.model_call import WholeCall
from lightning_aux.engine.replay import Unobserved
from lightning_aux.engine.step import Call, Record, Step

__all__ = ["AnotherModel"]


class AnotherModel:
    """Runs a module of any architecture in evaluation mode, and records its tapped modules.

    It is called on what the user's model was called on. The module is not registered anywhere: it
    is in no ``state_dict``, no strategy wraps it and no optimizer holds it. While it runs, random
    numbers, buffers, metrics and logging are put aside as for any teacher.

    Attributes:
        capture: records what passes through chosen parts of it.
        model_call: the call of it, for messages.

    Args:
        module: the model.
        whose: it is, in words, for messages.
        forward: ``(module, batch) -> output`` in place of its call.
        teacher: the class that takes ``forward``, for messages.
    """

    def __init__(
        self,
        module: nn.Module,
        whose: str,
        forward: Callable[[nn.Module, Any], Any] | None,
        teacher: str,
    ) -> None:
        self._module = module
        self._whose = whose
        self._forward = forward
        self._home: torch.device | None = None
        self._unobserved = Unobserved(module)
        declaring = "in the objective's check(): self.learn_from(teacher, engine, reads=({},))"
        self.capture = Capture(module, declaring)
        self.model_call = WholeCall(f"{type(module).__name__}.forward(...)", teacher)

    def say(self, what: str, where: str) -> None:
        """What a default was bound to is said of the user's own model only."""

    def move_to(self, device: torch.device) -> None:
        """Move the module; one that is spread over several devices stays as it is."""
        homes = {each.device for each in (*self._module.parameters(), *self._module.buffers())}
        if len(homes) == 1 and homes != {device}:
            (self._home,) = homes
            self._module.to(device)

    def run(self, step: Step) -> Record:
        """The module on the batch of this step."""
        record = Record(step.batch, self._whose)
        if self._forward is None:
            arguments, keywords = apart(self._as_its_own(step.given()))
            run = partial(self._module, *arguments, **keywords)
        else:
            arguments, keywords = (), {}
            run = partial(self._forward, self._module, apart(self._as_its_own(step.batch)))
        with self.capture.recording(record), self._unobserved.evaluated(step.loss.device):
            returned = run()
        self.capture.settle(record)
        record.calls[""] = [Call(arguments, keywords, returned)]
        record.detach()
        return record

    def _as_its_own(self, nested: Any) -> Any:
        """Floating-point tensors in the dtype of the module's parameters.

        With ``precision="bf16-true"`` batches are in half precision; a module that is not ours to
        convert stays as it is.
        """
        dtype = next((p.dtype for p in self._module.parameters() if p.is_floating_point()), None)

        def cast(value: Tensor) -> Tensor:
            return value.to(dtype) if value.is_floating_point() else value

        return nested if dtype is None else tree_map_only(Tensor, cast, nested)

    def stop(self) -> None:
        """Leave the module as it came: without hooks, in its own mode and on its own device."""
        self._unobserved.restore()
        self.capture.clear()
        if self._home is not None:
            self._module.to(self._home)
            self._home = None
