"""Where what is written at the end of training goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["folder_of"]


def folder_of(trainer: Any) -> Path:
    """The folder of the first ``ModelCheckpoint``, else the Trainer's own; one for all ranks."""
    folders = [getattr(each, "dirpath", None) for each in trainer.checkpoint_callbacks]
    chosen = next(filter(None, folders), trainer.default_root_dir)
    folder: str = trainer.strategy.broadcast(str(chosen))
    return Path(folder)
