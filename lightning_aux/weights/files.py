"""Checkpoint files: the weights in them, and plain files of other weights."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_aux.engine import AuxiliaryError
from lightning_aux.engine.engine import STATE_KEY
from lightning_aux.engine.taps import plain_path

__all__ = ["export", "read_checkpoint", "weights_in", "write_checkpoint"]

Source: TypeAlias = str | Path
Weights: TypeAlias = Mapping[str, Tensor]
# What belongs to the run that wrote a checkpoint, not to its weights.
_OF_THE_RUN = ("optimizer_states", "lr_schedulers", "callbacks", "loops", STATE_KEY)


def read_checkpoint(path: Source, asked_by: str) -> dict[str, Any]:
    """A checkpoint whose tensors stay in the file until they are looked at.

    Args:
        path: a Lightning checkpoint or a plain ``state_dict``; read with ``weights_only=True``, so
            that nothing in it can run. Files older than torch 1.6 are read as a whole.
        asked_by: begins the message of an error.

    Raises:
        AuxiliaryError: no such file, or it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise AuxiliaryError(
            f"{asked_by}: {str(path)!r} is not a file (looked in {Path.cwd()}). Give the path of a "
            f"checkpoint."
        )
    try:
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # not written by torch.save of today: cannot be mapped
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise AuxiliaryError(
            f"{asked_by}: {str(path)!r} cannot be read with weights_only=True: {error}. Save the "
            f"weights alone with torch.save(model.state_dict(), path)."
        ) from error
    if not isinstance(saved, dict):
        raise AuxiliaryError(f"{asked_by}: {str(path)!r} holds no state_dict.")
    return saved


def weights_in(checkpoint: Mapping[str, Any], asked_by: str) -> dict[str, Tensor]:
    """The ``state_dict`` of a Lightning checkpoint, or the checkpoint if it is one itself.

    Raises:
        AuxiliaryError: there is none.
    """
    weights = checkpoint.get("state_dict", checkpoint)
    if not isinstance(weights, Mapping) or not any(isinstance(v, Tensor) for v in weights.values()):
        raise AuxiliaryError(f"{asked_by}: the file holds no state_dict.")
    return dict(weights)


def averages_in(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The states of teachers with weights, by name, that a checkpoint of a run with us has."""
    members = (checkpoint.get(STATE_KEY) or {}).get("members", {})
    return {name: state for name, state in members.items() if "weights" in state}


def average_in(checkpoint: Mapping[str, Any], teacher: str | None, asked_by: str) -> dict[str, Any]:
    """The state of one of them.

    Args:
        checkpoint: from `read_checkpoint`.
        teacher: its name; not needed where there is only one.
        asked_by: begins the message of an error.

    Raises:
        AuxiliaryError: there is none of that name, none at all, or several to choose from.
    """
    found = averages_in(checkpoint)
    if not found:
        raise AuxiliaryError(
            f"{asked_by}: the checkpoint has no averaged weights: it was written without a teacher "
            f"or EMAWeights among the Trainer's callbacks, or before the average began."
        )
    if teacher is None and len(found) == 1:
        teacher = next(iter(found))
    if teacher not in found:
        which = "Several teachers have weights" if teacher is None else f"No teacher {teacher!r}"
        raise AuxiliaryError(
            f"{asked_by}: {which} in the checkpoint. Choose one of {', '.join(map(repr, found))}."
        )
    return found[teacher]


def write_checkpoint(
    like: Mapping[str, Any], weights: Weights, out: Source, ties: Mapping[str, str] | None = None
) -> None:
    """Write a plain checkpoint: what ``like`` says of the model, with other weights.

    Every key of the ``state_dict`` of ``like`` is there, in its dtype, so it loads with
    ``strict=True``, by ``load_from_checkpoint`` and as the ``ckpt_path`` of an evaluation, also
    where we are not installed. What has no value in ``weights`` (extra state) stays as it was. The
    state of the run that wrote ``like`` (optimizers, schedulers, loops, callbacks) is left out: it
    belongs to the raw weights. Appears as a whole or not at all.

    Args:
        like: from `read_checkpoint`.
        weights: values by name; of tied parameters one name is enough.
        out: the file to write; replaced if it is there.
        ties: further names of tied parameters, and the name they go by in ``weights``. Not needed
            where they share their memory in ``like``.
    """
    old = weights_in(like, str(out))
    values = {plain_path(name): value for name, value in weights.items()}
    ties = {plain_path(name): plain_path(first) for name, first in (ties or {}).items()}
    found: dict[str, Tensor] = {}
    shared: dict[Any, Tensor] = {}  # by place in memory
    for key, before in old.items():
        name = plain_path(key)
        value = values.get(name, values.get(ties.get(name, "")))
        if value is not None and isinstance(before, Tensor):
            found[key] = shared[_place(before)] = _as(before, value, key, out)
    new = {
        key: found.get(key, shared.get(_place(before), before))
        if isinstance(before, Tensor)
        else before
        for key, before in old.items()
    }
    kept = {
        key: value
        for key, value in like.items()
        if key not in _OF_THE_RUN and not key.endswith("Precision") and "state_dict" in like
    }
    _write({**kept, "state_dict": new} if "state_dict" in like else new, Path(out))


def export(checkpoint: Source, out: Source, teacher: str | None = None) -> None:
    """Write the average in a checkpoint as a plain checkpoint, see `write_checkpoint`.

    Args:
        checkpoint: of a run with `EMAWeights`, or with a teacher that has weights.
        out: the file to write.
        teacher: whose weights; not needed where only one teacher has any.

    Raises:
        AuxiliaryError: no file, no average, or several to choose from.
    """
    read = read_checkpoint(checkpoint, "export")
    state = average_in(read, teacher, f"export: {str(checkpoint)!r}")
    write_checkpoint(read, state["weights"], out, state.get("ties"))


def _place(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.numel() == 0:
        return (id(tensor),)
    start = tensor.untyped_storage().data_ptr()
    return start, tensor.storage_offset(), tensor.shape, tensor.stride()


def _as(before: Tensor, value: Tensor, key: str, out: Source) -> Tensor:
    if before.shape != value.shape:
        raise AuxiliaryError(
            f"{str(out)!r}: {key!r} has shape {tuple(value.shape)}, and {tuple(before.shape)} in "
            f"the checkpoint that the file is to be like. They belong to other models."
        )
    return value.to(before.dtype)


def _write(checkpoint: Mapping[str, Any], out: Path) -> None:
    """A full disk, or Ctrl-C, leaves what was there before."""
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(dict(checkpoint), file)
        os.replace(part, out)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
