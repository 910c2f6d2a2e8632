"""Trains runs as jobs of a cluster, through submitit; what a run has to say is in its directory."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from lightning_aux.cli.progress import RunProgress
from lightning_aux.cli.training_run import TrainingRun
from lightning_aux.comparison import JOB_FILE, ComparisonError, RunResult, finished_result

ClusterName = Literal["slurm", "local", "debug"]
SECONDS_BETWEEN_LOOKS = 1.0
PATIENCE = 120.0  # seconds that a cancelled job may take to end; Slurm kills after 30
_UNKNOWN = f"Delete the {JOB_FILE} of a run whose job is known to have ended."
_JOBS = {"slurm": submitit.SlurmJob, "local": submitit.LocalJob}
# Nobody else needs the slots of this machine; submitit's own two minutes would end real runs.
_LOCAL_MINUTES = 7 * 24 * 60


class Cluster:
    """Where jobs go, and the record of those that are there.

    Args:
        name: `"slurm"`; `"local"` for processes of this machine, all at once; `"debug"` for this
            very process.
        settings: Parameters of `submitit.AutoExecutor`.
        folder: Gets submitit's scripts and what jobs print; must be on a file system that the nodes
            share.

    Raises:
        ComparisonError: When there is no such cluster here, or a setting is wrong.
    """

    def __init__(self, name: ClusterName, settings: Mapping[str, Any], folder: Path) -> None:
        self.name = name
        try:
            self.executor = submitit.AutoExecutor(folder=folder.resolve(), cluster=name)
            if name == "local":
                self.executor.update_parameters(timeout_min=_LOCAL_MINUTES)
            self.executor.update_parameters(**settings)
        except RuntimeError as error:
            raise ComparisonError(f"--cluster {name}: {error}") from error
        except (NameError, ValueError, AssertionError, TypeError) as error:
            raise ComparisonError(f"--cluster-set: {error}") from error
        if name == "slurm" and not {"timeout_min", "slurm_time"} & set(settings):
            raise ComparisonError(
                "--cluster slurm: say how many minutes a run may take, e.g. "
                "--cluster-set timeout_min=60; without it a job would be ended after five."
            )

    def train(
        self, runs: Sequence[TrainingRun], adopt: bool, progress: RunProgress
    ) -> Generator[RunResult, None, None]:
        """Submit what is not on the cluster yet, and wait for all of it.

        Jobs of Slurm go on when this is interrupted or closed; others are ended.

        Args:
            runs: What to train.
            adopt: Whether jobs that an earlier command submitted for these runs are waited for
                instead of submitting them again. If not, they are cancelled, as jobs always are
                whose run has another config by now.
            progress: Told about the states of the jobs.

        Yields:
            Results as the runs end.
        """
        jobs, new = list[tuple[TrainingRun, submitit.Job[None]]](), list[TrainingRun]()
        cancelled = list[tuple[TrainingRun, submitit.Job[None]]]()
        for run in runs:
            going_on = _job_of(run, self.executor.folder)
            if going_on is None:
                new.append(run)
            elif adopt and going_on.fingerprint == run.fingerprint:
                jobs.append((run, going_on.job))
            else:
                _cancel(self.name, going_on.job)
                cancelled.append((run, going_on.job))
                new.append(run)
        if jobs:
            progress.console.print(f"{_count(jobs)} still on the cluster: {_ids(jobs)}")
        self._see_end(cancelled, progress)
        jobs += self._submit(new, progress)
        try:
            while jobs:
                for run, job in list(jobs):
                    result = run.result() or self._outcome(run, job)
                    if result is not None:
                        jobs.remove((run, job))
                        yield result
                states = Counter(self._state(job) for _, job in jobs)
                progress.say(", ".join(f"{n} {state}" for state, n in sorted(states.items())))
                if jobs:
                    time.sleep(SECONDS_BETWEEN_LOOKS)
        except (KeyboardInterrupt, GeneratorExit):
            if self.name == "slurm":
                progress.console.print(
                    f"\n{_count(jobs)} left on the cluster. The same command"
                    f"{'' if adopt else ' without --fresh'} waits for them again, "
                    f"`scancel {' '.join(job.job_id for _, job in jobs)}` ends them."
                )
            else:
                for _, job in jobs:
                    _cancel(self.name, job)
            raise

    def _see_end(
        self, cancelled: Sequence[tuple[TrainingRun, submitit.Job[None]]], progress: RunProgress
    ) -> None:
        """Wait for jobs that could still write into the directories of their runs."""
        deadline = time.monotonic() + PATIENCE
        going_on = list(cancelled)
        while going_on := [each for each in going_on if not _ended(self.name, each[1], now=True)]:
            if time.monotonic() > deadline:
                raise ComparisonError(
                    f"--cluster {self.name}: cancelled, but not ended after {PATIENCE:.0f} "
                    f"seconds: {_ids(going_on)}. Give the same command again when they have. "
                    f"{_UNKNOWN}"
                )
            progress.say(f"{_count(going_on)} cancelled and about to end")
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _submit(
        self, runs: Sequence[TrainingRun], progress: RunProgress
    ) -> list[tuple[TrainingRun, submitit.Job[None]]]:
        if not runs:
            return []
        for run in runs:
            run.clear()
        try:
            with self.executor.batch():
                jobs = [(run, self.executor.submit(_train, run)) for run in runs]
        except (FailedJobError, FailedSubmissionError) as error:
            raise ComparisonError(f"--cluster {self.name}: not submitted: {error}") from error
        for run, job in jobs:
            record = {"cluster": self.name, "job_id": job.job_id, "fingerprint": run.fingerprint}
            (run.directory / JOB_FILE).write_text(json.dumps(record))
        if self.name != "debug":
            progress.console.print(f"{_count(jobs)} submitted: {_ids(jobs)}")
        return jobs

    def _state(self, job: submitit.Job[None]) -> str:
        if self.name == "local":
            return "ended" if _ended(self.name, job) else "running"
        return job.state.lower()

    def _outcome(self, run: TrainingRun, job: submitit.Job[None]) -> RunResult | None:
        """What a job left that has ended; None when it has not."""
        if not _ended(self.name, job):
            return None
        details = job.exception()  # waits a little for slow file systems
        error = f"job {job.job_id} left no result ({self._state(job)})"
        return run.result() or run.lost(error, f"{details}\n")


@dataclass(frozen=True)
class _Recorded:
    """A job that an earlier command submitted for a run, with the config that the run had."""

    cluster: str
    job: submitit.Job[None]
    fingerprint: str


def _job_of(run: TrainingRun, folder: Path) -> _Recorded | None:
    """The job of the run that was submitted before and has not ended."""
    try:
        record = json.loads((run.directory / JOB_FILE).read_text())
        name, job_id, fingerprint = (record[k] for k in ("cluster", "job_id", "fingerprint"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if name not in _JOBS:
        return None
    job: submitit.Job[None] = _JOBS[name](folder, job_id)
    return None if _ended(name, job) else _Recorded(name, job, fingerprint)


def refuse_jobs_elsewhere(runs: Sequence[TrainingRun], folder: Path, cluster: str | None) -> None:
    """Make sure that no run has a job that goes on somewhere else.

    Args:
        runs: What is about to be trained.
        folder: That of the jobs.
        cluster: Where it will be trained; None for processes of this command.

    Raises:
        ComparisonError: When there are such jobs: two would write into one directory.
    """
    jobs = [each for run in runs if (each := _job_of(run, folder.resolve()))]
    for name in ("slurm", "local"):
        ids = [each.job.job_id for each in jobs if each.cluster == name != cluster]
        if ids:
            end = f"{'scancel' if name == 'slurm' else 'kill -INT'} {' '.join(ids)}"
            raise ComparisonError(
                f"an earlier command submitted {_count(ids)} for runs of this one, not ended yet: "
                f"{', '.join(ids)}. Go on with --cluster {name}, or end what is there: `{end}`. "
                f"{_UNKNOWN}"
            )


def _ended(cluster: str, job: submitit.Job[None], now: bool = False) -> bool:
    """Whether a job has ended, as the cluster says `now` or has said a moment ago."""
    # submitit takes a local job that another command has started for one that has ended
    done = job.done(force_check=now)
    return done and not (cluster == "local" and _is_controller(int(job.job_id)))


def _cancel(cluster: str, job: submitit.Job[None]) -> None:
    if cluster == "local":
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(job.job_id), signal.SIGINT)
    else:
        job.cancel(check=False)


def _train(run: TrainingRun) -> None:
    """What a job does. Slurm may requeue one whose run has finished."""
    if finished_result(run.directory, run.fingerprint) is not None:
        return
    run.clear()
    with contextlib.suppress(OSError, ValueError):  # a debugger's stderr may have no descriptor
        faulthandler.enable()
    run.train()


def _is_controller(pid: int) -> bool:
    """Whether this process, and not one that got its number later, waits for a local job."""
    try:
        os.kill(pid, 0)
        return b"submitit" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except ProcessLookupError:
        return False
    except OSError:  # no such files here
        return True


def _ids(jobs: Sequence[tuple[TrainingRun, submitit.Job[None]]]) -> str:
    return ", ".join(job.job_id for _, job in jobs)


def _count(jobs: Sequence[object]) -> str:
    return f"{len(jobs)} job{'s' if len(jobs) != 1 else ''}"
