"""``EMAWeights``: validate, test, predict and export with averaged weights."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn

from lightning_aux.engine import Attached, AuxiliaryError, Engine
from lightning_aux.engine.engine import STATE_KEY
from lightning_aux.engine.patches import Patches
from lightning_aux.schedule import Schedule, Time
from lightning_aux.teachers import EMATeacher, Teacher
from lightning_aux.weights import WeightStore

__all__ = ["EMAWeights"]


class EMAWeights(Attached):
    """Validates, tests and predicts with the average of the weights; training goes on unchanged.

    The average is that of a teacher: one of its own, an `EMATeacher`, or one among the Trainer's
    callbacks that objectives may learn from as well (`SWATeacher`, `SnapshotTeacher`). While an
    evaluation loop runs, from before its first hook to after its last, the module has the averaged
    weights; before the average has first been updated it is evaluated as it is. A checkpoint
    written meanwhile has the raw weights in its ``state_dict``, the average in our entry: resuming
    is exact, and `export` makes a plain checkpoint of the average.

    ``Trainer.validate``, ``test`` and ``predict`` after ``fit``, or with a ``ckpt_path`` whose run
    had these callbacks, use the average too.

    Args:
        decay: see `EMATeacher`; of the average of its own, as the next arguments.
        teacher: name of a teacher among the Trainer's callbacks, whose weights these are.
        warmup: see `EMATeacher`.
        every: see `EMATeacher`.
        start: see `EMATeacher`.
        buffers: see `EMATeacher`. With ``"copy"`` BatchNorm's running statistics are those of the
            live module.
        half_life: see `EMATeacher`.
        length: see `EMATeacher`.
        name: unique name.

    Raises:
        AuxiliaryError: arguments of an average of its own beside a named ``teacher``; before
            training, no such teacher, or one that has no average (frozen, random, voted).
    """

    def __init__(
        self,
        decay: float | str | Schedule = 0.999,
        teacher: str | None = None,
        warmup: bool = False,
        every: Time = 1,
        start: Time = 0,
        buffers: Literal["copy", "average"] = "copy",
        half_life: Time | None = None,
        length: float | None = None,
        name: str = "ema_weights",
    ) -> None:
        super().__init__(name)
        own: dict[str, Any] = {
            "decay": decay,
            "warmup": warmup,
            "every": every,
            "start": start,
            "buffers": buffers,
            "half_life": half_life,
            "length": length,
        }
        self.own_teacher: EMATeacher | None = None
        if teacher is None:
            teacher = f"{name}.teacher"
            self.own_teacher = EMATeacher(name=teacher, **own)
        else:
            known = inspect.signature(EMAWeights).parameters
            changed = [f"{key}={v!r}" for key, v in own.items() if v != known[key].default]
            if changed:
                raise AuxiliaryError(
                    f"{name}: {', '.join(changed)} beside teacher={teacher!r} would change "
                    f"nothing: such arguments belong to the named teacher."
                )
        self.teacher = teacher
        self._source: Teacher | None = None
        self._loaded: WeightStore | None = None  # from a checkpoint, to be evaluated
        self._patches = Patches()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_source": None, "_loaded": None, "_patches": Patches()}

    def companions(self) -> list[Attached]:
        return [] if self.own_teacher is None else [self.own_teacher]

    def check(self, engine: Engine) -> None:
        source = engine.teacher(self.teacher, self.name)
        if not isinstance(source, Teacher) or not source.averages:
            raise AuxiliaryError(
                f"{self.name}: {self.teacher!r} is a {type(source).__name__}, which has no "
                f"average to evaluate with. EMATeacher, SWATeacher and SnapshotTeacher have one."
            )
        self._source, self._loaded = source, None

    # ------------------------------------------------------------------------------- evaluation
    # The only member that acts outside of `fit` too, and so has hooks of its own.
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._patches.undo()
        loop = trainer.fit_loop.epoch_loop.val_loop if stage == "fit" else _loop_of(trainer, stage)
        run, save_checkpoint = loop.run, trainer.save_checkpoint

        def run_with_average(*args: Any, **kwargs: Any) -> Any:
            with self._average(pl_module):
                return run(*args, **kwargs)

        def save_raw_weights(*args: Any, **kwargs: Any) -> Any:
            store = self._store()
            with nullcontext() if store is None else store.aside():
                return save_checkpoint(*args, **kwargs)

        self._patches.wrap(loop, "run", run_with_average)
        self._patches.wrap(trainer, "save_checkpoint", save_raw_weights)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
            return
        members = (checkpoint.get(STATE_KEY) or {}).get("members", {})
        state = members.get(self.teacher, {})
        self._source = self._loaded = None
        if "weights" in state and state["updates"]:
            self._loaded = WeightStore(pl_module)
            self._loaded.load_state_dict(state["weights"], self.name)
        else:
            rank_zero_warn(
                f"lightning_aux: {self.name}: the checkpoint has no average called "
                f"{self.teacher!r}, so its own weights are evaluated."
            )

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._finish()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._finish()

    def _finish(self) -> None:
        store = self._store()
        if store is not None:  # Ctrl-C may have come while it was putting the weights back
            store.restore()
            store.close()
        self._patches.undo()

    def _store(self) -> WeightStore | None:
        return self._source.store if self._source is not None else self._loaded

    def _average(self, module: Any) -> AbstractContextManager[None]:
        """The module with the average, where there is one of its weights."""
        store, source = self._store(), self._source
        if store is None or store.module is not module or (source and not source.updates):
            return nullcontext()
        return store.in_place(evaluating=True, pending=source.pending if source else None)


def _loop_of(trainer: Any, stage: str) -> Any:
    return {
        "validate": trainer.validate_loop,
        "test": trainer.test_loop,
        "predict": trainer.predict_loop,
    }[stage]
