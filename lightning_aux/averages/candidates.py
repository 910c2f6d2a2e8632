"""``Candidates``: the score of other weights on the user's validation data, leaving no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import islice
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_aux.engine import AuxiliaryError
from lightning_aux.engine.taps import plain_path
from lightning_aux.weights import WeightStore, recompute_batch_norm
from lightning_aux.weights.files import Weights

__all__ = ["Candidates", "check_validation"]


class Candidates:
    """Runs the Trainer's own validation loop with other weights in the module.

    Neither loggers nor other callbacks see it (a progress bar does), and metrics, progress and
    weights are as before when it is over. Every process evaluates; the score is their mean.

    Args:
        trainer: in ``on_train_end``.
        module: that it trains.
        monitor: a metric that ``validation_step`` logs.
        batch_norm: ``"recompute"`` measures running statistics on the training data for each
            candidate first.
        asked_by: begins the message of an error.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        monitor: str,
        batch_norm: Literal["average", "recompute"],
        asked_by: str,
    ) -> None:
        self._trainer, self._module = trainer, module
        self._monitor, self._asked_by = monitor, asked_by
        self._recomputes = batch_norm == "recompute"
        self._store = WeightStore(module)

    def close(self) -> None:
        """Put back what Ctrl-C has left, and let go of the module."""
        self._store.restore()
        self._store.close()

    def score(self, weights: Weights) -> float:
        """The monitored metric of ``weights``, by name.

        Raises:
            AuxiliaryError: they do not fit the module, or nothing of that name was logged.
        """
        named = {plain_path(name): value for name, value in weights.items()}
        self._store.load_state_dict(named, self._asked_by)
        with isolate_rng(), self._store.in_place(evaluating=True):
            if self._recomputes:
                self._measure()
            metrics = self._validated()
        if self._monitor not in metrics:
            raise AuxiliaryError(
                f"{self._asked_by}: monitor={self._monitor!r} was not logged in validation. Logged "
                f"were {', '.join(map(repr, metrics)) or 'no metrics'}."
            )
        value = torch.as_tensor(metrics[self._monitor], device=self._trainer.strategy.root_device)
        return float(self._trainer.strategy.reduce(value.float(), reduce_op="mean"))

    def latest(self) -> Weights:
        """The weights of the last `score`, with the statistics that were measured for them."""
        return self._store.state_dict()

    def _measure(self) -> None:
        module, strategy = self._module, self._trainer.strategy

        def run(batch: Any) -> Any:
            batch = strategy.batch_to_device(batch)
            return module(batch[0] if isinstance(batch, list | tuple) else batch)

        def batches() -> Iterator[Any]:  # begun where random numbers are set aside
            yield from islice(
                self._trainer.train_dataloader, int(self._trainer.num_training_batches)
            )

        recompute_batch_norm(module, batches(), run, progress=False)

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
