"""Logits on disk: a folder of ``.npy`` files that are mapped into memory, and a description."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from uuid import uuid4
from zlib import crc32

import torch
from torch import Tensor

from lightning_aux.engine import AuxiliaryError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["LogitsFile", "LogitsWriter", "Storage", "checks_of"]

Storage: TypeAlias = Literal["float32", "float16", "top-k"]
STORAGES = ("float32", "float16", "top-k")
DESCRIPTION = "logits.json"
VERSION = 1
TARGETS = "targets"  # a checksum of each sample's target; 0 where there is none


class LogitsWriter:
    """Writes a folder of logits in the order of the dataset; it appears as a whole or not at all.

    As ``top-k`` only the k largest log-probabilities of each example are kept, with their classes,
    and the logarithm r of what the others have together::

        log p = log softmax(z)
        ẑ_c = log p_c             for the k classes
        ẑ_c = r − log(C − k)      for the others,  r = log Σ_others p_c

    so that softmax(ẑ) has the probabilities of the k classes, and the others share the rest evenly.
    Log-probabilities are near 0 where they matter, which is where float16 is finest.

    Args:
        out: the folder to make.
        samples: how many there will be.
        storage: ``"float32"``, ``"float16"`` or ``"top-k"``.
        k: how many classes of each example, for ``"top-k"``.
        dim: class dimension of the logits.
        asked_by: begins the message of an error.

    Raises:
        AuxiliaryError: ``out`` is there already, an unknown storage, or a ``k`` without use.
    """

    def __init__(
        self,
        out: str | Path,
        samples: int,
        storage: Storage = "float16",
        k: int | None = None,
        dim: int = -1,
        asked_by: str = "teach",
    ) -> None:
        self._out = Path(out)
        self._asked_by = asked_by
        if self._out.exists():
            raise AuxiliaryError(
                f"{asked_by}: {str(out)!r} is there already. Give another folder, or delete it."
            )
        if storage not in STORAGES:
            raise AuxiliaryError(
                f"{asked_by}: storage={storage!r} is unknown. Choose one of "
                f"{', '.join(map(repr, STORAGES))}."
            )
        if (storage == "top-k") != (k is not None) or (k is not None and k < 1):
            raise AuxiliaryError(
                f"{asked_by}: k={k} and storage={storage!r}: k, at least 1, is how many classes of "
                f"each example 'top-k' keeps."
            )
        self._samples, self._storage, self._k, self._dim = samples, storage, k, dim
        self._part = self._out.parent / f".{self._out.name}.{uuid4().hex}"
        self._arrays: dict[str, NDArray[Any]] = {}
        self._shape: tuple[int, ...] = ()
        self._digests: dict[str, Any] = {}
        self.written = 0

    def add(self, logits: Tensor, checks: list[int] | None = None) -> None:
        """The logits of the next samples, ``(n, …)``.

        Args:
            logits: class dimension and the others as for the first ones.
            checks: of the targets, from `checks_of`.

        Raises:
            AuxiliaryError: another shape than before, more samples than there are, values that
                the storage cannot hold.
        """
        logits = logits.detach().float().cpu()
        shape = tuple(logits.shape[1:])
        if not self._arrays:
            self._shape = shape
            self._open()
        if shape != self._shape:
            raise AuxiliaryError(
                f"{self._asked_by}: the logits of a sample have the shape {shape}, those before it "
                f"{self._shape}. Only samples of one shape can be stored; pad in the dataset."
            )
        end = self.written + len(logits)
        if end > self._samples:
            raise AuxiliaryError(
                f"{self._asked_by}: logits of {end} samples, but the dataset has {self._samples}."
            )
        for name, values in self._rows(logits).items():
            self._arrays[name][self.written : end] = values.numpy()
            self._digests[name].update(self._arrays[name][self.written : end].tobytes())
        self._arrays[TARGETS][self.written : end] = checks or 0
        self.written = end

    def _open(self) -> None:
        from numpy.lib.format import open_memmap

        dtypes: dict[str, str] = {"logits": self._storage}
        shapes = {"logits": self._shape}
        if self._k is not None:
            ndim = 1 + len(self._shape)
            if not -ndim < self._dim < ndim or self._dim == 0:
                raise AuxiliaryError(
                    f"{self._asked_by}: logits of shape {self._shape} for each sample have no "
                    f"class dimension dim={self._dim}."
                )
            whole = torch.empty((1, *self._shape), device="meta").movedim(self._dim, -1)
            *others, classes = whole.shape[1:]
            if self._k >= classes:
                raise AuxiliaryError(
                    f"{self._asked_by}: k={self._k} of {classes} classes leaves none out. Use "
                    f"storage='float16'."
                )
            small = "int16" if classes <= 2**15 else "int32"
            dtypes = {"logits": "float16", "classes": small, "rest": "float32"}
            kept = (*others, self._k)
            shapes = {"logits": kept, "classes": kept, "rest": tuple(others)}
        self._digests = {name: hashlib.sha256() for name in dtypes}
        self._part.mkdir(parents=True)
        for name, dtype in {**dtypes, TARGETS: "uint32"}.items():
            shape = (self._samples, *shapes.get(name, ()))
            self._arrays[name] = open_memmap(
                self._part / f"{name}.npy", mode="w+", dtype=dtype, shape=shape
            )

    def _rows(self, logits: Tensor) -> dict[str, Tensor]:
        if self._storage == "float32":
            return {"logits": logits}
        if self._k is None:
            values = logits.half()
            if not torch.equal(values.isfinite(), logits.isfinite()):
                raise AuxiliaryError(
                    f"{self._asked_by}: logits up to {logits.abs().max():.3g} do not fit into "
                    f"float16. Use storage='float32'."
                )
            return {"logits": values}
        return top_k(logits.movedim(self._dim, -1), self._k)

    def finish(self, **about: Any) -> None:
        """Write the description and give the folder its name.

        Args:
            about: what else the description says.

        Raises:
            AuxiliaryError: not every sample has been written.
        """
        if self.written < self._samples or not self._arrays:
            raise AuxiliaryError(
                f"{self._asked_by}: logits of {self.written} samples only, and the dataset has "
                f"{self._samples}."
            )
        for array in self._arrays.values():
            array.flush()  # type: ignore[attr-defined]
        description = {
            "version": VERSION,
            "storage": self._storage,
            "shape": [self._samples, *self._shape],
            "dim": self._dim,
            "files": {
                name: {"dtype": str(each.dtype), "shape": list(each.shape)}
                for name, each in self._arrays.items()
            },
            "digest": " ".join(each.hexdigest() for each in self._digests.values()),
            **about,
        }
        self._arrays = {}
        (self._part / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        os.rename(self._part, self._out)

    def close(self) -> None:
        """Remove what has been written, unless it is finished."""
        self._arrays = {}
        shutil.rmtree(self._part, ignore_errors=True)


class LogitsFile:
    """Reads rows of what `LogitsWriter` has written; only what is asked for comes into memory.

    Attributes:
        shape: of all logits, ``(samples, …)``.
        digest: of what is stored.

    Args:
        path: the folder.
        asked_by: begins the message of an error.

    Raises:
        AuxiliaryError: no such folder, or its files are not what its description says.
    """

    def __init__(self, path: str | Path, asked_by: str) -> None:
        import numpy

        folder = Path(path)
        if not (folder / DESCRIPTION).is_file():
            raise AuxiliaryError(
                f"{asked_by}: {str(path)!r} is not a folder of stored logits: there is no "
                f"{DESCRIPTION} in it (looked in {Path.cwd()}). Write one with lightning-aux teach."
            )
        try:
            about = json.loads((folder / DESCRIPTION).read_text())
            if about["version"] != VERSION:
                raise ValueError(f"version {about['version']}, not {VERSION}")
            self._arrays = {}
            for name, file in about["files"].items():
                array = numpy.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                if [str(array.dtype), list(array.shape)] != [file["dtype"], file["shape"]]:
                    raise ValueError(f"{name}.npy holds {array.dtype} of shape {array.shape}")
                self._arrays[name] = array
            self.shape = tuple(about["shape"])
            self.digest: str = about["digest"]
            self._dim: int = about["dim"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AuxiliaryError(
                f"{asked_by}: {str(path)!r} is damaged: {error!r}. Write it again with "
                f"lightning-aux teach."
            ) from error
        self._compact = about["storage"] == "top-k"

    def rows(self, index: Tensor, device: torch.device) -> Tensor:
        """The logits of some samples, float32 ``(n, …)``.

        Args:
            index: int64 ``(n,)``, on the CPU.
            device: where the logits go; what is stored is what is sent there.
        """
        names = ("logits", "classes", "rest") if self._compact else ("logits",)
        found = [_sent(torch.from_numpy(self._arrays[n][index.numpy()]), device) for n in names]
        if not self._compact:
            return found[0].float()
        logits, classes, rest = found
        return spread(logits, classes, rest, self.shape[self._dim]).movedim(-1, self._dim)

    def checks(self, index: Tensor) -> list[int]:
        """The checksums of the targets of some samples."""
        found: list[int] = self._arrays[TARGETS][index.numpy()].tolist()
        return found


def top_k(logits: Tensor, k: int) -> dict[str, Tensor]:
    """The k largest log-probabilities, their classes, and log of what the others have together."""
    log_p = logits.log_softmax(-1)
    values, classes = log_p.topk(k, dim=-1)
    rest = log_p.scatter(-1, classes, -math.inf).logsumexp(-1)
    return {
        "logits": values.clamp(min=torch.finfo(torch.float16).min).half(),
        "classes": classes.to(torch.int16 if logits.shape[-1] <= 2**15 else torch.int32),
        "rest": rest,
    }


def spread(values: Tensor, classes: Tensor, rest: Tensor, count: int) -> Tensor:
    """Logits ``(…, count)`` in which the classes that were not kept share the rest evenly."""
    others = rest - math.log(count - values.shape[-1])
    logits = others.unsqueeze(-1).expand(*others.shape, count).clone()
    return logits.scatter_(-1, classes.long(), values.float())


def checks_of(target: Any, samples: int) -> list[int] | None:
    """A checksum of each sample's target; ``None`` where it is not integers, one row a sample."""
    if not isinstance(target, Tensor) or target.is_floating_point() or target.is_complex():
        return None
    if target.ndim == 0 or len(target) != samples:
        return None
    rows = target.detach().to("cpu", torch.int64).reshape(samples, -1)
    return [crc32(row.numpy().tobytes()) or 1 for row in rows]


def _sent(rows: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":  # from pinned memory the host need not wait for the copy
        rows = rows.pin_memory()
    return rows.to(device, non_blocking=True)
