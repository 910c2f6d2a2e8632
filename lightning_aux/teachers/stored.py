"""``StoredTeacher``: logits that were written to disk before, and no teacher in memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

from lightning_aux.engine import (
    Attached,
    AuxiliaryError,
    Engine,
    Locations,
    Pass,
    Record,
    Step,
    Tap,
)
from lightning_aux.engine.step import Call
from lightning_aux.teachers.storage import LogitsFile, checks_of

__all__ = ["StoredTeacher"]


class StoredTeacher(Attached):
    """A teacher whose logits for every sample of the training dataset are in files.

    They are written once with ``lightning-aux teach`` (or `lightning_aux.teachers.teach`), mapped
    into memory, and read by the dataset index of each sample, whatever the order of the batches.
    The teacher has seen each sample once and in evaluation mode: where the training data are
    augmented at random, it speaks of the sample as it was then.

    Args:
        path: the folder that was written.
        name: what objectives call it by.
        check: compare the length of the training dataset, and the integer targets of the first
            batch, with those of the dataset that was written, and refuse another one. ``False`` for
            a student that learns from other labels, or from the first samples only.

    Raises:
        AuxiliaryError: before training, when the files are missing or damaged, are not those of
            the run that is resumed, or are of a dataset of another length; when the dataloader has
            no dataset indices; when an objective asks for features, inputs or weights. In the
            first step, when the targets are not those of the dataset that was written.
    """

    ready = True
    follows = False

    def __init__(self, path: str | Path, name: str = "stored", check: bool = True) -> None:
        super().__init__(name)
        self.path = Path(path)
        self.compares = check
        self._file: LogitsFile | None = None  # during a fit
        self._digest: str | None = None
        self._compared = False

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_file": None}

    # ------------------------------------------------------------------------------- membership
    def attach(self, engine: Engine) -> None:
        engine.teach(self)
        engine.indices.wanted = True

    def check(self, engine: Engine) -> None:
        self._file = LogitsFile(self.path, self.name)
        self._digest = self._file.digest

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        assert self._file is not None, "opened by the check"
        saved = (state or {}).get("file")
        if saved not in (None, self._digest):
            raise AuxiliaryError(
                f"{self.name}: {str(self.path)!r} does not hold the logits of the run that is "
                f"resumed. Give those, or the teacher another name."
            )
        size, stored = engine.indices.dataset_size(self.name), self._file.shape[0]
        if size > stored or (self.compares and size != stored):
            raise AuxiliaryError(
                f"{self.name}: {str(self.path)!r} holds logits of {stored} samples, and the "
                f"training dataset has {size}. Write those of this dataset with lightning-aux "
                f"teach"
                + (", or, for its first samples, give check=False." if size < stored else ".")
            )
        self._compared = not self.compares

    def stop(self) -> None:
        self._file = None

    def state(self) -> dict[str, Any]:
        return {} if self._digest is None else {"file": self._digest}

    # -------------------------------------------------------------------------------- as a teacher
    def serve(self, optimizer: int, asked_by: str) -> None:
        """It counts nobody's steps."""

    def reads(self, paths: Iterable[str], asked_by: str) -> None:
        """Refuse objectives that want more than logits."""
        for path in paths:
            _only_logits(f"the output of {path!r}", asked_by, self.name)

    def run(self, step: Step) -> Record:
        """The logits of the samples in this step."""
        assert self._file is not None, "opened by the check"
        index = self.engine.indices.current(self.name)
        if not self._compared:
            self._compare(step, index)
            self._compared = True
        logits = self._file.rows(index, step.loss.device)
        return Record(step.batch, self.name, {"": [Call((), {}, logits)]})

    def _compare(self, step: Step, index: Tensor) -> None:
        """Whether these samples have the targets that they had."""
        assert self._file is not None
        try:
            checks = checks_of(step.target, len(index))
        except AuxiliaryError:  # no target is known
            return
        for sample, now, then in zip(
            index.tolist(), checks or (), self._file.checks(index), strict=False
        ):
            if then and now != then:
                raise AuxiliaryError(
                    f"{self.name}: sample {sample} of the training dataset has another target than "
                    f"when {str(self.path)!r} was written. The dataset has other samples, or is in "
                    f"another order: write its logits with lightning-aux teach. If only the labels "
                    f"differ, and are meant to, give check=False."
                )

    def show(self, taught: Record, locations: Locations, asked_by: str) -> Pass:
        """The stored logits, as one objective sees them."""
        return StoredPass(self.engine, taught, locations, asked_by)

    def pairs(self) -> tuple[list[nn.Parameter], list[Tensor]]:
        """Refuse objectives in weight space."""
        _only_logits("the weights", "an objective", self.name)


class StoredPass(Pass):
    """What is known of a teacher that is not here: its logits."""

    @property
    def returned(self) -> Tensor:
        return self.logits

    @property
    def logits(self) -> Tensor:
        logits: Tensor = self._record.calls[""][0].returned
        return logits

    def features(self, path: Tap | None = None) -> NoReturn:
        _only_logits("features", self._asked_by, self._record.whose)

    def input(self, path: Tap | None = None) -> NoReturn:
        _only_logits("the input", self._asked_by, self._record.whose)


def _only_logits(what: str, asked_by: str, teacher: str) -> NoReturn:
    raise AuxiliaryError(
        f"{asked_by} wants {what} of the teacher {teacher!r}, of which only the logits are stored. "
        f"FrozenTeacher(module=...) runs a model and has the rest."
    )
