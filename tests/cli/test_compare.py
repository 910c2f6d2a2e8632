"""`lightning-aux compare`: paired runs, kept results, failures that stay local, clear errors."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from scipy.stats import ttest_rel

from lightning_aux.cli import main
from lightning_aux.cli.compare_file import read_comparison
from lightning_aux.comparison import Measure
from tests.cli.comparing import BASE, toy

ROOT = Path(__file__).parents[2]


def test_a_seed_fixes_initialisation_and_order_for_every_variant(place):
    variants = {
        "draws": {"callbacks": [toy("Draws")]},
        "slow": {"set": {"model.init_args.lr": 0.01}},
    }
    assert place.compare(variants=variants) == 0

    seen = {}
    for seed in (0, 1):
        for variant in ("baseline", "draws", "slow"):
            history = place.result(variant, seed)["history"]
            seen[variant, seed] = [(epoch["start"], epoch["order"]) for epoch in history]
        assert seen["draws", seed] == seen["baseline", seed]
        assert seen["slow", seed] == seen["baseline", seed]
    assert seen["baseline", 0] != seen["baseline", 1]
    orders = [order for _, order in seen["baseline", 0]]
    assert len(set(orders)) == 3, "every epoch has an order of its own"


def test_order_is_paired_with_loader_workers_too(place):
    variants = {"draws": {"callbacks": [toy("Draws")]}}
    place.compare("--seeds=0", variants=variants, set={"data.init_args.num_workers": 1})

    orders = [
        [epoch["order"] for epoch in place.result(variant, 0)["history"]]
        for variant in ("baseline", "draws")
    ]
    assert orders[0] == orders[1]


def test_difference_and_interval_are_those_of_the_paired_t_test(place):
    variants = {"slow": {"set": {"model.init_args.lr": 0.02}}}
    place.compare(variants=variants, seeds=[0, 1, 2])

    values = {
        (row["variant"], row["seed"]): float(row["test_error"]) for row in place.rows("results.csv")
    }
    slow, plain = ([values[name, seed] for seed in "012"] for name in ("slow", "baseline"))
    expected = ttest_rel(slow, plain).confidence_interval()
    (row,) = [row for row in place.rows("summary.csv") if row["variant"] == "slow"]
    assert (float(row["low95"]), float(row["high95"])) == pytest.approx(tuple(expected), rel=1e-4)


def test_finished_runs_are_kept_and_changed_ones_run_again(place, capsys):
    variants = {"a": {"set": {"model.init_args.lr": 0.05}}, "b": {"callbacks": [toy("Draws")]}}
    place.compare(variants=variants)
    written = {
        (name, seed): (place.run_directory(name, seed) / "result.json").stat().st_mtime_ns
        for name in ("baseline", "a", "b")
        for seed in (0, 1)
    }

    def ran_again():
        return {
            key
            for key, before in written.items()
            if (place.run_directory(*key) / "result.json").stat().st_mtime_ns != before
        }

    capsys.readouterr()
    place.compare(variants=variants)
    assert ran_again() == set()
    assert "6 of 6 runs were finished before" in capsys.readouterr().out

    variants["a"]["set"]["model.init_args.lr"] = 0.06
    place.compare(variants=variants)
    assert ran_again() == {("a", 0), ("a", 1)}

    place.compare("--fresh", variants=variants)
    assert ran_again() == set(written)


def test_an_unfinished_run_is_not_taken_for_finished(place):
    place.compare("--seeds=0")
    result = place.run_directory("baseline", 0) / "result.json"
    result.write_text(result.read_text()[:40])
    assert place.compare("--seeds=0") == 0
    assert place.result("baseline", 0)["metrics"]["test_error"] > 0


def test_ctrl_c_keeps_finished_runs_and_the_same_command_goes_on(place):
    mark = place.path / "third-run"
    variants = {
        "waits": {"callbacks": [toy("Marks", path=str(mark))], "set": {"model.init_args.wait": 0.3}}
    }
    arguments = place.write(variants=variants, seeds=[0], set={"trainer.max_epochs": 20})
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_aux.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()

    assert process.returncode == 130, output
    assert "The same command goes on" in output
    assert "Traceback" not in output
    assert not (place.run_directory("waits", 0) / "result.json").exists()
    finished = (place.run_directory("baseline", 0) / "result.json").stat().st_mtime_ns

    variants["waits"]["set"]["model.init_args.wait"] = 0.0
    assert place.compare(variants=variants, seeds=[0], set={"trainer.max_epochs": 20}) == 0
    assert (place.run_directory("baseline", 0) / "result.json").stat().st_mtime_ns == finished


def test_ctrl_c_is_heard_again_after_lightning_has_handled_it(place):
    before = signal.getsignal(signal.SIGINT)
    variants = {"interrupts": {"callbacks": [toy("Interrupts")]}}
    assert place.compare("--cluster=debug", "--seeds=0", variants=variants) == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_a_failing_variant_is_kept_and_the_rest_goes_on(place, capsys):
    variants = {"broken": {"callbacks": [toy("Fails")]}, "draws": {"callbacks": [toy("Draws")]}}
    assert place.compare(variants=variants) == 1

    summary = {row["variant"]: row for row in place.rows("summary.csv")}
    assert summary["broken"]["failed"] == "2"
    assert summary["broken"]["mean"] == "nan"
    assert summary["draws"]["verdict"] == "no difference shown"
    output = capsys.readouterr().out
    assert "failed: 2 of 2 seeds" in output
    assert "RuntimeError: this variant cannot train" in output
    assert "in on_train_start" in (place.run_directory("broken", 1) / "error.txt").read_text()
    assert "this variant cannot train" in (place.output / "report.html").read_text()


def test_several_devices_are_refused_by_name(place, capsys):
    assert place.compare("--seeds=0", set={"trainer.devices": 2}) == 1
    assert "set trainer.devices to 1" in capsys.readouterr().out


def test_step_time_includes_callbacks_that_the_module_brings(place):
    place.compare("--seeds=0", "--epochs=7", set={"model.init_args.sleeps": 0.02})
    assert place.result("baseline", 0)["step_seconds"] >= 0.02


def test_step_time_includes_callbacks_and_leaves_out_the_warm_up(place):
    variants = {"sleeps": {"callbacks": [toy("Sleeps", seconds=0.02)]}}
    place.compare("--seeds=0", "--epochs=7", variants=variants)

    times = {row["variant"]: row["ms_per_step"] for row in place.rows("results.csv")}
    assert float(times["sleeps"]) >= 20
    assert float(times["baseline"]) < 20
    place.compare("--seeds=0", "--epochs=2")
    assert place.result("baseline", 0)["step_seconds"] is None, "8 steps are all warm-up"


def test_curves_hold_every_epoch_of_every_metric(place):
    place.compare("--epochs=4", curve="val_error")

    epochs = [
        int(row["epoch"])
        for row in place.rows("curves.csv")
        if row["metric"] == "val_error" and row["seed"] == "1"
    ]
    assert epochs == [0, 1, 2, 3]


def test_report_needs_no_other_file(place):
    variants = {"draws": {"callbacks": [toy("Draws")]}}
    place.compare(variants=variants, curve="val_error", title="Toys & <others>")

    html = (place.output / "report.html").read_text()
    assert not re.findall(r'(?:src|srcset|href)="(?!#)', html)
    assert "<title>Toys &amp; &lt;others&gt;</title>" in html
    assert (place.output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (place.output / "differences.png").read_bytes().startswith(b"\x89PNG")


def test_config_beside_a_run_starts_the_same_run(place, tmp_path):
    place.compare("--seeds=1")
    config = yaml.safe_load((place.run_directory("baseline", 1) / "config.yaml").read_text())
    assert config["seed_everything"] == 1
    assert config["model"]["init_args"] == {"lr": 0.1, "wait": 0.0, "sleeps": 0.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"varaints": {}}, "unknown key 'varaints'. Did you mean 'variants'?"),
        ({"base": "bas.yaml"}, "there is no file"),
        ({"base": "bas.yaml"}, "Did you mean 'base.yaml'?"),
        ({"baseline": "slwo", "variants": {"slow": {}}}, "no variant 'slwo'. Did you mean 'slow'?"),
        ({"mode": "maximum"}, "mode is 'max' or 'min', not 'maximum'"),
        ({"also": {"val_error": {"mode": "mx"}}}, "also: 'val_error': mode is 'max' or 'min'"),
        ({"also": {"val_error": {"mod": "max"}}}, "Did you mean 'mode'?"),
        ({"also": {"val_error": "min"}}, "expected 'mode' and 'unit', got 'min'"),
        ({"also": {"test_error": None}}, "is the metric that decides"),
        ({"seeds": [0, 0]}, "seeds are different integers"),
        ({"seeds": [True, 2]}, "seeds are different integers from 0 up, not [True, 2]"),
        ({"seeds": None}, "seeds are different integers from 0 up, not None"),
        ({"base": None}, "the key 'base' is missing"),
        ({"metric": None}, "the key 'metric' is missing"),
        ({"seeds": 3}, "'seeds' is a list, not 3"),
        ({"variants": {"a b": {}}}, "a name has letters, digits"),
        ({"variants": {"baseline": {"callbacks": []}}}, "is the plain base itself"),
        ({"variants": {"a": {"callback": []}}}, "Did you mean 'callbacks'?"),
        ({"variants": {"a": {"callbacks": [toy("Nowhere")]}}}, "variant 'a'"),
        ({"variants": {"a": {"callbacks": [{"class_path": "Objective"}]}}}, "has no term"),
        ({"variants": {"a": {"callbacks": [toy("Sleeps", secs=1)]}}}, "secs"),
        ({"variants": {"a": {"callbacks": [toy("Sleeps", seconds="x")]}}}, "seconds"),
        ({"variants": {"a": {"callbacks": [toy("Refuses", value=2)]}}}, "value=2.0 is refused"),
        ({"set": {"trainer.max_epoks": 3}}, "max_epoks"),
        ({"set": {"trainer.max_epochs.x": 3}}, "'trainer.max_epochs' is not a mapping"),
        ({"set": {"model.init_args.lr": "fast"}}, "lr"),
    ],
)
def test_a_wrong_file_ends_before_anything_trains(place, capsys, content, message):
    with pytest.raises(SystemExit) as stop:
        place.compare(**content)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not place.output.exists()


def test_empty_keys_are_as_if_they_were_not_there(place):
    path = Path(place.write()[1].removeprefix("--config="))
    plain = read_comparison(path)
    keys = ("title", "description", "mode", "unit", "also", "curve", "baseline", "set", "variants")
    place.content.pop("mode")
    place.write(**dict.fromkeys(keys))
    empty = read_comparison(path)
    assert empty == replace(plain, decides=Measure("test_error"))
    place.write(variants={"a": dict.fromkeys(("recipe", "callbacks", "set", "grid"))})
    variants = read_comparison(path).variants
    assert variants["a"].resolved == variants["baseline"].resolved


@pytest.mark.parametrize("name", ["compare.yaml", "base.yaml"])
@pytest.mark.parametrize(
    ("twice", "lines"),
    [
        ("  a: {x: &x {z: 1}}\n  b: {<<: *x, z: 2}\n  'a': {x: 2}\n", (2, 4, 3)),
        ("  b: {lr: 1, lr: 2}\n", (2, 2, 14)),
    ],
)
def test_a_key_that_is_there_twice_is_refused_with_its_lines(place, capsys, name, twice, lines):
    arguments = place.write(variants={"a": {"set": {"model.init_args.lr": 0.1}}})
    file = place.path / name
    before = len(file.read_text().splitlines())
    file.write_text(f"{file.read_text()}extra:\n{twice}")
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    first, second, column = lines
    assert f"{file} is not valid YAML: the key '" in error
    assert f"is there already, in line {before + first}" in error
    assert f"line {before + second}, column {column}" in error


def test_a_metric_that_nobody_logs_ends_after_the_first_run(place, capsys):
    with pytest.raises(SystemExit) as stop:
        place.compare(metric="tset_error")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "logged no 'tset_error'. Did you mean 'test_error'?" in error
    assert not place.run_directory("baseline", 1).exists()


@pytest.mark.parametrize(
    "settings", [{}, {"metric": "val_error", "also": {"test_error": None}}], ids=["decides", "also"]
)
def test_a_metric_that_is_not_finite_is_a_failure_without_a_file(place, capsys, settings):
    variants = {"blows": {"callbacks": [toy("TestsNan")]}}
    assert place.compare("--seeds=0", variants=variants, **settings) == 1
    output = capsys.readouterr().out
    assert "blows, seed 0 failed: test_error is nan" in output
    assert "error.txt" not in output
    assert place.compare("--seeds=0", **settings) == 0


def test_a_kept_run_without_the_metric_ends_before_anything_trains(place, capsys):
    place.compare("--seeds=0")
    with pytest.raises(SystemExit) as stop:
        place.compare("--seeds=1,0", metric="tset_error")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "logged no 'tset_error'. Did you mean 'test_error'?" in error
    assert "--fresh trains this run again" in error
    assert not place.run_directory("baseline", 1).exists()


def test_an_error_in_the_report_leaves_table_and_csv(place, capsys, monkeypatch):
    def breaks(*arguments):
        raise ValueError("no such font")

    monkeypatch.setattr("lightning_aux.cli.compare.draw_curves", breaks)
    assert place.compare("--seeds=0") == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "mean ± sd" in output
    assert f"ValueError: no such font; `lightning-aux report {place.output}`" in output
    assert "in breaks" in (place.output / "report_error.txt").read_text()
    assert [row["seed"] for row in place.rows("results.csv")] == ["0"]

    monkeypatch.undo()
    assert place.compare("--seeds=0") == 0
    assert not (place.output / "report_error.txt").exists()


def test_a_base_that_continues_a_checkpoint_is_refused(place, capsys):
    place.write_base({**BASE, "ckpt_path": "last.ckpt"})
    with pytest.raises(SystemExit):
        place.compare()
    assert "remove 'ckpt_path'" in capsys.readouterr().err


def test_displays_of_the_base_give_way(place):
    trainer = {**BASE["trainer"], "callbacks": [{"class_path": "RichProgressBar"}]}
    place.write_base({**BASE, "trainer": trainer})
    assert place.compare("--seeds=0") == 0


def test_other_metrics_are_compared_beside_the_one_that_decides(place, capsys):
    variants = {"slow": {"set": {"model.init_args.lr": 0.02}}}
    place.compare(variants=variants, seeds=[0, 1, 2], also={"val_error": {"mode": "min"}})

    runs = place.rows("results.csv")
    assert list(runs[0])[:4] == ["variant", "seed", "test_error", "val_error"]
    values = {(row["variant"], row["seed"]): float(row["val_error"]) for row in runs}
    slow, plain = ([values[name, seed] for seed in "012"] for name in ("slow", "baseline"))
    expected = ttest_rel(slow, plain)
    summary = {(row["variant"], row["metric"]): row for row in place.rows("summary.csv")}
    assert len(summary) == 4
    found = summary["slow", "val_error"]
    interval = expected.confidence_interval()
    assert (float(found["low95"]), float(found["high95"])) == pytest.approx(interval, rel=1e-4)
    assert (found["verdict"] == "no difference shown") == (interval[0] <= 0 <= interval[1])

    mean, change = sum(slow) / 3, (sum(slow) - sum(plain)) / 3
    star = "" if found["verdict"] == "no difference shown" else "*"
    shown = f"{mean:.4g} ({change:+.3g}{star})".replace("-", "−")
    assert shown in capsys.readouterr().out
    assert shown in (place.output / "report.html").read_text()


def test_another_metric_has_its_own_direction(place):
    """The same error, of which once less and once more is said to be better."""
    variants = {"off": {"set": {"model.init_args.lr": 0.0}}}
    place.compare(variants=variants, seeds=[0, 1, 2], also={"val_error": {"mode": "max"}})
    said = {row["metric"]: row["verdict"] for row in place.rows("summary.csv") if row["verdict"]}
    opposite = {"worse": "better", "no difference shown": "no difference shown"}
    assert said["val_error"] == opposite[said["test_error"]]


def test_another_metric_that_nobody_logs_ends_after_the_first_run(place, capsys):
    with pytest.raises(SystemExit):
        place.compare(also={"vall_error": None})
    assert "logged no 'vall_error'. Did you mean 'val_error'?" in capsys.readouterr().err


def test_set_on_the_command_line_goes_over_the_file_and_under_the_variants(place):
    variants = {"own": {"set": {"model.init_args.lr": 0.03}}}
    flags = ["--set", "model.init_args.lr=0.02", "--set", "data.init_args.size=16"]
    place.compare("--seeds=0", *flags, variants=variants, set={"model.init_args.lr": 0.01})
    configs = {
        name: yaml.safe_load((place.run_directory(name, 0) / "config.yaml").read_text())
        for name in ("baseline", "own")
    }
    assert configs["baseline"]["model"]["init_args"]["lr"] == 0.02
    assert configs["own"]["model"]["init_args"]["lr"] == 0.03
    assert {each["data"]["init_args"]["size"] for each in configs.values()} == {16}


@pytest.mark.parametrize("text", ["lr", "=3", "lr=[1"])
def test_a_wrong_set_on_the_command_line_says_what_is_expected(place, capsys, text):
    with pytest.raises(SystemExit) as stop:
        place.compare("--set", text)
    assert stop.value.code == 2
    assert text in capsys.readouterr().err
