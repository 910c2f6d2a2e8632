"""``Candidates``: other weights in the module when training ends, leaving no trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_aux.engine import Attached, AuxiliaryError, Engine, Progress
from lightning_aux.engine.taps import plain_path
from lightning_aux.weights import WeightStore, recompute_batch_norm
from lightning_aux.weights.batch_norm import as_in_training, measured_norms
from lightning_aux.weights.files import Weights

__all__ = ["AfterTraining", "Candidates", "check_validation"]


class AfterTraining(Attached):
    """The base of what makes other weights when training ends.

    Args:
        name: unique name.
        batch_norm: ``"recompute"`` measures the running statistics of those BatchNorm layers that
            were in training mode in the last training step; the others were frozen, and stay.
    """

    def __init__(self, name: str, batch_norm: Literal["recompute", "average"]) -> None:
        super().__init__(name)
        if batch_norm not in ("recompute", "average"):
            raise AuxiliaryError(
                f"{name}: batch_norm={batch_norm!r} is unknown. Choose 'recompute' or 'average'."
            )
        self.batch_norm: Literal["recompute", "average"] = batch_norm
        self._norms: dict[str, nn.Module] = {}
        self._modes: list[bool] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_norms": {}, "_modes": []}

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        measured = measured_norms(engine.module) if self.batch_norm == "recompute" else {}
        self._norms, self._modes = dict(measured), [each.training for each in measured.values()]

    def after_optimizer_step(self, now: Progress) -> None:
        self._modes = [each.training for each in self._norms.values()]

    def stop(self) -> None:
        self._norms, self._modes = {}, []

    @contextmanager
    def candidates(self, trainer: Any, module: Any) -> Iterator[Candidates]:
        """Other weights in ``module`` for the time of a ``with`` block in ``on_train_end``."""
        frozen = [name for name, mode in zip(self._norms, self._modes, strict=True) if not mode]
        if frozen:
            rank_zero_info(
                f"lightning_aux: {self.name} does not measure {', '.join(map(repr, frozen[:5]))}"
                f"{' and more' if frozen[5:] else ''}: evaluation mode while training, so "
                f"statistics stay as the checkpoints have them."
            )
        norms = [each for name, each in self._norms.items() if name not in frozen]
        forward = self.engine.locations.forward
        made = Candidates(trainer, module, norms, forward, self.name)
        try:
            yield made
        finally:
            made.close()


class Candidates:
    """Evaluates other weights, by the Trainer's own validation loop.

    Neither loggers nor other callbacks see it (a progress bar does), and metrics, progress and
    weights are as before when it is over. Every process evaluates; a score is their mean.

    Args:
        trainer: in ``on_train_end``.
        module: that it trains.
        norms: whose running statistics are measured on the training data, for each candidate.
        forward: how the module runs on a batch, see `Taps`. Default: its ``training_step``.
        asked_by: begins the message of an error.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        norms: Sequence[nn.Module],
        forward: Callable[[Any, Any], Any] | None,
        asked_by: str,
    ) -> None:
        self._trainer, self._module = trainer, module
        self._norms, self._forward, self._asked_by = list(norms), forward, asked_by
        self._store = WeightStore(module)

    def close(self) -> None:
        """Put back what Ctrl-C has left, and let go of the module."""
        self._store.restore()
        self._store.close()

    @property
    def measures(self) -> bool:
        """Whether there are running statistics to measure."""
        return bool(self._norms)

    def score(self, weights: Weights, monitor: str) -> float:
        """The metric ``monitor`` of ``weights``, by name.

        Raises:
            AuxiliaryError: they do not fit the module, or nothing of that name was logged.
        """
        with self._in_place(weights):
            metrics = self._validated()
        if monitor not in metrics:
            raise AuxiliaryError(
                f"{self._asked_by}: monitor={monitor!r} was not logged in validation. Logged "
                f"were {', '.join(map(repr, metrics)) or 'no metrics'}."
            )
        value = torch.as_tensor(metrics[monitor], device=self._trainer.strategy.root_device)
        return float(self._trainer.strategy.reduce(value.float(), reduce_op="mean"))

    def measured(self, weights: Weights) -> Weights:
        """``weights``, by plain names, with the running statistics that are measured for them."""
        statistics, measured = {}, set(map(id, self._norms))  # a Metric is equal to anything
        with self._in_place(weights):
            for name, norm in self._module.named_modules(remove_duplicate=False):
                for key in ("running_mean", "running_var") if id(norm) in measured else ():
                    statistics[plain_path(f"{name}.{key}")] = getattr(norm, key).clone()
        return {plain_path(name): value for name, value in weights.items()} | statistics

    @contextmanager
    def _in_place(self, weights: Weights) -> Iterator[None]:
        named = {plain_path(name): value for name, value in weights.items()}
        self._store.load_state_dict(named, self._asked_by)
        with isolate_rng(), self._store.in_place():  # what is written is dropped
            if self._norms:
                self._measure()
            yield

    def _measure(self) -> None:
        trainer, module = self._trainer, self._module
        loader, total = trainer.fit_loop._combined_loader, trainer.num_training_batches
        # A stream without an end: as many as the last epoch had.
        total = int(total) if math.isfinite(total) else trainer.fit_loop.epoch_loop.batch_idx + 1

        def batches() -> Iterator[Any]:  # begun where random numbers are set aside
            for batch, _, _ in CombinedLoader(loader.iterables, loader._mode):
                yield batch

        bar = trainer.progress_bar_callback
        try:
            recompute_batch_norm(
                module,
                batches(),
                as_in_training(trainer, module, self._forward),
                progress=trainer.is_global_zero and bool(getattr(bar, "is_enabled", bar)),
                total=total,
                norms=self._norms,
            )
        except Exception as error:  # what took a training to make is not given up for this
            self._norms = []
            rank_zero_warn(
                f"lightning_aux: {self._asked_by}: running the model on the training data for "
                f"BatchNorm's statistics ended with {type(error).__name__}: {error}. They are "
                f"averaged instead, which no longer fits the weights. Say how the model runs with "
                f"Taps(forward=lambda module, batch: ...) among the callbacks, or measure them in "
                f"the file with lightning_aux.weights.recompute_batch_norm."
            )

    def _validated(self) -> dict[str, Any]:
        trainer, connector = self._trainer, self._trainer._logger_connector
        loop = trainer.fit_loop.epoch_loop.val_loop
        shown, loggers = trainer.callbacks, trainer.loggers
        metrics = [dict(each) for each in _metrics(connector)]
        progress, first = deepcopy(loop.batch_progress), connector._first_loop_iter
        modes = [(each, each.training) for each in self._module.modules()]
        try:
            trainer.callbacks = [each for each in shown if isinstance(each, ProgressBar)]
            trainer.loggers = []
            trainer.validating = True
            # Past whoever has wrapped it on the instance (`EMAWeights` would put its own weights
            # in place of these).
            run: Callable[[Any], Any] = type(loop).run
            run(loop)
            return dict(trainer.callback_metrics)
        finally:
            trainer.training = True
            trainer.callbacks, trainer.loggers = shown, loggers
            connector._first_loop_iter = first
            loop.batch_progress = progress
            for held, before in zip(_metrics(connector), metrics, strict=True):
                held.clear()
                held.update(before)
            for each, training in modes:
                each.training = training


def check_validation(trainer: Any, asked_by: str) -> None:
    """Refuse a fit that has no validation to choose by.

    Raises:
        AuxiliaryError: no ``validation_step``, or no batches.
    """
    if not trainer.enable_validation:
        raise AuxiliaryError(
            f"{asked_by}: there is no validation to choose by: it needs validation_step, a "
            f"validation dataloader and limit_val_batches above 0."
        )


def _metrics(connector: Any) -> list[dict[str, Any]]:
    return [connector._callback_metrics, connector._logged_metrics, connector._progress_bar_metrics]
