"""``Evaluation``: the model's calls in the steps that do not train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_aux.engine.capture import apart
from lightning_aux.engine.engine import Engine
from lightning_aux.engine.model_call import ModelCall
from lightning_aux.engine.patches import Patches
from lightning_aux.engine.step import Pass, Record
from lightning_aux.engine.taps import Locations

__all__ = ["Evaluation"]

STEPS = ("validation_step", "test_step")


class Evaluation:
    """Shows every validation and test step, in ``fit`` and outside of it, once it has run.

    Which call is the model's is found by the rules of training, apart from it: under ``no_grad``
    nothing tells a part that is called on data from one that is called on another part's output,
    so where ``self(...)`` is not called there may be only one.

    Args:
        trainer: the user's.
        module: the user's.
        locations: where logits, target and mask are.
        asked_by: begins the message of an error.
        see: gets what was captured of each step.

    Raises:
        AuxiliaryError: a path of ``locations`` names no module.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        locations: Locations,
        asked_by: str,
        see: Callable[[Pass], None],
    ) -> None:
        # Attached to nothing: it lends its look-ups to a `Pass`.
        self._engine = Engine(trainer, module)
        self._engine.model_call = ModelCall(module, self._engine.capture, "validation_step")
        self._engine.capture.add(locations.module_paths(), asked_by)
        self._engine.model_call.watch()
        self._locations = locations
        self._asked_by = asked_by
        self._see = see
        self._patches = Patches()
        self._engine.capture.wrap_forward(self._patches)
        for name in STEPS:
            self._wrap(module, name)

    def _wrap(self, module: Any, name: str) -> None:
        step = getattr(module, name)
        capture = self._engine.capture

        def watched_step(*args: Any, **kwargs: Any) -> Any:
            batch = kwargs["batch"] if "batch" in kwargs else args[0] if args else None
            record = Record(apart(batch), "the evaluation")
            before, capture.record = capture.record, record
            try:
                returned = step(*args, **kwargs)
            finally:
                capture.record = before
            capture.settle(record)
            self._engine.model_call.bind(record)
            self._see(Pass(self._engine, record, self._locations, self._asked_by))
            return returned

        self._patches.wrap(module, name, watched_step)

    def stop(self) -> None:
        """Take every hook and wrapper away."""
        self._engine.capture.clear()
        self._patches.undo()
