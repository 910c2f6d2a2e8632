"""The page of evidence is what its generator makes of the recipes and the kept results."""

import csv
import math

import pytest
import yaml

from lightning_aux.cli import main as lightning_aux
from recipes.evidence import results
from recipes.evidence.__main__ import PAGE
from recipes.evidence.notes import rate_sensitivity, recovered_gap
from recipes.evidence.page import page
from recipes.evidence.tasks import TASKS, Task

BY_NAME = {task.name: task for task in TASKS}


@pytest.fixture(autouse=True)
def at_the_root(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)


def test_the_page_is_what_the_recipes_and_results_say():
    """Run `python -m recipes.evidence` when this fails; it trains nothing."""
    assert PAGE.read_text("utf-8") == page()


def test_there_are_no_results_that_the_page_leaves_out():
    kept = {path.stem for path in results.RESULTS.glob("*.csv")}
    assert kept == set(BY_NAME) == set(results.machines())


def test_results_of_other_runs_than_the_recipes_are_refused(tmp_path, monkeypatch):
    name = "digits_weak_supervisor"
    lines = (results.RESULTS / f"{name}.csv").read_text().splitlines(keepends=True)
    (tmp_path / f"{name}.csv").write_text("".join(lines[:-1]))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match=f"--train --only {name}"):
        results.measured(BY_NAME[name])


def test_differences_are_those_of_the_results():
    """Read back from the page and computed here again, without the code in between."""
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text("utf-8").splitlines()]
    (columns,) = (cells for cells in lines if cells[0] == "task")
    rows = [
        dict(zip(columns, cells, strict=True))
        for cells in lines
        if cells[0] == "digits, spurious mark"
    ]
    with (results.RESULTS / "digits_spurious_mark.csv").open() as file:
        runs = list(csv.DictReader(file))
    acc = {(run["variant"], run["seed"]): float(run["test_acc"]) for run in runs}
    seeds = sorted({seed for _, seed in acc})
    for row in rows:
        variant = row["method"].replace(" ", "_")
        change = sum(acc[variant, s] - acc["baseline", s] for s in seeds) / len(seeds)
        shown = float(row["difference [95 % interval]"].split(" [")[0].replace("−", "-"))
        assert shown == pytest.approx(100 * change, abs=0.05 + 1e-6)
    assert {row["method"].replace(" ", "_") for row in rows} == {
        name for name, _ in acc if name not in ("baseline", "weight_decay")
    }


def test_the_recovered_gap_is_nothing_at_the_supervisor_and_all_at_the_ceiling():
    def seed(acc):
        return {each: {"test_acc": acc, "test_supervisor": 0.6} for each in (1, 2)}

    values = {"baseline": seed(0.6), "better": seed(0.75), "true_labels": seed(0.9)}
    said = recovered_gap(values)
    assert "baseline +0.0 [+0.0, +0.0] %" in said
    assert "better +50.0 [+50.0, +50.0] %" in said


def test_sensitivity_is_the_mean_loss_above_the_best_and_no_worse_than_guessing():
    def runs(loss):
        return {seed: {"test_nll": loss} for seed in (1, 2)}

    values = {
        "baseline": runs(0.5),
        "lr_1": runs(5.0),
        "lr_2": runs(math.inf),
        "z_loss": runs(0.5),
        "lr_1_z_loss": runs(0.8),
        "lr_2_z_loss": runs(0.5),
    }
    said = rate_sensitivity(values)
    assert f"{2 * (math.log(10) - 0.5) / 3:.4g} without ZLoss, 0.1 with it" in said


def test_training_keeps_results_and_what_they_were_measured_on(tmp_path, monkeypatch):
    """The whole way once, with a comparison that trains nothing."""
    ran = []

    def stand_in(arguments):
        ran.append(arguments)
        if arguments[0] == "compare":
            (tmp_path / "runs" / "one").mkdir(parents=True)
            (tmp_path / "runs" / "one" / "results.csv").write_text("kept")
        return 0

    monkeypatch.setattr(results, "lightning_aux", stand_in)
    monkeypatch.setattr(results, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    there = tmp_path / "there.ckpt"
    there.touch()
    before = {str(there): ("fit", "again"), str(tmp_path / "missing.ckpt"): ("fit", "missing")}
    results.train(Task("one", "One", "one.yaml", {"lr": 0.1}, before))
    assert ran[0] == ["fit", "missing"]
    assert ran[1][:5] == ["compare", "--config", "one.yaml", "--set", "lr=0.1"]
    assert (tmp_path / "results" / "one.csv").read_text() == "kept"
    assert results.machines()["one"]["load"]


@pytest.mark.parametrize(
    ("path", "command"), [each for task in TASKS for each in task.before.items()]
)
def test_the_command_for_what_is_missing_makes_that_file(path, command, capsys):
    with pytest.raises(SystemExit) as stop:
        lightning_aux([*command, "--print_config"])
    assert stop.value.code == 0
    callbacks = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    (callback,) = callbacks if isinstance(callbacks, list) else [callbacks]
    saved = callback["init_args"]
    assert f"{saved['dirpath']}/{saved['filename']}.ckpt" == path
