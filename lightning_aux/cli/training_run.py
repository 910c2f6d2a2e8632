"""One run of a comparison: train and test one variant with one seed, and keep what it logged."""

from __future__ import annotations

import contextlib
import gc
import logging
import shutil
import signal
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_aux.cli.peak_memory import PeakMemory
from lightning_aux.cli.trainer_cli import WANDB_LOGGER, AuxCLI, WandbMode
from lightning_aux.comparison import (
    ERROR_FILE,
    JOB_FILE,
    LOG_FILE,
    RunResult,
    Variant,
    read_result,
    write_result,
)

# The first batches of a run allocate memory and fill caches.
WARM_UP_BATCHES = 20
_LOGGERS = (
    *("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"),
    *("lightning_aux", "py.warnings"),
)

Watcher = Callable[[int, int, float], None]
"""Called with the epoch (from 0), the number of epochs (-1 when open) and the fraction done."""


@dataclass(frozen=True)
class TrainingRun:
    """One variant with one seed, which any process can train.

    Attributes:
        variant: What to train.
        seed: Seeds everything right before the objects are made, and again at every epoch.
        directory: Gets config, log, metrics and the result.
        wandb: Whether the run is logged to Weights & Biases too.
        alone: Whether no other run of the comparison goes on beside it.
    """

    variant: Variant
    seed: int
    directory: Path
    wandb: WandbMode = "off"
    alone: bool = True

    @property
    def fingerprint(self) -> str:
        """Digest of everything in the config that can change the outcome."""
        return self.variant.fingerprint(self.seed)

    def result(self) -> RunResult | None:
        """What is in `result.json`, of this very config; None where there is nothing yet."""
        result = read_result(self.directory)
        return result if result and result.fingerprint == self.fingerprint else None

    def clear(self) -> None:
        """Make the directory, or leave nothing in it but the record of the job that trains."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for entry in self.directory.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != JOB_FILE:
                entry.unlink()

    def train(self, watch: Watcher = lambda epoch, epochs, fraction: None) -> RunResult:
        """Train and test, from nothing, in this process.

        An exception of the run is kept in `error.txt` and in the result, not raised.

        Args:
            watch: Told about the run's progress.

        Returns:
            The result, which is in `result.json` too.

        Raises:
            KeyboardInterrupt: When the user interrupts.
        """
        result = RunResult(self.variant.name, self.seed, self.fingerprint, alone=self.alone)
        start = time.perf_counter()
        with _log_to(self.directory / LOG_FILE), _interrupts_kept():
            failure: str | None = "interrupted"
            try:
                _fit_and_test(_config(self), self.seed, result, watch)
                failure = None
            except Exception as error:
                cause = " ".join(str(error).split())
                failure = result.error = f"{type(error).__name__}: {cause}"
                (self.directory / ERROR_FILE).write_text(traceback.format_exc())
            finally:
                _finish_wandb(failure)
                gc.collect()
        result.seconds = time.perf_counter() - start
        write_result(self.directory, result)
        return result

    def lost(self, error: str, details: str, seconds: float = 0.0) -> RunResult:
        """Keep that the run's process ended before it could say what happened.

        Args:
            error: What ended it, in one line.
            details: What is known beyond, for `error.txt`.
            seconds: How long it ran.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / ERROR_FILE).write_text(f"{error}\n\n{details}")
        result = RunResult(self.variant.name, self.seed, self.fingerprint, alone=self.alone)
        result.error, result.seconds = error, seconds
        write_result(self.directory, result)
        return result


def _fit_and_test(config: dict[str, Any], seed: int, result: RunResult, watch: Watcher) -> None:
    cli = _MeasuredCLI(args=config, run=False, exit_on_error=False)
    trainer, model, data = cli.trainer, cli.model, cli.datamodule
    if trainer.world_size > 1:
        raise RuntimeError("compare trains every run in one process: set trainer.devices to 1.")
    for logger in trainer.loggers:  # what fails before training begins has a run of W&B too
        getattr(logger, "experiment", None)
    recorder, timer = _Recorder(result, watch), StepTimer()
    # the timer's two halves enclose the hooks of every other callback
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    callbacks[:] = [timer, *callbacks, timer.end, recorder, EpochSeed(seed)]
    device = trainer.strategy.root_device
    result.device = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    trainer.fit(model, datamodule=data)
    result.step_seconds = timer.median()
    result.peak_bytes = cli.memory.read(device)
    if is_overridden("test_step", model):
        tested = trainer.test(model, datamodule=data, verbose=False)
        for metrics in tested:
            result.metrics.update(metrics)


