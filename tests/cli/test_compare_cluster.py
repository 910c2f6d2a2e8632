"""`lightning-aux compare --cluster`: the same comparison as jobs, which outlive the command."""

import json
import os
import sys

import pytest
import submitit

from lightning_aux.cli import cluster
from lightning_aux.cli.compare_file import read_comparison
from lightning_aux.cli.progress import RunProgress
from lightning_aux.cli.training_run import TrainingRun
from tests.cli import fake_slurm
from tests.cli.comparing import toy

SLURM = ("--cluster=slurm", "--cluster-set", "timeout_min=10")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder with Slurm's commands, which are on PATH."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    fake_slurm.install(folder)
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 0)
    yield folder
    fake_slurm.end_all(folder)


def once(monkeypatch, act):
    """Do something when the command has begun to wait for its jobs."""
    acts = [act]

    def say(self, text):
        if acts:
            acts.pop()()

    monkeypatch.setattr(RunProgress, "say", say)


def interrupt():
    raise KeyboardInterrupt


def test_debug_jobs_train_what_processes_train(place, tmp_path):
    place.compare("--seeds=0")
    expected = place.result("baseline", 0)
    assert place.compare("--seeds=0", "--fresh", "--cluster=debug") == 0
    found = place.result("baseline", 0)
    assert found["history"] == expected["history"]
    assert found["metrics"] == expected["metrics"]


def test_local_jobs_train_and_one_that_crashes_is_a_failed_run(place, monkeypatch, capsys):
    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 0)
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    variants = {"crashes": {"callbacks": [toy("Dies", how=-11)]}}
    assert place.compare("--seeds=0", "--cluster=local", variants=variants) == 1
    assert place.result("baseline", 0)["metrics"]["test_error"] > 0
    assert "left no result" in place.result("crashes", 0)["error"]
    error = (place.run_directory("crashes", 0) / "error.txt").read_text()
    assert "Segmentation fault" in error
    assert "in on_train_start" in error
    assert "Some runs went on side by side" in capsys.readouterr().out


def test_slurm_jobs_go_on_without_the_command_and_are_not_submitted_twice(
    place, slurm, monkeypatch, capsys
):
    """Ctrl-C leaves on disk what the end of the command leaves."""
    go = place.path / "go"
    variants = {"waits": {"callbacks": [toy("WaitsFor", path=str(go))]}}
    flags = ("--seeds=0", *SLURM, "--cluster-set", "slurm_partition=gpu")
    once(monkeypatch, interrupt)
    assert place.compare(*flags, variants=variants) == 130
    assert "waits for them again, `scancel" in capsys.readouterr().out

    once(monkeypatch, go.touch)
    assert place.compare(*flags, variants=variants) == 0
    assert "still on the cluster" in capsys.readouterr().out
    assert len(fake_slurm.calls(slurm, "sbatch")) == 1
    assert not fake_slurm.calls(slurm, "scancel")
    (script,) = slurm.glob("*.sh")
    assert "#SBATCH --partition=gpu" in script.read_text()
    assert "#SBATCH --array=0-1" in script.read_text()
    assert place.result("waits", 0)["metrics"] == place.result("baseline", 0)["metrics"]


def test_a_job_that_slurm_ends_is_a_failed_run_that_is_submitted_again(
    place, slurm, monkeypatch, capsys
):
    go = place.path / "go"
    settings = {"trainer.callbacks": [toy("WaitsFor", path=str(go))]}

    def cancel():
        fake_slurm.end_all(slurm)

    once(monkeypatch, cancel)
    assert place.compare("--seeds=0", *SLURM, set=settings) == 1
    assert "left no result (cancelled)" in place.result("baseline", 0)["error"]
    go.touch()
    assert place.compare("--seeds=0", *SLURM, set=settings) == 0
    assert len(fake_slurm.calls(slurm, "sbatch")) == 2


def test_a_job_of_an_older_config_is_cancelled(place, slurm, monkeypatch):
    go = place.path / "go"
    settings = {"trainer.callbacks": [toy("WaitsFor", path=str(go))]}
    once(monkeypatch, interrupt)
    assert place.compare("--seeds=0", *SLURM, set=settings) == 130
    job = json.loads((place.run_directory("baseline", 0) / "job.json").read_text())["job_id"]

    go.touch()
    assert place.compare("--seeds=0", "--epochs=2", *SLURM, set=settings) == 0
    assert fake_slurm.calls(slurm, "scancel") == [f"scancel {job}"]
    assert len(place.result("baseline", 0)["history"]) == 2


