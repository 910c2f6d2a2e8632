"""What one run of a comparison leaves behind, and the folder in which all of them are."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_aux.comparison.comparison import Comparison, Measure, Variant

RESULT_FILE = "result.json"
ERROR_FILE = "error.txt"
LOG_FILE = "run.log"
JOB_FILE = "job.json"
COMPARISON_FILE = "comparison.json"


@dataclass
class RunResult:
    """What one run left behind, as it is kept in `result.json`.

    Attributes:
        variant: Name of the variant.
        seed: The seed.
        fingerprint: Digest of the config that was run.
        metrics: Last value of everything logged in fit, and everything logged in test.
        history: Everything logged, one entry per epoch, with the key `epoch`.
        step_seconds: Median time of a training step, see `StepTimer`; None when the run was
            shorter than the warm-up.
        seconds: Wall-clock time of the run.
        error: The exception, or what ended the process, in one line; None when the run finished.
        peak_bytes: The most memory that training took beyond what the process had before the model
            was made, see `PeakMemory`; None where it is not known.
        device: `"cpu"`, or the name of the accelerator.
        alone: Whether no other run of the comparison went on beside it. If not, its times are
            rough.
    """

    variant: str
    seed: int
    fingerprint: str
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    step_seconds: float | None = None
    seconds: float = 0.0
    error: str | None = None
    peak_bytes: int | None = None
    device: str = ""
    alone: bool = True


def run_directory(folder: Path, variant: str, seed: int) -> Path:
    """Where a run of the comparison in `folder` keeps its log, its metrics and its result."""
    return folder / "runs" / variant / f"seed{seed}"


def read_result(directory: Path) -> RunResult | None:
    """The result of the run in `directory`, or None where there is none that can be read."""
    try:
        result = RunResult(**json.loads((directory / RESULT_FILE).read_text()))
        numbers = [*result.metrics.values(), result.seconds, result.step_seconds or 0.0]
        numbers += [value for entry in result.history for value in entry.values()]
        whole = all("epoch" in entry for entry in result.history)
        return result if whole and all(map(_is_number, numbers)) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def finished_result(directory: Path, fingerprint: str) -> RunResult | None:
    """The kept result of a run with this very config that did not fail, or None."""
    result = read_result(directory)
    return result if result and result.fingerprint == fingerprint and not result.error else None


def write_result(directory: Path, result: RunResult) -> None:
    """Keep a result."""
    _write(directory / RESULT_FILE, asdict(result))


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Keep what is compared beside its runs, so that a report can be made from the folder alone."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / COMPARISON_FILE, asdict(comparison))


def read_comparison_of(folder: Path) -> Comparison:
    """What is compared in a folder.

    Raises:
        OSError: When the folder has no file of a comparison.
        ValueError: When the file cannot be read.
    """
    content: dict[str, Any] = json.loads((folder / COMPARISON_FILE).read_text())
    try:
        return Comparison(
            **{
                **content,
                "decides": Measure(**content["decides"]),
                "also": tuple(Measure(**each) for each in content["also"]),
                "seeds": tuple(content["seeds"]),
                "variants": {name: Variant(**each) for name, each in content["variants"].items()},
            }
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / COMPARISON_FILE} is not that of a comparison: {error}"
        ) from error


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write whole or not at all: an interrupted run must not look finished."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, default=str))
    os.replace(temporary, path)
