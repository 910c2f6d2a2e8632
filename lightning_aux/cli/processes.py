"""Trains runs in processes of their own on this machine, one at a time or several at once."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from lightning_aux.cli.progress import RunProgress
from lightning_aux.cli.training_run import TrainingRun
from lightning_aux.comparison import LOG_FILE, RunResult

PATIENCE = 10.0  # seconds between asking processes to end and ending them
_SECONDS_BETWEEN_REPORTS = 0.2
_LAST_LINES = 60


@dataclass(frozen=True)
class _Running:
    run: TrainingRun
    slot: int
    process: BaseProcess
    reports: Connection
    started: float


def train_in_processes(
    runs: Sequence[TrainingRun], at_once: int, progress: RunProgress
) -> Generator[RunResult, None, None]:
    """Train every run in a process of its own, `at_once` of them at any time.

    A process that crashes or is killed is a failed run. Closing the iterator ends all processes.

    Args:
        runs: What to train, in this order.
        at_once: How many at a time. Above one each gets its share of the cores, unless
            `OMP_NUM_THREADS` says how many threads, and where there are several CUDA devices one
            of these.
        progress: Told which runs begin and how far they are.

    Yields:
        Results as the runs end, each of them kept in its run's directory already.
    """
    context = _context()
    waiting, running, devices = deque(runs), list[_Running](), _cuda_devices()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                slot = min(set(range(at_once)) - {each.slot for each in running})
                environment, threads = dict(os.environ), None
                if at_once > 1:
                    if len(devices) > 1:
                        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
                    if "OMP_NUM_THREADS" not in environment:
                        threads = max(1, _cores() // at_once)
                running.append(_start(context, waiting.popleft(), slot, environment, threads))
                progress.start(running[-1].run)
            sentinels = [each.process.sentinel for each in running]
            ready = wait([*sentinels, *_open(running)])
            for each in [each for each in running if each.reports in ready]:
                _pass_on(each, progress)
            for each in [each for each in running if each.process.sentinel in ready]:
                running.remove(each)
                yield _outcome(each)
    finally:
        _end(running)


def _context() -> multiprocessing.context.BaseContext:
    """Children of a server that has imported what every run needs, where there can be one."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _start(
    context: multiprocessing.context.BaseContext,
    run: TrainingRun,
    slot: int,
    environment: dict[str, str],
    threads: int | None,
) -> _Running:
    run.clear()
    reports, channel = context.Pipe(duplex=False)
    process = context.Process(  # type: ignore[attr-defined]
        target=_train,
        args=(run, channel, environment, threads, multiprocessing.get_start_method(True)),
    )
    process.start()
    channel.close()
    return _Running(run, slot, process, reports, time.monotonic())


def _train(
    run: TrainingRun,
    channel: Connection,
    environment: Mapping[str, str],
    threads: int | None,
    start_method: str | None,
) -> None:
    """What the process of a run does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which ends its runs
    os.environ.clear()
    os.environ.update(environment)  # the server that this process comes from has an older one
    # loader workers start as they would without us, not as this process did
    multiprocessing.set_start_method(start_method, force=True)
    log = os.open(run.directory / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    if threads is not None:
        torch.set_num_threads(threads)
    reported = 0.0

    def report(epoch: int, epochs: int, fraction: float) -> None:
        nonlocal reported
        if time.monotonic() - reported > _SECONDS_BETWEEN_REPORTS:
            reported = time.monotonic()
            try:
                channel.send((epoch, epochs, fraction))
            except OSError:
                sys.exit("The command that started this run is gone.")

    run.train(report)


def _open(running: Sequence[_Running]) -> list[Connection]:
    return [each.reports for each in running if not each.reports.closed]


def _pass_on(each: _Running, progress: RunProgress) -> None:
    try:
        progress.update(each.run, *each.reports.recv())
    except EOFError:
        each.reports.close()


def _outcome(ended: _Running) -> RunResult:
    ended.process.join()
    ended.reports.close()
    result = ended.run.result()
    if result is None:
        log = ended.run.directory / LOG_FILE
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        last = "\n".join(lines[-_LAST_LINES:])
        return ended.run.lost(
            _said(ended.process.exitcode),
            f"The end of {log}:\n{last}\n",
            time.monotonic() - ended.started,
        )
    return result


def _said(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"the process ended with status {exit_code} and left no result"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    memory = " (as happens when memory runs out)" if name == "SIGKILL" else ""
    return f"the process was ended by {name}{memory}"


def _end(running: Sequence[_Running]) -> None:
    """End processes: first so that they can say goodbye to loggers, then at once."""
    for each in running:
        each.process.terminate()
    deadline = time.monotonic() + PATIENCE
    for each in running:
        each.process.join(max(0.0, deadline - time.monotonic()))
        if each.process.is_alive():
            each.process.kill()
            each.process.join()
        each.reports.close()


def _cores() -> int:
    with contextlib.suppress(AttributeError):  # not everywhere
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cuda_devices() -> list[str]:
    """How `CUDA_VISIBLE_DEVICES` calls each device that this process may use."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(index) for index in range(count)]
