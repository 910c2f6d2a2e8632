"""Collects the checks of `python -m tests.gpu`: on the GPU where asked, on the CPU always.

This suite hides every GPU from its own processes (`tests/conftest.py`), so the GPU's checks run in
another one, once, when `AUX_TEST_GPU=1` is set.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.checks import CHECKS, KINDS, Skip, no_callback_adds_a_synchronisation_with_the_device
from tests.gpu.training import Shrink

ROOT = Path(__file__).parents[2]
SLOW = "compiled_with_inductor"

every_check = pytest.mark.parametrize("name", [each.__name__ for each in CHECKS])


def script(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the root of the repository; `CUDA_VISIBLE_DEVICES` is what is given."""
    known = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    known |= environment
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=known, capture_output=True, text=True, check=False)


@cache
def on_the_gpu() -> tuple[dict[str, tuple[str, str]], str]:
    """What each check said, by its name, and everything that was printed."""
    visible = os.environ["CUDA_VISIBLE_DEVICES"]  # empty where this suite has set it
    chosen = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    done = script(["-m", "tests.gpu"], **chosen)
    lines = re.findall(r"^(ok|FAIL|skip) +(\w+): (.*)$", done.stdout, flags=re.MULTILINE)
    return {name: (how, what) for how, name, what in lines}, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.xdist_group("gpu")
@pytest.mark.skipif(
    os.environ.get("AUX_TEST_GPU") != "1",
    reason="the checks on a GPU run with AUX_TEST_GPU=1, or as python -m tests.gpu",
)
@every_check
def test_on_the_gpu(name: str) -> None:
    said, printed = on_the_gpu()
    if "torch sees no CUDA device" in printed:
        pytest.skip("torch sees no CUDA device here")
    how, what = said.get(name, ("FAIL", printed[-3000:]))
    if how == "skip":
        pytest.skip(what)
    assert how == "ok", what


def _param(check: Callable[[str], str]) -> Any:
    marks = [pytest.mark.slow] if SLOW in check.__name__ else []
    return pytest.param(check, marks=marks, id=check.__name__)


@pytest.mark.parametrize("check", [_param(each) for each in CHECKS])
def test_on_the_cpu(check: Callable[[str], str]) -> None:
    """The logic of each check, as far as a CPU has what it looks at."""
    try:
        check("cpu")
    except Skip as reason:
        pytest.skip(str(reason))


def test_without_a_gpu_the_script_says_so_and_succeeds() -> None:
    done = script(["-m", "tests.gpu"], CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert "skipped: torch sees no CUDA device here" in done.stdout


def test_a_check_that_fails_makes_the_script_fail() -> None:
    broken = "import sys\nfrom tests.gpu import checks\n"
    broken += "checks.CHECKS[:] = [checks.check(lambda device: 1 / 0)]\n"
    broken += "from tests.gpu.__main__ import main\n"
    broken += "sys.argv[1:] = ['--device', 'cpu']\nsys.exit(main())\n"
    done = script(["-c", broken], CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "FAIL  <lambda>: ZeroDivisionError" in done.stdout
    assert "0 passed, 1 failed, 0 skipped" in done.stdout


def test_the_script_needs_nothing_but_torch_and_lightning() -> None:
    """`rich` is left: where it is installed, Lightning imports it."""
    alone = "import sys\n"
    alone += "for name in ('jsonargparse', 'wandb', 'pytest'):\n"
    alone += "    sys.modules[name] = None\n"
    alone += "from tests.gpu.__main__ import main\n"
    alone += "sys.argv[1:] = ['--device', 'cpu', '--only', 'weight_zero']\nsys.exit(main())\n"
    done = script(["-c", alone], CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 0 failed, 0 skipped" in done.stdout


class Waits(Shrink):
    """Says in every step what torch says when the host waits for the device."""

    def loss(self, step: Any) -> Any:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return super().loss(step)


def test_a_synchronisation_in_every_step_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "waits", lambda: [Waits()])
    with pytest.raises(AssertionError, match=r"^waits, 32-true: \+20 in 20 steps, of .*test_gpu"):
        no_callback_adds_a_synchronisation_with_the_device("cpu")
