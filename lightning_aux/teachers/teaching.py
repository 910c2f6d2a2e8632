"""``teach``: a model's logits for every sample of its training dataset, written to disk once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_aux.engine import AuxiliaryError, Locations, Pass, Record
from lightning_aux.engine.capture import Capture, apart
from lightning_aux.engine.model_call import ModelCall
from lightning_aux.engine.patches import Patches
from lightning_aux.engine.replay import Unobserved
from lightning_aux.engine.step import Call
from lightning_aux.taps import Taps
from lightning_aux.teachers.frozen import digest_of
from lightning_aux.teachers.storage import LogitsWriter, Storage, checks_of

__all__ = ["teach"]


def teach(
    trainer: Any,
    module: Any,
    data: Any = None,
    out: str | Path = "teacher",
    *,
    ckpt_path: str | Path | None = None,
    storage: Storage = "float16",
    k: int | None = None,
    dim: int = -1,
    batch_size: int | None = None,
) -> Path:
    """Write the logits of ``module`` for the training dataset, for `StoredTeacher` to read.

    The model runs as ``trainer.predict`` runs it (device, precision, hooks of the transfer of
    batches, progress bar, weights of ``ckpt_path``; `EMAWeights` among the callbacks gives it the
    average), in evaluation mode, once over the dataset in its order. Its logits are found as in
    training: by the user's ``training_step``, and the `Taps` among the Trainer's callbacks.

    Args:
        trainer: on one device.
        module: a LightningModule.
        data: a LightningDataModule, or a DataLoader over the training dataset, whose order and
            batch size do not matter. Default: ``module.train_dataloader()``.
        out: the folder to make.
        ckpt_path: a Lightning checkpoint of the module; read with ``weights_only=True``.
        storage: ``"float32"``, ``"float16"``, or ``"top-k"``: see `LogitsWriter`.
        k: of ``"top-k"``.
        dim: class dimension of the logits, for ``"top-k"``.
        batch_size: default: that of the training dataloader.

    Returns:
        The folder.

    Raises:
        AuxiliaryError: the data are no single map-style dataset, the model's logits are not found
            or not of one shape, they do not fit the storage, or ``out`` is there already.
    """
    if trainer.world_size > 1:
        raise AuxiliaryError(
            f"teach: the Trainer has {trainer.world_size} devices. Logits are written by one: "
            f"Trainer(devices=1, num_nodes=1)."
        )
    module = getattr(module, "_orig_mod", module)  # its graph may have no capture in it
    locations = next((e.locations for e in trainer.callbacks if isinstance(e, Taps)), Locations())
    patches, run = Patches(), _Run(module, locations)
    out, checkpoint = Path(out), None if ckpt_path is None else Path(ckpt_path)

    def samples(loader: Any) -> DataLoader[Any]:
        """The dataset of a training dataloader in its order."""
        in_order = _in_order(loader, batch_size)
        about = {
            "model": f"{type(module).__module__}.{type(module).__qualname__}",
            "checkpoint": digest_of(checkpoint) if checkpoint and checkpoint.is_file() else None,
            "dataset": type(in_order.dataset).__qualname__,
        }
        run.begin(out, in_order, about, storage, k, dim)
        return in_order

    if isinstance(data, LightningDataModule) or data is None:
        source = module if data is None else data

        def predict_dataloader() -> DataLoader[Any]:
            source.setup("fit")
            return samples(source.train_dataloader())

        patches.set(source, "predict_dataloader", predict_dataloader)
        given: dict[str, Any] = {"datamodule": data}
    else:
        given = {"dataloaders": samples(data)}
    try:
        patches.wrap(module, "predict_step", run.step)
        # What the model makes for itself and keeps may be in a graph later.
        patches.set(trainer.predict_loop, "inference_mode", False)
        run.capture.wrap_forward(patches)
        trainer.predict(
            module, **given, return_predictions=False, ckpt_path=ckpt_path, weights_only=True
        )
        run.writer.finish(**run.about)
    finally:
        run.stop()
        patches.undo()
    return out


class _Run:
    """The steps of one run over the dataset; an origin of passes, as the engine is in training."""

    writer: LogitsWriter
    about: dict[str, Any]

    def __init__(self, module: Any, locations: Locations) -> None:
        self._module = module
        self._locations = locations
        self._unobserved = Unobserved(module)
        self._warned = False
        self._watched = False
        self.capture = Capture(module)
        self.model_call = ModelCall(module, self.capture)

    def say(self, what: str, where: str) -> None:
        """Nothing: training says it."""

    def begin(
        self,
        out: Path,
        loader: DataLoader[Any],
        about: dict[str, Any],
        storage: Storage,
        k: int | None,
        dim: int,
    ) -> None:
        """Prepare to write the samples of ``loader``."""
        self.about = about
        self._samples: int = len(loader.dataset)  # type: ignore[arg-type]
        self._batch_size = loader.batch_size
        self.writer = LogitsWriter(out, self._samples, storage, k, dim)

    def stop(self) -> None:
        """Leave no hook, and no file that is not complete."""
        self._unobserved.restore()
        self.capture.clear()
        if hasattr(self, "writer"):
            self.writer.close()

    def step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> int:
        """In place of the user's ``predict_step``; how many samples are written."""
        if not self._watched:  # only now is the model complete
            self._watched = True
            self.capture.add(self._locations.module_paths(), "Taps")
            self.model_call.watch()
        record = Record(apart(batch), "student")
        device = self._module.device
        with self.capture.recording(record), self._unobserved.evaluated(device):
            before = torch.get_rng_state()
            self._call(batch, batch_idx, record)
            drawn = not torch.equal(before, torch.get_rng_state())
        if drawn and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"lightning_aux: teach: {type(self._module).__name__} draws random numbers also in "
                f"evaluation mode. If its training_step mixes or augments the batch, the logits "
                f"are those of other inputs than a student sees: say how the model runs, with "
                f"Taps(forward=lambda module, batch: ...)."
            )
        self.capture.settle(record)
        seen = Pass(self, record, self._locations, "teach")
        logits = seen.logits
        left = self._samples - self.writer.written
        expected = left if self._batch_size is None else min(self._batch_size, left)
        if len(logits) != expected:
            raise AuxiliaryError(
                f"teach: logits of shape {tuple(logits.shape)} for a batch of {expected} samples. "
                f"There must be one row for each: name them with Taps(logits=...)."
            )
        try:
            target: Tensor | None = seen.target
        except AuxiliaryError:  # none is known, and none is needed
            target = None
        self.writer.add(logits, checks_of(target, len(logits)))
        return self.writer.written

    def _call(self, batch: Any, batch_idx: int, record: Record) -> None:
        module, forward = self._module, self._locations.forward
        if forward is not None:
            record.calls[""] = [Call((), {}, forward(module, batch))]
            return
        name, step = type(module).__name__, module.training_step
        if not module.automatic_optimization:
            raise AuxiliaryError(
                f"teach: {name}.training_step steps its optimizers itself, so it cannot be run to "
                f"find the logits. Say how the model runs: Taps(forward=lambda module, batch: ...) "
                f"among the callbacks."
            )
        if is_param_in_hook_signature(step, "batch_idx", min_args=2):
            step(batch, batch_idx)
        else:
            step(batch)


def _in_order(loader: Any, batch_size: int | None) -> DataLoader[Any]:
    """The dataset of ``loader`` in its order, every sample once."""
    if not isinstance(loader, DataLoader):
        raise AuxiliaryError(
            f"teach: the training dataloader is a {type(loader).__name__}. Logits are stored for "
            f"one torch DataLoader over a map-style dataset (with __getitem__ and __len__)."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise AuxiliaryError(
            f"teach: the training dataset {type(loader.dataset).__name__} is iterable, and has no "
            f"index to store logits by. Use a map-style dataset (with __getitem__ and __len__)."
        )
    theirs = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    return DataLoader(
        loader.dataset,
        batch_size=batch_size or theirs or 1,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
    )
