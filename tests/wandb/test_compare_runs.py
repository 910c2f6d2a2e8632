"""``lightning-aux compare --wandb offline``: one run per training, failed ones included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_aux.cli import main

wandb = pytest.importorskip("wandb")
offline_file = pytest.importorskip("tests.wandb.offline_file")

ROOT = Path(__file__).parents[2]
SEEDS = (0, 1)


def toy(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"tests.cli.toy.{name}", "init_args": arguments}


def ours(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Any]]:
    """The exit status of the command, and its runs by variant and seed."""
    monkeypatch.chdir(ROOT)

    def run(**variants: Any) -> tuple[int, dict[tuple[str, int], Any]]:
        base = {
            "model": toy("ToyModel"),
            "data": toy("ToyData"),
            "trainer": {"max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 1},
        }
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
        content = {"base": "base.yaml", "seeds": list(SEEDS), "metric": "test_error", "mode": "min"}
        file = tmp_path / "compare.yaml"
        file.write_text(yaml.safe_dump({**content, "variants": variants}))
        output = tmp_path / "study"
        status = main(["compare", "-c", str(file), "--output", str(output), "--wandb", "offline"])
        wandb.teardown()
        found = {}
        for path in output.rglob("*.wandb"):
            one = offline_file.read(path)
            which = one.config["compare"]
            assert (which["variant"], which["seed"]) not in found
            found[which["variant"], which["seed"]] = one
        return status, found

    return run


def test_every_training_is_one_run_with_a_name_in_the_group_of_the_comparison(compare):
    average = ours("EMATeacher", decay=0.5), ours("EMAAnchor", teacher="ema", space="weight")
    status, runs = compare(anchored={"callbacks": list(average)})
    assert status == 0
    assert set(runs) == {(name, seed) for name in ("baseline", "anchored") for seed in SEEDS}
    assert len({run.id for run in runs.values()}) == 4
    for (name, seed), run in runs.items():
        assert (run.name, run.group, run.exit_code) == (f"{name}-seed{seed}", "study", 0)
        assert run.summary["test_error"] > 0  # of the test that follows the training
        assert ("aux" in run.config) == (name == "anchored")
    steps = [row["trainer/global_step"] for row in runs["anchored", 1].aux_rows()]
    assert steps == list(range(8))


def test_a_training_that_fails_is_a_failed_run_that_says_why(compare):
    """In its first step, and before it has begun."""
    status, runs = compare(
        fails={"callbacks": [toy("Fails")]},
        refused={"callbacks": [ours("EMAAnchor", teacher="nobody")]},
    )
    assert status == 1
    assert len(runs) == 3 * len(SEEDS)
    for seed in SEEDS:
        assert runs["baseline", seed].exit_code == 0
        assert "error" not in runs["baseline", seed].summary
        for name, said in (("fails", "this variant cannot train"), ("refused", "'nobody'")):
            assert runs[name, seed].exit_code == 1
            assert said in runs[name, seed].summary["error"]
            assert runs[name, seed].group == "study"
