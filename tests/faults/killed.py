"""Kills training with SIGKILL at every place it passes through, and resumes from what is there.

Started by `test_killed.py`. Every training that is killed is a child of its own, made by fork.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from tests.contract.training import identical
from tests.faults.runs import Hooks, ended, prepared, saving, several, state_in

PROCESSES = 2


def beside_another_average() -> list[Any]:
    return [EMAWeightAveraging(decay=0.8), *several()]


@dataclass(frozen=True)
class Run:
    """What is attached, whether the kill comes before or after it in a hook, and how to train."""

    make: Callable[[], list[Any]]
    first: bool
    arguments: dict[str, Any]


RUNS = {
    "every batch": Run(several, True, {}),
    "accumulated": Run(several, False, {"accumulate_grad_batches": 2}),
    "beside Lightning's average": Run(beside_another_average, False, {"val_check_interval": 2}),
}


class Counted:
    """Counts the places and, at one of them, lets the process die without another word."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.kill_at = kill_at
        self.places: list[str] = []

    def __call__(self, place: str) -> None:
        if len(self.places) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.places.append(place)


def train(name: str, folder: Path, here: Counted) -> None:
    run = RUNS[name]
    folder.mkdir(parents=True)
    added = [Hooks(here), *run.make()] if run.first else [*run.make(), Hooks(here)]
    _, _, fit = prepared([*added, *saving(folder)], folder, here, **run.arguments)
    fit()


def readable(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, OSError):
        return False
    return True


class Resumed:
    """What a run comes to from a checkpoint; the same file twice is resumed once."""

    def __init__(self, expected: dict[str, dict[str, Any]]) -> None:
        self.expected = expected
        self.known: dict[tuple[str, bytes], list[str]] = {}

    def differs(self, name: str, checkpoint: Path) -> list[str]:
        key = name, sha256(checkpoint.read_bytes()).digest()
        if key not in self.known:
            run, expected = RUNS[name], self.expected[name]
            actual = ended(run.make(), checkpoint.parent / "resumed", checkpoint, **run.arguments)
            parts = expected.keys() | actual.keys()
            self.known[key] = sorted(
                part for part in parts if not identical(actual.get(part), expected.get(part))
            )
        return self.known[key]


def killed_and_resumed(name: str, place: int, folder: Path, resumed: Resumed) -> dict[str, Any]:
    child = os.fork()
    if child == 0:
        try:
            train(name, folder, Counted(place))
        finally:  # it was to be killed before
            os._exit(1)
    _, status = os.waitpid(child, 0)
    files = sorted(folder.glob("*.ckpt"))  # in the order in which they are written
    cut = []
    while files and not readable(files[-1]):
        cut.append(files.pop().name)
    found = {
        "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
        "cut short": cut,
        "newest": files[-1].name if files else None,
        "differs": resumed.differs(name, files[-1]) if files else [],
    }
    shutil.rmtree(folder)
    return found


def share(number: int, work: list[tuple[str, int]], expected: Any, folder: Path) -> None:
    """One process's share of the places; what it found goes into a file."""
    resumed = Resumed(expected)
    results = [
        [name, place, killed_and_resumed(name, place, folder / f"at-{number}", resumed)]
        for name, place in work[number::PROCESSES]
    ]
    (folder / f"found-{number}.json").write_text(json.dumps(results))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    expected, places = {}, {}
    for name in RUNS:
        train(name, folder / name, here := Counted())
        expected[name], places[name] = state_in(folder / name / "end"), here.places
    work = [
        (name, place)
        for name in RUNS  # before the first checkpoint there is nothing to resume from
        for place in range(places[name].index("half written"), len(places[name]))
    ]
    gc.freeze()  # a collection in a child would copy every page that it looks at
    sharers = []
    for number in range(PROCESSES):
        sharers.append(os.fork())
        if sharers[-1] == 0:
            status = 1
            try:
                share(number, work, expected, folder)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:  # not back into the parent's program, whatever has happened
                os._exit(status)
    failed = [each for each in sharers if os.waitpid(each, 0)[1] != 0]
    if failed:
        sys.exit("a process that kills and resumes has failed")
    (folder / "places.json").write_text(json.dumps(places))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
