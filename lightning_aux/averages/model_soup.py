"""``ModelSoup``: the mean of several checkpoints, made when training ends."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lightning_aux.averages.candidates import Candidates, check_validation
from lightning_aux.averages.folder import folder_of
from lightning_aux.engine import Attached, AuxiliaryError, Engine
from lightning_aux.weights import Soup, greedy_soup, uniform_soup
from lightning_aux.weights.files import read_checkpoint, weights_in, write_checkpoint

__all__ = ["ModelSoup"]


class ModelSoup(Attached):
    """Averages the weights of checkpoints when training ends, and writes a plain checkpoint.

    Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves
    accuracy without increasing inference time", arXiv:2203.05482. A member of a soup belongs to
    the same pre-trained weights as the others: those of one run, or runs from one beginning. The
    files are read tensor by tensor, never all into memory. The live weights are not changed:
    ``trainer.test(model, ckpt_path=soup.path)`` tests the soup.

    Args:
        monitor: a metric of the validation, which a greedy soup is chosen by.
        mode: whether a ``"max"`` or ``"min"`` of it is better.
        kind: ``"greedy"`` adds checkpoints as long as the metric gets no worse (recipe 1 of the
            paper), ``"uniform"`` takes all.
        checkpoints: paths or globs of checkpoints of other runs. Default: what the Trainer's
            `ModelCheckpoint` callbacks have kept of this one.
        batch_norm: ``"recompute"`` measures running statistics on the training data, for every
            candidate of a greedy soup; ``"average"`` averages them, which only suits a model
            without BatchNorm.
        filename: of the soup, in the folder of the checkpoints.
        name: unique name.

    Attributes:
        path: the file, once it is written.
        soup: the members and their scores.

    Raises:
        AuxiliaryError: an unknown kind or mode; before training, nothing to choose by, no
            checkpoints to come, or files that are not there; when training ends, fewer than two
            checkpoints, or such as do not fit together.
    """

    def __init__(
        self,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "max",
        kind: Literal["greedy", "uniform"] = "greedy",
        checkpoints: Sequence[str] | None = None,
        batch_norm: Literal["recompute", "average"] = "recompute",
        filename: str = "soup.ckpt",
        name: str = "model_soup",
    ) -> None:
        super().__init__(name)
        for key, value, known in (
            ("mode", mode, ("min", "max")),
            ("kind", kind, ("greedy", "uniform")),
            ("batch_norm", batch_norm, ("recompute", "average")),
        ):
            if value not in known:
                raise AuxiliaryError(
                    f"{name}: {key}={value!r} is unknown. Choose {' or '.join(map(repr, known))}."
                )
        if kind == "greedy" and monitor is None:
            raise AuxiliaryError(
                f"{name}: a greedy soup is chosen by a metric of the validation: give monitor=, or "
                f"kind='uniform'."
            )
        self.monitor = monitor
        self.mode: Literal["min", "max"] = mode
        self.kind = kind
        self.checkpoints = None if checkpoints is None else list(checkpoints)
        self.batch_norm: Literal["recompute", "average"] = batch_norm
        self.filename = filename
        self.path: Path | None = None
        self.soup: Soup | None = None

    def check(self, engine: Engine) -> None:
        if self.monitor is not None:
            check_validation(engine.trainer, self.name)
        if self.checkpoints is not None:
            self._given()
        elif not any(isinstance(each, ModelCheckpoint) for each in engine.trainer.callbacks):
            raise AuxiliaryError(
                f"{self.name}: no ModelCheckpoint among the Trainer's callbacks, so this run will "
                f"leave nothing to average. Add ModelCheckpoint(save_top_k=5, monitor=...), or "
                f"name files with checkpoints=."
            )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        paths = self._given() if self.checkpoints is not None else _kept(trainer)
        if len(paths) < 2:
            raise AuxiliaryError(
                f"{self.name}: a soup is made of at least two checkpoints, not of {len(paths)}. "
                f"ModelCheckpoint(save_top_k=...) keeps more; nothing that was trained is lost."
            )
        out = folder_of(trainer) / self.filename
        candidates = Candidates(trainer, pl_module, self.monitor or "", self.batch_norm, self.name)
        try:
            self.soup = self._made(trainer, paths, out, candidates)
        finally:
            candidates.close()
        trainer.strategy.barrier(self.name)
        self.path = out
        members = f"{len(self.soup.members)} of {len(paths)} checkpoints"
        scored = f", {self.monitor} {self.soup.score:.4g}" if self.monitor else ""
        rank_zero_info(f"lightning_aux: {self.name} = {members}{scored}, in {out}")

    def _made(self, trainer: Any, paths: list[str], out: Path, candidates: Candidates) -> Soup:
        # Every process makes the soup, since all of them evaluate it; the first one's file stays.
        own = out if trainer.is_global_zero else out.with_suffix(f".{trainer.global_rank}.part")
        try:
            if self.kind == "greedy":
                soup = greedy_soup(paths, candidates.score, own, self.mode)
            else:
                uniform_soup(paths, own)
                soup = Soup(list(paths), {}, float("nan"))
            written = read_checkpoint(own, self.name)
            if self.monitor is not None:
                soup = Soup(
                    soup.members, soup.scores, candidates.score(weights_in(written, self.name))
                )
                measured = candidates.latest()  # of sharded weights all processes gather
                if self.batch_norm == "recompute" and trainer.is_global_zero:
                    write_checkpoint(written, measured, out)
            return soup
        finally:
            if own != out:
                own.unlink(missing_ok=True)

    def _given(self) -> list[str]:
        found = []
        for pattern in self.checkpoints or ():
            matches = sorted(glob.glob(pattern))
            if not matches:
                raise AuxiliaryError(
                    f"{self.name}: checkpoints={pattern!r} matches no file (looked in "
                    f"{Path.cwd()})."
                )
            found += matches
        return list(dict.fromkeys(found))


def _kept(trainer: Any) -> list[str]:
    """What the Trainer's callbacks have kept, each file once."""
    paths = []
    for each in trainer.callbacks:
        if isinstance(each, ModelCheckpoint):
            paths += [*each.best_k_models, each.best_model_path, each.last_model_path]
    files = [path for path in dict.fromkeys(paths) if path and Path(path).is_file()]
    return list({Path(path).resolve(): path for path in files}.values())
