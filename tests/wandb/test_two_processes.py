"""Weights & Biases: however many processes train, one run holds every step once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.two_processes import run_script

pytest.importorskip("wandb")
offline_file = pytest.importorskip("tests.wandb.offline_file")
from tests.wandb import two_processes  # noqa: E402

STEPS = 6


@pytest.mark.slow
@pytest.mark.parametrize("strategy", two_processes.STRATEGIES)
def test_f67_two_processes_write_one_run_that_holds_every_step_once(
    strategy: str, tmp_path: Path
) -> None:
    folder = tmp_path / strategy
    folder.mkdir()
    run_script(two_processes.__file__, folder, timeout=120)
    (file,) = folder.rglob("*.wandb")  # but for the link to the latest
    run = offline_file.read(file)

    assert run.exit_code == 0
    assert [row["_step"] for row in run.history] == list(range(STEPS))
    assert [row["trainer/global_step"] for row in run.history] == list(range(STEPS))
    promised = {"aux/main", "aux/total", "aux/ema/distance", "aux/gradients/main_norm"}
    for name in two_processes.NAMES:
        promised |= {f"aux/{name}", f"aux/{name}/weight"}
        promised |= {f"aux/gradients/{name}_{each}" for each in ("norm", "cosine", "ratio")}
    for row in run.aux_rows():
        assert {key for key in row if key.startswith("aux/")} == promised
        terms = sum(row[f"aux/{n}"] * row[f"aux/{n}/weight"] for n in two_processes.NAMES)
        assert row["aux/main"] + terms == pytest.approx(row["aux/total"], abs=1e-6)
    assert run.config["aux"].keys() == {each.name for each in two_processes.added()}
