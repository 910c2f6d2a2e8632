"""``FrozenTeacher``: weights that never move."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_aux.engine import AuxiliaryError, Engine
from lightning_aux.teachers.teacher import Teacher
from lightning_aux.weights.store import WeightStore

__all__ = ["FrozenTeacher"]


class FrozenTeacher(Teacher):
    """A teacher whose weights are fixed: those at the start of training, or a checkpoint's.

    Args:
        name: what objectives call it by.
        checkpoint: path of a Lightning checkpoint or a plain ``state_dict`` of the same model;
            read with ``weights_only=True``, so that nothing in it can run. It is not copied into
            the checkpoints of this run: resuming reads it again, and wants the same file. Default:
            the student's weights when training starts, kept through resumed runs.

    Raises:
        AuxiliaryError: before training, when the file does not exist, cannot be read, holds the
            weights of another model, or is not the one of the run that is resumed; or when the
            strategy shards parameters in another way than FSDP2.
    """

    def __init__(self, name: str = "frozen", checkpoint: str | Path | None = None) -> None:
        super().__init__(name)
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self._prepared: WeightStore | None = None  # from the check until training starts
        self._digest: str | None = None

    def check(self, engine: Engine) -> None:
        super().check(engine)
        if self.checkpoint is not None:
            self._prepared = self.new_store(engine.module)
            self._prepared.load_state_dict(self._read(), self.name)

    def begin(self, module: nn.Module) -> None:
        self.store, self._prepared = self._prepared or self.new_store(module), None

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        saved = (state or {}).get("file")
        if self.checkpoint is None and saved is not None:
            raise AuxiliaryError(
                f"{self.name}: the run that is resumed read its teacher from a file, and stored no "
                f"second copy. Give {type(self).__name__}(checkpoint=...) again."
            )
        if saved not in (None, self._digest):
            raise AuxiliaryError(
                f"{self.name}: {str(self.checkpoint)!r} is not the file that the run which is "
                f"resumed read its teacher from. Give that one, or the teacher another name."
            )
        super().start(engine, None if self.checkpoint is not None else state)

    def state(self) -> dict[str, Any]:
        # What is in a file already is not stored in every checkpoint as well.
        return super().state() if self.checkpoint is None else {"file": self._digest}

    def _read(self) -> dict[str, Tensor]:
        assert self.checkpoint is not None
        if not self.checkpoint.is_file():
            raise AuxiliaryError(
                f"{self.name}: checkpoint={str(self.checkpoint)!r} is not a file (looked in "
                f"{Path.cwd()}). Give the path of a checkpoint of the same model."
            )
        with self.checkpoint.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
        self._digest = digest.hexdigest()
        try:
            saved: Any = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:
            raise AuxiliaryError(
                f"{self.name}: {str(self.checkpoint)!r} cannot be read with weights_only=True: "
                f"{error}. Save the weights alone with torch.save(model.state_dict(), path)."
            ) from error
        weights = saved.get("state_dict", saved) if isinstance(saved, dict) else saved
        if not isinstance(weights, dict):
            raise AuxiliaryError(f"{self.name}: {str(self.checkpoint)!r} holds no state_dict.")
        return weights
