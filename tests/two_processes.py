"""Running a script that starts two processes of its own, as ``strategy="ddp"`` does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What an earlier Trainer in this process may have left in the environment.
LEFT_BY_A_TRAINER = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_script(script: str | None, folder: Path, timeout: float) -> None:
    """Run ``script folder``; the test fails with its last output if the script does.

    Args:
        script: The script, a module's ``__file__``.
        folder: Where the script writes.
        timeout: In seconds.
    """
    environment = {key: value for key, value in os.environ.items() if key not in LEFT_BY_A_TRAINER}
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(folder)],
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if finished.returncode:
        pytest.fail(f"the two processes ended with an error:\n{finished.stderr[-4000:]}")
