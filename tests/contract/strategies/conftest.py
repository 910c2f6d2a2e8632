"""The results of each place, from one start of its two processes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.strategies import two_processes
from tests.contract.strategies.jobs import REFUSED
from tests.contract.strategies.places import PLACES
from tests.contract.training import shared
from tests.two_processes import run_script

LIMIT = 900  # seconds for all jobs of a place, on a busy machine too; no deadlock lasts


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where an entry refuses to train there is nothing to compare."""
    refused = {each for each in items if _refuses(each)}
    if refused:
        config.hook.pytest_deselected(items=list(refused))
        items[:] = [each for each in items if each not in refused]


def _refuses(item: pytest.Item) -> bool:
    given = getattr(getattr(item, "callspec", None), "params", {})
    place = PLACES.get(given.get("place", ""))
    return place is not None and place.sharded and given.get("entry") in REFUSED


@pytest.fixture(scope="session")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`ended(place, job, rank=0)` is what that process wrote; the script runs on first use."""
    folders: dict[str, Path] = {}
    complaints: dict[str, str] = {}

    def read(place: str, job: str, rank: int = 0) -> dict[str, Any]:
        if place not in folders:
            _note_start(tmp_path_factory.getbasetemp(), place)
            folders[place] = tmp_path_factory.mktemp("places") / place
            folders[place].mkdir()
            try:
                run_script(two_processes.__file__, folders[place], timeout=LIMIT)
            except (
                pytest.fail.Exception,
                subprocess.TimeoutExpired,
            ) as error:  # earlier jobs have results
                complaints[place] = str(error)
        kind, _, case = job.rpartition(" ")
        written = folders[place] / f"{job}.{rank}.pt"
        if not written.exists():
            written = folders[place] / f"{kind} {shared(case)}.{rank}.pt"
        if not written.exists():
            pytest.fail(f"no result of {job!r}: {complaints.get(place, 'it is not a job')}")
        found: dict[str, Any] = torch.load(written, weights_only=True)
        if "error" in found:
            pytest.fail(f"{job!r} on process {rank}:\n{found['error']}")
        return found

    read.folder = folders.__getitem__  # type: ignore[attr-defined]
    return read


def _note_start(folder: Path, place: str) -> None:
    """Fail if another worker of pytest-xdist has the tests of this place too.

    Groups keep them together with ``--dist loadgroup``; pytest 9.2 ignores the groups of
    pytest-xdist 3.8, and each worker starts every place.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    try:
        (folder.parent / f"{place} has started").touch(exist_ok=False)
    except FileExistsError:
        pytest.fail(
            f"two workers have tests of {place!r}: run pytest with --dist loadgroup, and the "
            f"pinned pytest"
        )
