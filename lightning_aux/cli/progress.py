"""What `compare` shows while it trains: runs done, those that are running, time left."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from lightning_aux.cli.training_run import TrainingRun
from lightning_aux.comparison import RunResult

_Key = tuple[str, int]


@dataclass
class _Shown:
    task: TaskID
    started: float
    fraction: float = 0.0


class RunProgress:
    """A bar over all runs and one for each that is running, on a terminal; elsewhere a line per
    finished run.

    Args:
        console: Where to write.
        pending: Every run that will be trained.
        kept: Number of runs that were finished before.
        at_once: How many are trained at a time; None if others decide, and time left is unknown.
    """

    def __init__(
        self, console: Console, pending: Sequence[TrainingRun], kept: int, at_once: int | None = 1
    ) -> None:
        self.console = console
        self.waiting = [(run.variant.name, run.seed) for run in pending]
        self.running: dict[_Key, _Shown] = {}
        self.at_once = at_once
        self.done = kept
        self.total = kept + len(pending)
        self.durations: list[tuple[str, float]] = []
        self.bar = Progress(
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            console=console,
            refresh_per_second=4,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=self.total, completed=kept)

    def __enter__(self) -> RunProgress:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def start(self, run: TrainingRun) -> None:
        """A run begins."""
        key = (run.variant.name, run.seed)
        self.waiting.remove(key)
        self.running[key] = _Shown(self.bar.add_task("", total=1.0), time.monotonic())
        self.update(run, 0, -1, 0.0)

    def update(self, run: TrainingRun, epoch: int, epochs: int, fraction: float) -> None:
        """A run is in `epoch` (from 0) of `epochs`, `fraction` of its steps done."""
        shown = self.running[run.variant.name, run.seed]
        shown.fraction = fraction
        of = f"/{epochs}" if epochs > 0 else ""
        said = f"{run.variant.name} · seed {run.seed} · epoch {epoch + 1}{of}"
        self.bar.update(shown.task, description=said, completed=fraction)
        self.say(f"{_duration(self.seconds_left())} left")

    def say(self, text: str) -> None:
        """Show a text beside the number of finished runs."""
        said = f"[bold]{self.done}/{self.total} runs[/bold] · {text}"
        self.bar.update(self.task, description=said, completed=self.done)

    def finish(self, result: RunResult, metric: str) -> None:
        """A run is over: one line about it stays."""
        key = (result.variant, result.seed)
        if (shown := self.running.pop(key, None)) is not None:
            self.bar.remove_task(shown.task)
        else:
            self.waiting.remove(key)
        if not result.error:
            self.durations.append((result.variant, result.seconds))
        self.done += 1
        value = result.metrics.get(metric, math.nan)
        said = f"failed: {result.error}" if result.error else f"{metric} {value:.4g}"
        known = self.at_once is not None and (self.waiting or self.running)
        left = f", {_duration(self.seconds_left())} left" if known else ""
        line = f"{self.done:>3}/{self.total}  {result.variant} · seed {result.seed}  {said}"
        style = "red" if result.error else ""
        took = f"  ({_duration(result.seconds)}{left})"
        self.console.print(Text(line, style=style).append(took, style="dim"))

    def seconds_left(self) -> float | None:
        """Time left; None while there is no telling.

        A run is expected to take as long as finished runs of its variant, else as all finished
        runs, else as those that are running appear to.
        """
        now = time.monotonic()
        seem = [
            (now - each.started) / each.fraction
            for each in self.running.values()
            if each.fraction > 0.02
        ]
        finished = [seconds for _, seconds in self.durations]
        fallback = statistics.fmean(finished or seem) if finished or seem else None

        def expected(variant: str) -> float | None:
            same = [seconds for name, seconds in self.durations if name == variant]
            return statistics.fmean(same) if same else fallback

        left = []
        for (variant, _), each in self.running.items():
            known = (now - each.started) / each.fraction if each.fraction > 0.02 else None
            whole = known or expected(variant)
            left.append(None if whole is None else whole * (1 - each.fraction))
        times = [*left, *(expected(variant) for variant, _ in self.waiting)]
        known_times = [seconds for seconds in times if seconds is not None]
        if len(known_times) < len(times) or self.at_once is None:
            return None
        longest = max(known_times, default=0.0)
        return max(sum(known_times) / self.at_once, longest)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "…"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
