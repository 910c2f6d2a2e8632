"""``EMAWeights``: validate, test, predict and export with averaged weights."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn

from lightning_aux.engine import Attached, AuxiliaryError, Engine
from lightning_aux.engine.engine import STATE_KEY
from lightning_aux.engine.patches import Patches, evaluation_loop
from lightning_aux.schedule import Schedule, Time
from lightning_aux.teachers import EMATeacher, Teacher
from lightning_aux.weights import WeightStore, files
from lightning_aux.weights.store import Versions

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
    had these callbacks, use the average too. Weights that you load into the module by yourself
    afterwards are evaluated as they are, with a warning.

    What your code writes into buffers during an evaluation (a counter, the best loss so far) stays
    in the module: an integer or boolean buffer is the live one all the time, another one begins
    with the average's value, and is the live one from the first evaluation on that wrote to it.

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
        offload: see `EMATeacher`; for the time of an evaluation the average is on the device.

    Raises:
        AuxiliaryError: arguments of an average of its own beside a named ``teacher``; before
            anything runs, a second `EMAWeights` in the Trainer; before training, no such teacher,
            or one that has no average (frozen, random, voted).
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
        offload: bool = False,
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
            "offload": offload,
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
        self.offload = offload
        self._source: Teacher | None = None
        self._loaded: WeightStore | None = None  # from a checkpoint, to be evaluated
        self._belongs_to: Versions = []  # the weights that the average is one of
        self._changed = self._warned = False  # whether the user has given the module others since
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
        self._changed = self._warned = False
        if any(getattr(each, "save_weights_only", False) for each in engine.trainer.callbacks):
            rank_zero_warn(
                f"lightning_aux: {self.name}: a ModelCheckpoint has save_weights_only=True, and "
                f"its files will not have the average, only the raw weights. Leave it out to "
                f"export or evaluate the average from them."
            )

    @staticmethod
    def export(checkpoint: str | Path, out: str | Path, teacher: str | None = None) -> None:
        """Write the average in a checkpoint as a plain one, see `lightning_aux.weights.export`.

        Args:
            checkpoint: of a run with `EMAWeights`, or with a teacher that has weights.
            out: the file to write.
            teacher: whose weights; not needed where only one teacher has any.

        Raises:
            AuxiliaryError: no file, no average, or several to choose from.
        """
        files.export(checkpoint, out, teacher)

    # ------------------------------------------------------------------------------- evaluation
    # Acts outside of `fit` too, and so has hooks of its own.
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        others = [e for e in trainer.callbacks if isinstance(e, EMAWeights) and e is not self]
        if others:
            raise AuxiliaryError(
                f"{self.name}: {others[0].name!r} among the Trainer's callbacks is an EMAWeights "
                f"too, and the module can be evaluated with one average at a time. Keep one; "
                f"other averages can be EMATeacher, SWATeacher or SnapshotTeacher."
            )
        super().setup(trainer, pl_module, stage)
        self._patches.undo()
        store = self._store()
        if stage != "fit" and store is not None:  # before a strategy writes, to have all alike
            self._changed = self._changed or store.versions() != self._belongs_to
        loop = evaluation_loop(trainer, stage)
        self._patches.surround(loop, "run", lambda: self._average(pl_module))
        self._patches.surround(trainer, "save_checkpoint", self._raw)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
            return
        members = (checkpoint.get(STATE_KEY) or {}).get("members", {})
        state = members.get(self.teacher, {})
        self._source = self._loaded = None
        if "weights" in state and state["updates"]:
            self._loaded = WeightStore(pl_module, offload=self.offload)
            self._loaded.load_state_dict(state["weights"], self.name)
            self._changed = self._warned = False
        else:
            rank_zero_warn(
                f"lightning_aux: {self.name}: the checkpoint has no average called "
                f"{self.teacher!r}, so its own weights are evaluated."
            )

    def end(self) -> None:
        store = self._store()
        if store is not None:  # Ctrl-C may have come while it was putting the weights back
            store.restore()
            store.close()
            self._belongs_to = self._belongs_to if self._changed else store.versions()
        self._patches.undo()

    def _store(self) -> WeightStore | None:
        return self._source.store if self._source is not None else self._loaded

    def _raw(self) -> AbstractContextManager[None]:
        """The module with its own weights."""
        store = self._store()
        return nullcontext() if store is None else store.aside()

    def _average(self, module: Any) -> AbstractContextManager[None]:
        """The module with the average, where there is one of its weights."""
        store, source = self._store(), self._source
        if store is None or store.module is not module or (source and not source.updates):
            return nullcontext()
        if self._changed:
            if not self._warned:
                rank_zero_warn(
                    f"lightning_aux: {self.name}: the weights of {type(module).__name__} have been "
                    f"changed since the average was made, so they are evaluated as they are. To "
                    f"evaluate an average, give the ckpt_path of a run with one."
                )
            self._warned = True
            return nullcontext()
        return store.in_place(evaluating=True, buffers=source.buffers_now() if source else None)
