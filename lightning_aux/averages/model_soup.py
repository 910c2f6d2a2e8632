"""``ModelSoup``: the mean of several checkpoints, made when training ends."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lightning_aux.averages.candidates import AfterTraining, Candidates, check_validation
from lightning_aux.averages.folder import folder_of
from lightning_aux.engine import AuxiliaryError, Engine, Progress
from lightning_aux.weights import Soup, greedy_soup, uniform_soup
from lightning_aux.weights.files import read_checkpoint, weights_in, write_checkpoint

__all__ = ["ModelSoup"]


class ModelSoup(AfterTraining):
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
            `ModelCheckpoint` callbacks have kept of this one, each optimizer step once
            (``last.ckpt`` is mostly a second file of the newest).
        batch_norm: ``"recompute"`` measures running statistics on the training data, for the soup
            and for every candidate of a greedy one; ``"average"`` averages them, which only suits
            a model without BatchNorm. What runs is ``training_step``, without gradient and
            logging; with several parts or in manual optimisation give ``Taps(forward=...)``.
            Layers that were in evaluation mode while training (frozen) are left out; where the
            model cannot be run, statistics are averaged, with a warning.
        filename: of the soup, in the folder of the checkpoints.
        name: unique name.

    Attributes:
        path: the file, once it is written.
        soup: the members and their scores.

    Raises:
        AuxiliaryError: an unknown kind or mode; before training, nothing to choose by, fewer than
            two checkpoints to come, or files that are not there; when training ends, fewer than
            two checkpoints, such as do not fit together, or no score that is a number.
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
        super().__init__(name, batch_norm)
        for key, value, known in (
            ("mode", mode, ("min", "max")),
            ("kind", kind, ("greedy", "uniform")),
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
        self.filename = filename
        self.path: Path | None = None
        self.soup: Soup | None = None
        self._written: dict[str, None] = {}  # in order

    def check(self, engine: Engine) -> None:
        if self.monitor is not None:
            check_validation(engine.trainer, self.name)
        if self.checkpoints is not None:
            self._given()
        else:
            self._check_capacity(_checkpointing(engine.trainer))

    def _check_capacity(self, callbacks: Sequence[ModelCheckpoint]) -> None:
        if not callbacks:
            raise AuxiliaryError(
                f"{self.name}: no ModelCheckpoint among the Trainer's callbacks, so this run will "
                f"leave nothing to average. Add ModelCheckpoint(save_top_k=5, monitor=...), or "
                f"name files with checkpoints=."
            )
        if sum(map(_kept_at_most, callbacks)) < 2:
            said = ", ".join(
                f"ModelCheckpoint(save_top_k={each.save_top_k}, monitor={each.monitor!r})"
                for each in callbacks
            )
            raise AuxiliaryError(
                f"{self.name}: {said} keeps fewer than the two checkpoints that a soup is made of. "
                f"Give it save_top_k=5 and a monitor, or save_top_k=-1 to keep all, or name files "
                f"with checkpoints=."
            )

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        super().start(engine, state)
        self._written = dict.fromkeys((state or {}).get("written", ()))

    def before_step(self, now: Progress) -> None:
        self._note()

    def state(self) -> dict[str, Any]:
        if self._engine is not None:
            self._note()
        return {"written": list(self._written)}

    def _note(self) -> None:
        """Without a monitor ModelCheckpoint itself remembers no file but the newest."""
        for each in _checkpointing(self.engine.trainer):
            if each.monitor is None and each.best_model_path:
                self._written[each.best_model_path] = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._note()
        given = self.checkpoints is not None
        paths = self._given() if given else _kept(trainer, self._written, self.name)
        if len(paths) < 2:
            raise AuxiliaryError(
                f"{self.name}: a soup is made of at least two checkpoints, not of {len(paths)}. "
                f"ModelCheckpoint(save_top_k=...) keeps more; nothing that was trained is lost."
            )
        out = folder_of(trainer) / self.filename
        with self.candidates(trainer, pl_module) as candidates:
            self.soup = self._made(trainer, paths, out, candidates)
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
                assert self.monitor is not None, "checked when it was made"
                score = partial(candidates.score, monitor=self.monitor)
                soup = greedy_soup(paths, score, own, self.mode)
            else:
                uniform_soup(paths, own)
                soup = Soup(list(paths), {}, float("nan"))
            written = read_checkpoint(own, self.name)
            weights = weights_in(written, self.name)
            if candidates.measures:
                measured = candidates.measured(weights)  # of sharded ones all processes gather
                if trainer.is_global_zero:
                    write_checkpoint(written, measured, out)
            if self.kind == "uniform" and self.monitor is not None:
                soup = Soup(soup.members, {}, candidates.score(weights, self.monitor))
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


def _checkpointing(trainer: Any) -> list[ModelCheckpoint]:
    return [each for each in trainer.callbacks if isinstance(each, ModelCheckpoint)]


def _kept_at_most(callback: ModelCheckpoint) -> int:
    """How many different weights ``callback`` can have in files when training ends."""
    if callback.save_top_k == -1:
        return 2  # or more
    if callback.monitor is None:  # what it has as the last one is the newest anyway
        return 1 if callback.save_top_k or callback.save_last else 0
    return callback.save_top_k + bool(callback.save_last)


def _kept(trainer: Any, written: Iterable[str], asked_by: str) -> list[str]:
    """What the Trainer's callbacks have kept, one file for each optimizer step."""
    paths = list(written)
    for each in _checkpointing(trainer):
        paths += [*each.best_k_models, each.best_model_path, each.last_model_path]
    kept: dict[Any, str] = {}
    for path in dict.fromkeys(paths):
        if path and Path(path).exists():
            step = read_checkpoint(path, asked_by).get("global_step", path)
            kept.setdefault(step, path)
    return list(kept.values())
