"""Reports of what went wrong: the page says which file lacks what, and draws all the rest."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from lightning_aux.cli import main
from lightning_aux.comparison import (
    ERROR_FILE,
    Comparison,
    Measure,
    RunResult,
    Variant,
    run_directory,
    write_comparison,
    write_result,
)
from lightning_aux.report.charts import charts_of_comparison
from lightning_aux.report.drawing import draw
from lightning_aux.report.logs import read_log

SEEDS, EPOCHS = (0, 1), 4


def comparison(folder: Path) -> Comparison:
    """A finished comparison of two variants, whose val_acc is 0.1 per epoch, and more by 0.2."""
    names = {"baseline": 0.0, "taught": 0.2}
    variants = {name: Variant(name, {}, {"of": name}, {}) for name in names}
    decides = Measure("test_acc")
    made = Comparison("Toys", "", decides, (), "val_acc", "baseline", SEEDS, {}, variants)
    write_comparison(folder, made)
    for name, more in names.items():
        for seed in SEEDS:
            values = [0.1 * (epoch + 1) + more for epoch in range(EPOCHS)]
            history = [{"epoch": float(e), "val_acc": value} for e, value in enumerate(values)]
            result = RunResult(name, seed, variants[name].fingerprint(seed))
            result.metrics, result.history = {"test_acc": values[-1] + 0.01 * seed}, history
            where = run_directory(folder, name, seed)
            where.mkdir(parents=True)
            write_result(where, result)
            rows = "".join(f"{e},{10 * e + 9},{value}\n" for e, value in enumerate(values))
            (where / "metrics.csv").write_text("epoch,step,val_acc\n" + rows)
    return made


def changed(folder: Path, name: str, seed: int, **values: Any) -> Path:
    """Change the result of a run; returns its folder."""
    where = run_directory(folder, name, seed)
    content = json.loads((where / "result.json").read_text())
    (where / "result.json").write_text(json.dumps(content | values))
    return where


def page(folder: Path) -> str:
    assert main(["report", str(folder)]) == 0
    return unescape((folder / "report.html").read_text("utf-8"))


def missing(html: str) -> list[str]:
    """What the page says is missing."""
    return re.findall("<li>(.*?)</li>", html.partition("What is missing</h2>")[2].split("</ul>")[0])


def cell(html: str, name: str) -> str:
    """The first cell of a row."""
    found = re.search(rf'<th scope="row">{name}</th><td[^>]*><span>([^<]*)', html)
    assert found is not None
    return found[1]


def test_a_whole_comparison_lacks_nothing(tmp_path) -> None:
    comparison(tmp_path)
    html = page(tmp_path)
    assert missing(html) == []
    assert cell(html, "baseline") == "0.405 ± 0.007071"


def test_a_run_that_has_not_begun_is_named_with_its_file(tmp_path) -> None:
    comparison(tmp_path)
    where = run_directory(tmp_path, "taught", 1)
    for file in where.iterdir():
        file.unlink()
    said = "there is no runs/taught/seed1/result.json."
    assert missing(page(tmp_path)) == [f"taught, seed 1: begun and not finished, {said}"]
    where.rmdir()
    assert missing(page(tmp_path)) == [f"taught, seed 1: not begun, {said}"]


def test_a_half_written_result_is_no_result(tmp_path) -> None:
    comparison(tmp_path)
    file = run_directory(tmp_path, "taught", 1) / "result.json"
    file.write_text(file.read_text()[:50])
    html = page(tmp_path)
    assert missing(html) == ["taught, seed 1: runs/taught/seed1/result.json cannot be read."]
    assert cell(html, "taught").startswith("0.6 ")  # that of seed 0 alone


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"variant": "other"}, "is that of other, seed 1; left out."),
        ({"fingerprint": "old"}, "is that of another configuration than taught has now; left out."),
    ],
)
def test_the_result_of_something_else_is_left_out(tmp_path, values, said) -> None:
    comparison(tmp_path)
    changed(tmp_path, "taught", 1, metrics={"test_acc": 100.0}, **values)
    html = page(tmp_path)
    assert missing(html) == [f"taught, seed 1: runs/taught/seed1/result.json {said}"]
    assert cell(html, "taught").startswith("0.6 ")


def test_a_failed_run_shows_its_traceback_and_cuts_no_curve_short(tmp_path) -> None:
    comparison(tmp_path)
    where = changed(tmp_path, "taught", 1, error="ValueError: <boom>", metrics={}, history=[])
    (where / ERROR_FILE).write_text("Traceback\nValueError: <boom>\n")
    lines = (where / "metrics.csv").read_text().splitlines(keepends=True)
    (where / "metrics.csv").write_text("".join(lines[:2]))
    (tmp_path / "comparison.json").write_text(
        (tmp_path / "comparison.json").read_text().replace('"curve": "val_acc"', '"curve": null')
    )
    html = page(tmp_path)
    assert missing(html) == ["taught, seed 1 failed: ValueError: <boom>"]
    assert "<pre>Traceback\nValueError: <boom></pre>" in html
    data = json.loads(html.partition('id="charts">')[2].partition("</script>")[0])
    (taught,) = (line for line in data[0]["lines"] if line["label"] == "taught")
    assert taught["x"] == [1, 2, 3, 4]
    assert taught["y"] == pytest.approx([0.3, 0.4, 0.5, 0.6])


def test_a_metric_that_is_not_a_number_is_said_and_drawn_around(tmp_path) -> None:
    comparison(tmp_path)
    history = [{"epoch": e, "val_acc": 0.5 if e < 2 else float("nan")} for e in range(EPOCHS)]
    nan = {"test_acc": float("nan")}
    for seed in SEEDS:
        changed(tmp_path, "taught", seed, metrics=nan, history=history)
    html = page(tmp_path)
    assert missing(html) == [f"taught, seed {seed}: test_acc is nan." for seed in SEEDS]
    assert ">taught  0.5<" in html  # the line's name stands at its last finite value


def test_rows_without_an_epoch_are_read(tmp_path) -> None:
    """LearningRateMonitor writes past the Trainer, which alone knows the epoch."""
    (tmp_path / "metrics.csv").write_text(
        "epoch,step,lr-SGD,val_acc\n,4,0.5,\n0,9,,0.1\n,9,0.25,\n"
    )
    log = read_log(tmp_path)
    assert log.problems == []
    assert log.series["lr-SGD"].values.tolist() == [0.5, 0.25]
    (group,) = (g for g in charts_of_comparison({"run": {0: log}}) if "Schedules" in g.title)
    assert (group.charts[0].axis, group.charts[0].lines[0].x.tolist()) == ("step", [5.0, 10.0])


@pytest.mark.parametrize("row", ["", "0,9,1e308\n1,19,-1e308\n", "0,9,nan\n1,19,inf\n"])
def test_a_log_of_nothing_that_can_be_drawn_gives_a_page(tmp_path, row) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,val_acc\n" + row)
    said = missing(page(tmp_path))
    assert ("metrics.csv has the names of its columns and no values yet." in said) == (not row)


def test_a_folder_of_nothing_is_one_line_that_lists_what_was_looked_for(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(tmp_path)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for name in ("comparison.json", "metrics.csv", "config.yaml", "hparams.yaml"):
        assert name in said


def test_the_gradient_of_the_loss_is_beside_that_of_a_term(tmp_path) -> None:
    names = ("cosine", "norm", "ratio")
    header = ",".join(["aux/g/main_norm", *(f"aux/g/kd_{name}" for name in names)])
    (tmp_path / "metrics.csv").write_text(f"epoch,step,{header}\n0,9,4,-1,2,0.5\n0,19,4,-1,2,0.5\n")
    (group,) = charts_of_comparison({"taught": {0: read_log(tmp_path)}})
    said = [chart.title for chart in group.charts]
    assert said == [
        *("gradient norm of the loss", "gradient norm of kd"),
        *("ratio to the loss of kd", "cosine of kd"),
    ]
    term, loss = group.charts[1].lines
    assert (term.mean.tolist(), term.dashed) == ([2, 2], False)
    assert (loss.mean.tolist(), loss.dashed) == ([4, 4], True)


def test_the_numbers_at_an_axis_keep_their_digits(tmp_path) -> None:
    """Ticks at 0.001, 0.002 … are no 0.00."""
    (tmp_path / "metrics.csv").write_text("epoch,step,lr-SGD\n,9,0.001\n,19,0.004\n")
    (group,) = charts_of_comparison({"run": {0: read_log(tmp_path)}})
    assert re.findall(r">(0\.\d+)</text>", draw(group.charts[0]).svg) == [
        *("0.001", "0.002", "0.003", "0.004")
    ]
