"""Trains a comparison and keeps its results in docs/evidence, and reads them back."""

import csv
import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import lightning
import torch

from lightning_aux.cli import main as lightning_aux
from lightning_aux.comparison import Comparison, RunResult, VariantSummary, summarise
from recipes.evidence.notes import Values
from recipes.evidence.tasks import Task

RESULTS = Path("docs/evidence")
RUNS = Path("runs/evidence")
MACHINE = "machine.json"


def train(task: Task) -> None:
    """Make what is missing, compare, and keep the results with what they were measured on.

    Raises:
        SystemExit: When a run failed or was interrupted; nothing is kept then.
    """
    for path, command in task.before.items():
        if not Path(path).exists():
            lightning_aux(list(command))
    loads = [os.getloadavg()[0]]
    status = lightning_aux([*task.arguments, "--output", str(RUNS / task.name)])
    loads.append(os.getloadavg()[0])
    if status != 0:
        raise SystemExit(status)
    RESULTS.mkdir(parents=True, exist_ok=True)
    shutil.copy(RUNS / task.name / "results.csv", RESULTS / f"{task.name}.csv")
    known = machines() if (RESULTS / MACHINE).exists() else {}
    known[task.name] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "load": [round(load, 1) for load in loads],
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }
    (RESULTS / MACHINE).write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def machines() -> dict[str, dict[str, Any]]:
    """What each comparison was measured on."""
    found: dict[str, dict[str, Any]] = json.loads((RESULTS / MACHINE).read_text())
    return found


@dataclass(frozen=True)
class Measured:
    """A task with its results."""

    task: Task
    comparison: Comparison
    results: list[RunResult]
    summaries: list[VariantSummary]

    @property
    def reference(self) -> VariantSummary:
        return next(row for row in self.summaries if row.name == self.comparison.reference)

    @property
    def methods(self) -> list[VariantSummary]:
        apart = (self.comparison.reference, *self.task.apart)
        return [row for row in self.summaries if not row.name.startswith(apart)]

    @property
    def values(self) -> Values:
        values: dict[str, dict[int, dict[str, float]]] = {}
        for run in self.results:
            values.setdefault(run.variant, {})[run.seed] = run.metrics
        return values


def measured(task: Task) -> Measured:
    """Read the kept results.

    Raises:
        ValueError: When they are not those of the recipe's variants and seeds.
    """
    comparison = task.comparison()
    path = RESULTS / f"{task.name}.csv"
    with path.open(newline="") as file:
        results = [_run(row, comparison) for row in csv.DictReader(file)]
    found = [(run.variant, run.seed) for run in results]
    if found != [(name, seed) for seed in comparison.seeds for name in comparison.variants]:
        raise ValueError(
            f"{path} holds the runs of other variants or seeds than {task.recipe}: run "
            f"`python -m recipes.evidence --train --only {task.name}`."
        )
    return Measured(task, comparison, results, summarise(comparison, results))


def _run(row: Mapping[str, str], comparison: Comparison) -> RunResult:
    names = [measure.metric for measure in comparison.measures]
    return RunResult(
        row["variant"],
        int(row["seed"]),
        fingerprint="",
        metrics={name: float(row[name]) for name in names if row[name]},
        step_seconds=float(row["ms_per_step"]) / 1000 if row["ms_per_step"] else None,
        seconds=float(row["seconds"]),
        error=row["error"] or None,
    )
