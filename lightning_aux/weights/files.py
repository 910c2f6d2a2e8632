"""Checkpoint files: the weights in them, and plain files of other weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_aux.engine import AuxiliaryError
from lightning_aux.engine.engine import STATE_KEY
from lightning_aux.engine.taps import plain_path
from lightning_aux.functional.quantization import quantize
from lightning_aux.functional.shards import local

__all__ = ["export", "quantized", "read_checkpoint", "weights_in", "write_checkpoint"]

Source: TypeAlias = str | Path
Weights: TypeAlias = Mapping[str, Tensor]
# What belongs to the run that wrote a checkpoint, not to its weights.
_OF_THE_RUN = ("optimizer_states", "lr_schedulers", "callbacks", "loops", STATE_KEY)


def read_checkpoint(path: Source, asked_by: str) -> dict[str, Any]:
    """A checkpoint whose tensors stay in the file until they are looked at.

    Args:
        path: a Lightning checkpoint or a plain ``state_dict``; read with ``weights_only=True``, so
            that nothing in it can run. Files older than torch 1.6 are read as a whole. Or a
            distributed checkpoint, a folder as ``ModelParallelStrategy`` and ``FSDPStrategy``
            write it; torch reads the index of such a folder as a pickle, so take it only from
            whom you trust.
        asked_by: begins the message of an error.

    Raises:
        AuxiliaryError: no such file, or it cannot be read.
    """
    path = Path(path)
    if path.is_dir() and not (path / ".metadata").is_file():
        raise AuxiliaryError(
            f"{asked_by}: {str(path)!r} is a folder, and not one that a distributed checkpoint is "
            f"in (there is no '.metadata'). Give the path of a checkpoint."
        )
    if not path.exists():
        raise AuxiliaryError(
            f"{asked_by}: {str(path)!r} is not a file (looked in {Path.cwd()}). Give the path of a "
            f"checkpoint."
        )
    try:
        if path.is_dir():
            from lightning_aux.weights.folders import read_folder  # not in every build of torch

            return read_folder(path)
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


def weights_in(checkpoint: Mapping[str, Any], asked_by: str) -> Weights:
    """The ``state_dict`` of a Lightning checkpoint, or the checkpoint if it is one itself.

    Tensors are read when they are looked at.

    Raises:
        AuxiliaryError: there is none.
    """
    weights = checkpoint.get("state_dict", checkpoint)
    if not isinstance(weights, Mapping) or not any(isinstance(v, Tensor) for v in weights.values()):
        raise AuxiliaryError(f"{asked_by}: the file holds no state_dict.")
    return weights


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
        why = (
            "it was written with save_weights_only=True, by which Lightning leaves out the state "
            "of callbacks, the average too. Use ModelCheckpoint(save_weights_only=False)."
            if "pytorch-lightning_version" in checkpoint and "callbacks" not in checkpoint
            else "it was written without a teacher or EMAWeights among the Trainer's callbacks, "
            "or before the average began."
        )
        raise AuxiliaryError(f"{asked_by}: the checkpoint has no averaged weights: {why}")
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
    new, _ = _replaced(like, weights, out, ties)
    kept = {
        key: value
        for key, value in like.items()
        if key not in _OF_THE_RUN and not key.endswith("Precision") and "state_dict" in like
    }
    _write({**kept, "state_dict": new} if "state_dict" in like else new, Path(out))


def _replaced(
    like: Mapping[str, Any], weights: Weights, out: Source, ties: Mapping[str, str] | None
) -> tuple[dict[str, Any], list[str]]:
    """The ``state_dict`` of ``like`` with other weights, and what of it has no value there."""
    old = dict(weights_in(like, str(out)))
    values = {plain_path(name): value for name, value in weights.items()}
    ties = {plain_path(name): plain_path(first) for name, first in (ties or {}).items()}
    found: dict[str, Tensor] = {}
    shared: dict[Any, Tensor] = {}  # by place in memory
    for key, before in old.items():
        name = plain_path(key)
        value = values.get(name, values.get(ties.get(name, "")))
        if value is not None and isinstance(before, Tensor):
            found[key] = shared[_place(before)] = _as(before, value, key, out)
    for key, before in old.items():
        if key not in found and isinstance(before, Tensor) and _place(before) in shared:
            found[key] = shared[_place(before)]
    return {**old, **found}, [key for key in old if key not in found]


def export(checkpoint: Source, out: Source, teacher: str | None = None) -> None:
    """Write the average in a checkpoint as a plain checkpoint, see `write_checkpoint`.

    Args:
        checkpoint: of a run with `EMAWeights`, or with a teacher that has weights.
        out: the file to write.
        teacher: whose weights; not needed where only one teacher has any.

    Raises:
        AuxiliaryError: no file, no average, or several to choose from.
    """
    where = f"export: {str(checkpoint)!r}"
    read = read_checkpoint(checkpoint, "export")
    state = average_in(read, teacher, where)
    _check_names(read, state, where)
    write_checkpoint(read, state["weights"], out, state.get("ties"))


def quantized(checkpoint: Source, out: Source) -> None:
    """Write the weights that `QuantizedWeights` evaluates with as a plain checkpoint.

    Every parameter that was quantised in the run has the values that it has in an evaluation, in
    the dtype that it was trained in; the rest is as in the checkpoint. See `write_checkpoint`.

    Args:
        checkpoint: of a run with `QuantizedWeights`, whose ``state_dict`` is in full precision.
        out: the file to write.

    Raises:
        AuxiliaryError: no file, one of a run without, or a parameter is not in it by its name.
    """
    where = f"quantized: {str(checkpoint)!r}"
    read = read_checkpoint(checkpoint, "quantized")
    members = (read.get(STATE_KEY) or {}).get("members", {})
    found = [state for state in members.values() if "quantized" in state]
    if not found:
        raise AuxiliaryError(
            f"{where}: the checkpoint was written without QuantizedWeights among the Trainer's "
            f"callbacks, or with save_weights_only=True, by which Lightning leaves out what they "
            f"keep. For weights alone there is lightning_aux.functional.quantize."
        )
    named = {plain_path(key): key for key in weights_in(read, where)}
    lost = [name for state in found for name in state["quantized"] if name not in named]
    if lost:
        raise AuxiliaryError(
            f"{where}: the state_dict has none of the names {_some(lost)} of quantised parameters. "
            f"Somebody has renamed the keys (on_save_checkpoint of the module?). Give them the "
            f"names of the module's parameters and export that."
        )
    weights = weights_in(read, where)
    new = {
        name: quantize(weights[named[name]], state["bits"], state["bucket"])
        for state in found
        for name in state["quantized"]
    }
    write_checkpoint(read, new, out)


def _check_names(read: Mapping[str, Any], state: Mapping[str, Any], where: str) -> None:
    """Raw weights must not pass for averaged ones where the two do not go by the same names."""
    old = weights_in(read, where)
    new, left = _replaced(read, state["weights"], where, state.get("ties"))
    raw = [
        key
        for key in left
        if isinstance(new[key], Tensor)
        and new[key].is_floating_point()
        and not key.endswith("_extra_state")
    ]
    if not raw:
        return
    keys = {plain_path(key) for key in old}
    unused = [name for name in state["weights"] if plain_path(name) not in keys]
    if unused:
        raise AuxiliaryError(
            f"{where}: the average has no value for {_some(raw)} of the state_dict, which has none "
            f"of the names {_some(unused)} that the average has. Somebody has renamed the keys "
            f"(on_save_checkpoint of the module?), so the file would have raw weights. Give the "
            f"state_dict in the checkpoint the names of the module's parameters and export that."
        )
    rank_zero_warn(
        f"lightning_aux: {where}: the average has no value for {_some(raw)} of the state_dict, no "
        f"parameters or buffers of the module's; these stay as they were."
    )


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (" and more" if names[5:] else "")


def _place(tensor: Tensor) -> tuple[Any, ...]:
    part = local(tensor)  # of a sharded one, which has no memory of its own
    if part.numel() == 0:
        return (id(tensor),)
    start = part.untyped_storage().data_ptr()
    return start, part.storage_offset(), tensor.shape, part.stride()


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
    part = f"{out.parent}/.{out.name}.{uuid4().hex}"
    try:
        with Path(part).open("xb") as file:  # with the rights of any other file of this user
            torch.save(dict(checkpoint), file)
        os.replace(part, out)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
