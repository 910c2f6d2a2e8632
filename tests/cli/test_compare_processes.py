"""`lightning-aux compare`: every run in a process of its own, one at a time or several at once."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from lightning_aux.cli import processes
from tests.cli.comparing import toy


def found(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def alive(pid):
    """Whether a process goes on; one that nobody has waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def soon(condition):
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.fixture
def command(place):
    """Starts the command in a process of its own, whose runs say who they are and then wait."""
    started = []

    def start(*flags):
        said = place.path / "said"
        callbacks = [toy("Says", path=str(said))]
        settings = {"trainer.max_epochs": 1000, "model.init_args.wait": 0.1}
        arguments = place.write(variants={"a": {}}, set=settings | {"trainer.callbacks": callbacks})
        process = subprocess.Popen(
            [sys.executable, "-m", "lightning_aux.cli", *arguments, *flags],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        runs = 2 if "--jobs=2" in flags else 1
        assert soon(lambda: said.exists() and len(found(said)) == runs)
        return process, [each["pid"] for each in found(said)]

    yield start
    for process in started:
        process.kill()


@pytest.mark.parametrize(
    ("how", "said"),
    [(-11, "SIGSEGV"), (-9, "SIGKILL (as happens when memory runs out)"), (3, "with status 3")],
)
def test_a_run_that_ends_its_process_is_kept_as_failed_and_the_rest_goes_on(
    place, capsys, how, said
):
    variants = {"dies": {"callbacks": [toy("Dies", how=how)]}, "draws": {}}
    assert place.compare("--seeds=0", variants=variants) == 1
    assert said in place.result("dies", 0)["error"]
    assert place.result("draws", 0)["metrics"]["test_error"] > 0
    assert f"dies, seed 0 failed: {place.result('dies', 0)['error']}" in capsys.readouterr().out
    assert "last words" in (place.run_directory("dies", 0) / "error.txt").read_text()


def test_a_crash_says_where(place):
    place.compare("--seeds=0", variants={"dies": {"callbacks": [toy("Dies", how=-11)]}})
    assert "in on_train_start" in (place.run_directory("dies", 0) / "error.txt").read_text()


def test_failed_runs_are_made_again(place):
    mark = place.path / "mark"
    variants = {"once": {"callbacks": [toy("FailsOnce", path=str(mark))]}}
    assert place.compare("--seeds=0", variants=variants) == 1
    written = (place.run_directory("baseline", 0) / "result.json").stat().st_mtime_ns
    assert place.compare("--seeds=0", variants=variants) == 0
    assert (place.run_directory("baseline", 0) / "result.json").stat().st_mtime_ns == written
    assert not (place.run_directory("once", 0) / "error.txt").exists()


def test_every_run_has_a_process_and_the_environment_of_the_command(place, monkeypatch):
    said = place.path / "said"
    callbacks = [toy("Says", path=str(said))]
    for toys in ("one", "two"):  # the second time the server of processes is there already
        monkeypatch.setenv("TOY", toys)
        place.compare("--fresh", set={"trainer.callbacks": callbacks})
    runs = found(said)
    assert [run["TOY"] for run in runs] == ["one", "one", "two", "two"]
    assert {run["start_method"] for run in runs} == {multiprocessing.get_start_method()}
    assert len({run["pid"] for run in runs} | {os.getpid()}) == 5


def test_what_a_run_prints_is_in_its_log(place, capfd):
    place.compare("--seeds=0", set={"trainer.callbacks": [toy("Prints", text="hello there")]})
    assert "hello there" in (place.run_directory("baseline", 0) / "run.log").read_text()
    assert "hello there" not in capfd.readouterr().out


def test_jobs_are_trained_at_once_and_the_table_says_so(place, capsys):
    """Each of two runs waits for the other."""
    meets = [toy("Meets", path=str(place.path / "here"), others=2)]
    assert place.compare("--jobs=2", set={"trainer.callbacks": meets}) == 0
    assert {row["alone"] for row in place.rows("results.csv")} == {"False"}
    assert "Some runs went on side by side" in capsys.readouterr().out


def test_side_by_side_or_not_runs_train_the_same(place):
    place.compare()
    expected = [place.result("baseline", seed)["history"] for seed in (0, 1)]
    place.compare("--jobs=2", "--fresh")
    assert [place.result("baseline", seed)["history"] for seed in (0, 1)] == expected


def test_cores_and_devices_are_shared_among_runs_at_once(place, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(processes, "_cores", lambda: 6)
    monkeypatch.setattr(processes, "_cuda_devices", lambda: ["4", "7"])
    said = place.path / "said"
    callbacks = [
        toy("Says", path=str(said)),
        toy("Meets", path=str(place.path / "here"), others=2),
    ]
    place.compare("--jobs=2", set={"trainer.callbacks": callbacks})
    assert {run["CUDA_VISIBLE_DEVICES"] for run in found(said)} == {"4", "7"}
    assert {run["threads"] for run in found(said)} == {3}


def test_devices_are_those_that_the_command_may_use(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-8a")
    assert processes._cuda_devices() == ["5", "GPU-8a"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert processes._cuda_devices() == ["0", "1"]


def test_peak_memory_is_that_of_training_and_shown_beside_time(place, capsys):
    variants = {"large": {"callbacks": [toy("Allocates", megabytes=300)]}}
    place.compare("--seeds=0", variants=variants)
    base, large = (place.result(name, 0) for name in ("baseline", "large"))
    assert large["peak_bytes"] - base["peak_bytes"] == pytest.approx(300e6, rel=0.1)
    assert base["peak_bytes"] < 150e6, "what the process has before is not counted"
    assert base["device"] == "cpu"
    (row,) = [row for row in place.rows("summary.csv") if row["variant"] == "large"]
    ratio = large["peak_bytes"] / base["peak_bytes"]
    assert float(row["peak_ratio"]) == pytest.approx(ratio, rel=1e-4)
    output = capsys.readouterr().out
    assert f"{base['peak_bytes'] / 1e6:.3g} MB" in output
    assert f"× {ratio:.2f}" in output


def test_ctrl_c_ends_every_run(command):
    process, runs = command("--jobs=2", "--fresh")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "The same command without --fresh goes on" in output
    assert not any(map(alive, runs))


def test_runs_end_when_the_command_is_gone(command):
    process, runs = command("--jobs=2")
    process.kill()
    assert soon(lambda: not any(map(alive, runs)))


def test_two_commands_do_not_work_in_one_folder(place, command, capsys):
    process, _ = command("--jobs=2")
    with pytest.raises(SystemExit) as stop:
        place.compare("--seeds=0")
    assert stop.value.code == 2
    said = f"another compare works in {place.output}; wait for it or give --output"
    assert said in capsys.readouterr().err
    process.kill()
    process.wait()
    assert place.compare("--seeds=0") == 0, "its runs may still be about to end"


def test_a_metric_that_nobody_logs_ends_runs_that_go_on(place, monkeypatch):
    """The second would wait for ever."""
    monkeypatch.setattr(processes, "PATIENCE", 0.5)
    said = place.path / "said"
    variants = {"waits": {"callbacks": [toy("WaitsFor", path=str(place.path / "never"))]}}
    both = [toy("Says", path=str(said)), toy("Meets", path=str(place.path / "here"), others=2)]
    with pytest.raises(SystemExit):
        place.compare(
            *("--jobs=2", "--seeds=0"),
            variants=variants,
            metric="tset_error",
            set={"trainer.callbacks": both},
        )
    assert len(found(said)) == 2
    assert not any(alive(run["pid"]) for run in found(said))
    assert not (place.run_directory("waits", 0) / "result.json").exists()


@pytest.mark.parametrize("jobs", ["0", "-1", "two"])
def test_a_wrong_number_of_jobs_is_refused(place, capsys, jobs):
    with pytest.raises(SystemExit) as stop:
        place.compare(f"--jobs={jobs}")
    assert stop.value.code == 2
    assert "from 1 up" in capsys.readouterr().err
