"""Two ``ddp`` processes hold the same teacher, BatchNorm statistics included, saved or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.engine.small_models import equal
from tests.teachers import two_ranks

pytestmark = [pytest.mark.xdist_group("two_ranks"), pytest.mark.slow]

ROOT = Path(__file__).parents[2]
LEFT_BY_A_TRAINER = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two_ranks")
    environment = {k: v for k, v in os.environ.items() if k not in LEFT_BY_A_TRAINER}
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", two_ranks.__file__, str(path)],
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if finished.returncode:
        pytest.fail(f"the two processes ended with an error:\n{finished.stderr[-4000:]}")
    return path


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("start", [0, 2])
def test_both_ranks_hold_the_same_teacher_and_saving_changes_nothing(
    folder: Path, buffers: str, start: int
) -> None:
    ranks = [torch.load(folder / f"{buffers}.{start}.{rank}.pt") for rank in (0, 1)]
    expected, *others = [run for results in ranks for run in results]
    assert len(expected) == 6 - start
    for other in others:
        assert all(equal(*pair) for pair in zip(expected, other, strict=True))
