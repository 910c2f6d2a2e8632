"""What `compare` shows while it trains: runs done, the current run and its epoch, time left."""

from __future__ import annotations

import statistics
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from lightning_aux.comparison import RunResult


class RunProgress:
    """A bar over all runs on a terminal; elsewhere one line per finished run.

    Args:
        console: Where to write.
        pending: `(variant, seed)` of every run that will be trained, in order.
        kept: Number of runs that were finished before.
    """

    def __init__(self, console: Console, pending: list[tuple[str, int]], kept: int) -> None:
        self.console = console
        self.pending = list(pending)
        self.kept = kept
        self.total = kept + len(pending)
        self.durations: list[tuple[str, float]] = []
        self.started = time.monotonic()
        self.bar = Progress(
            TextColumn("[bold]{task.completed:.0f}/{task.total:.0f} runs"),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            console=console,
            refresh_per_second=4,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task: TaskID = self.bar.add_task("", total=self.total, completed=kept)

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

    def start(self) -> None:
        """The next pending run begins."""
        self.started = time.monotonic()
        self.update(0, -1, 0.0)

    def update(self, epoch: int, epochs: int, fraction: float) -> None:
        """The current run is in `epoch` (from 0) of `epochs`, `fraction` of its steps done."""
        variant, seed = self.pending[0]
        shown = f"{epoch + 1}/{epochs}" if epochs > 0 else f"{epoch + 1}"
        left = self.seconds_left(fraction)
        self.bar.update(
            self.task,
            description=f"{variant} · seed {seed} · epoch {shown} · {_duration(left)} left",
        )

    def finish(self, result: RunResult, metric: str) -> None:
        """The current run is over: one line about it stays."""
        variant, seed = self.pending.pop(0)
        self.durations.append((variant, result.seconds))
        done = self.total - len(self.pending)
        value = result.metrics.get(metric)
        said = f"{metric} {value:.4g}" if value is not None else f"failed: {result.error}"
        self.bar.update(self.task, completed=done)
        left = f", {_duration(self.seconds_left(0.0))} left" if self.pending else ""
        line = f"{done:>3}/{self.total}  {variant} · seed {seed}  {said}"
        style = "red" if result.error else ""
        took = f"  ({_duration(result.seconds)}{left})"
        self.console.print(Text(line, style=style).append(took, style="dim"))

    def seconds_left(self, fraction: float) -> float | None:
        """Time left, the current run being `fraction` done; None while there is no telling.

        A run is expected to take as long as finished runs of its variant, else as all finished
        runs, else as the current one appears to.
        """
        elapsed = time.monotonic() - self.started
        current = elapsed / fraction if fraction > 0.02 else None
        times = [self._expected(variant) or current for variant, _ in self.pending]
        if any(seconds is None for seconds in times):
            return None
        first, *others = [seconds or 0.0 for seconds in times] or [0.0]
        first = current if current is not None else first
        return max(first * (1 - fraction), 0.0) + sum(others)

    def _expected(self, variant: str) -> float | None:
        same = [seconds for name, seconds in self.durations if name == variant]
        seconds = same or [seconds for _, seconds in self.durations]
        return statistics.fmean(seconds) if seconds else None


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "…"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