def test_fresh_waits_until_the_cancelled_job_has_ended(place, slurm, monkeypatch, capsys):
    """The old job finishes while it is being cancelled; its result is not that of the new one."""
    go = place.path / "go"
    settings = {"trainer.callbacks": [toy("WaitsFor", path=str(go))]}
    once(monkeypatch, interrupt)
    assert place.compare("--seeds=0", "--fresh", *SLURM, set=settings) == 130
    assert "command without --fresh waits for them again" in " ".join(
        capsys.readouterr().out.split()
    )
    record = place.run_directory("baseline", 0) / "job.json"
    old = json.loads(record.read_text())["job_id"]

    (slurm / "slow").touch()
    once(monkeypatch, go.touch)
    assert place.compare("--seeds=0", "--fresh", *SLURM, set=settings) == 0
    said = [line.split() for line in (slurm / "calls").read_text().splitlines()]
    names = [line[0] for line in said]
    assert said.count(["scancel", old]) == 2, "asked for, and carried out two seconds later"
    second = names.index("sbatch", names.index("sbatch") + 1)
    assert second > max(i for i, name in enumerate(names) if name == "scancel")
    assert json.loads(record.read_text())["job_id"] != old


def test_a_cancelled_job_that_does_not_end_is_an_error(place, slurm, monkeypatch, capsys):
    settings = {"trainer.callbacks": [toy("WaitsFor", path=str(place.path / "never"))]}
    once(monkeypatch, interrupt)
    assert place.compare("--seeds=0", *SLURM, set=settings) == 130
    monkeypatch.setattr("lightning_aux.cli.cluster._cancel", lambda *job: None)
    monkeypatch.setattr("lightning_aux.cli.cluster.PATIENCE", 0.0)
    with pytest.raises(SystemExit):
        place.compare("--seeds=0", "--fresh", *SLURM, set=settings)
    assert "not ended after 0 seconds" in capsys.readouterr().err
    assert len(fake_slurm.calls(slurm, "sbatch")) == 1


def test_runs_whose_jobs_go_on_are_not_trained_elsewhere(place, slurm, monkeypatch, capsys):
    settings = {"trainer.callbacks": [toy("WaitsFor", path=str(place.path / "go"))]}
    once(monkeypatch, interrupt)
    assert place.compare("--seeds=0", *SLURM, set=settings) == 130
    job = json.loads((place.run_directory("baseline", 0) / "job.json").read_text())["job_id"]
    for flags in ((), ("--fresh",), ("--cluster=local",)):
        with pytest.raises(SystemExit) as stop:
            place.compare("--seeds=0", *flags, set=settings)
        assert stop.value.code == 2
        assert f"--cluster slurm, or end what is there: `scancel {job}`" in capsys.readouterr().err
    fake_slurm.end_all(slurm)
    (place.path / "go").touch()
    assert place.compare("--seeds=0", set=settings) == 0


def test_a_job_whose_run_has_finished_does_nothing(place):
    """As when Slurm requeues it at its very end."""
    place.compare("--seeds=0")
    file = place.run_directory("baseline", 0) / "result.json"
    before = file.stat().st_mtime_ns
    (variant,) = read_comparison(place.path / "compare.yaml").variants.values()
    cluster._train(TrainingRun(variant, 0, file.parent))
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--cluster=slurm",), "--cluster-set timeout_min=60"),
        ((*SLURM, "--cluster-set", "slurm_partion=gpu"), "slurm_partion"),
        ((*SLURM, "--cluster-set", "timeout_min=long"), "timeout_min"),
        ((*SLURM, "--jobs=2"), "not allowed with"),
        (("--cluster-set", "timeout_min=10"), "name a cluster with --cluster"),
    ],
)
def test_a_wrong_setting_ends_before_anything_is_submitted(place, slurm, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        place.compare(*flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (slurm / "calls").exists()


def test_no_slurm_is_said(place, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as stop:
        place.compare(*SLURM)
    assert stop.value.code == 2
    assert "srun" in capsys.readouterr().err


def test_a_missing_package_is_named_with_what_installs_it(place, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "lightning_aux.cli.cluster", raising=False)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(SystemExit) as stop:
        place.compare("--cluster=debug")
    assert stop.value.code == 2
    assert "pip install 'lightning-aux[cluster]'" in capsys.readouterr().err