class _MeasuredCLI(AuxCLI):
    """Measures memory from where the classes are imported and nothing is made yet."""

    def instantiate_classes(self) -> None:
        self.memory = PeakMemory()
        super().instantiate_classes()


def _config(run: TrainingRun) -> dict[str, Any]:
    """The variant's config with the seed, and with loggers and folders of this run."""
    trainer, where = dict(run.variant.config["trainer"]), str(run.directory)
    config = {**run.variant.config, "trainer": trainer, "seed_everything": run.seed}
    csv = {"save_dir": where, "name": "", "version": ""}
    loggers = [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": csv}]
    if run.wandb != "off":
        group = {"project": "lightning-aux", "group": run.directory.parents[2].name}
        name = {"name": f"{run.variant.name}-seed{run.seed}", "save_dir": where}
        which = {"config": {"compare": {"variant": run.variant.name, "seed": run.seed}}}
        loggers.append({"class_path": WANDB_LOGGER, "init_args": {**group, **name, **which}})
        config["wandb"] = run.wandb
    trainer.update(logger=loggers, default_root_dir=where)
    return config


class EpochSeed(Callback):
    """Start every epoch from a random state that depends on the seed and the epoch alone.

    Seeding once is not enough for paired runs: a variant that draws random numbers (dropout, the
    initial values of a head) moves the generator that shuffles the data, and from then on sees
    other batches than the baseline.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before `configure_model`, which may make parameters."""
        self._reseed(0)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first loader starts its workers."""
        self._reseed(0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first batch is drawn."""
        self._reseed(trainer.current_epoch)

    def _reseed(self, epoch: int) -> None:
        seed_everything((self.seed * 1_000_003 + epoch) % 2**32, workers=True, verbose=False)


class StepTimer(Callback):
    """Time from `on_train_batch_start` to `on_train_batch_end` of each batch, data loading apart.

    It covers forward, backward, optimizer and the hooks of all callbacks listed between the timer
    and its `end`. Loading the batch is outside, because it is the same for all variants. On CUDA
    the device is waited for on both sides. The median ignores batches that something else on the
    machine held up; it also ignores work done in less than half of the steps.
    """

    def __init__(self) -> None:
        self.end = _StepEnd(self)
        self.started: float | None = None
        self.seconds: list[float] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        self.started = _now(pl_module)

    def median(self) -> float | None:
        """Median in seconds without the warm-up, None when nothing is left of it."""
        steady = self.seconds[WARM_UP_BATCHES:]
        return statistics.median(steady) if steady else None


class _StepEnd(Checkpoint):
    """The second half of the timer.

    Lightning keeps checkpoint callbacks at the end of the list, after those that the module adds.
    """

    def __init__(self, timer: StepTimer) -> None:
        self.timer = timer

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.timer.started is not None:
            self.timer.seconds.append(_now(pl_module) - self.timer.started)


def _now(module: LightningModule) -> float:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return time.perf_counter()


class _Recorder(Checkpoint):
    """Keeps what is logged per epoch and tells how far the run is.

    For Lightning it is a checkpoint callback: only those see what the module logs in its own
    `on_train_epoch_end`.
    """

    def __init__(self, result: RunResult, watch: Watcher) -> None:
        self.result = result
        self.watch = watch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps = trainer.estimated_stepping_batches
        fraction = trainer.global_step / steps if 0 < steps < float("inf") else 0.0
        self.watch(trainer.current_epoch, trainer.max_epochs or -1, min(fraction, 1.0))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.result.history.append({"epoch": trainer.current_epoch, **logged})
        self.result.metrics.update(logged)


@contextlib.contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Let Ctrl-C arrive as KeyboardInterrupt, also out of `Trainer.fit`.

    Lightning turns it into `sys.exit(1)` and leaves the process deaf to SIGINT.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Send what Lightning, this package and `warnings` have to say to a file, not the terminal."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.captureWarnings(True)
    try:
        with warnings.catch_warnings():
            for logger in loggers:
                logger.handlers, logger.propagate = [handler], False
                logger.setLevel(logging.INFO)
            yield
    finally:
        logging.captureWarnings(False)
        for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
        handler.close()


def _finish_wandb(failure: str | None) -> None:
    """Close the run of Weights & Biases, if there is one: the next logger would go on in it.

    Args:
        failure: What ended the run too early: its state is then "failed", and this in its summary.
    """
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is None:
        return
    if failure is not None:
        run.summary["error"] = failure
    run.finish(exit_code=0 if failure is None else 1)
