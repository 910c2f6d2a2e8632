"""What stands on a report is what stands in the files."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from lightning_aux.cli import main
from lightning_aux.report import charts
from lightning_aux.report.page import REPORT_FILE
from tests.report.folders import EPOCHS, STEPS, accuracy, comparison_folder, run_folder


def page(folder: Path) -> str:
    assert main(["report", str(folder)]) == 0
    return (folder / REPORT_FILE).read_text(encoding="utf-8")


def drawn(html: str) -> dict[str, dict[str, Any]]:
    """The charts by title, each with its lines by label."""
    (data,) = re.findall(r'<script type="application/json" id="charts">(.*?)</script>', html)
    titles = re.findall(r'<figure data-chart="\d+"><h3>(.*?)</h3>', html)
    return {
        title: {line["label"]: line for line in chart["lines"]}
        for title, chart in zip(titles, json.loads(data), strict=True)
    }


def cells(html: str, row: str) -> dict[str, str]:
    """The table row of a variant by column, without its tags."""
    (found,) = re.findall(rf'<tr><th scope="row">{row}</th>(.*?)</tr>', html)[:1]
    columns = re.findall(r'data-label="(.*?)"[^>]*>(.*?)</td>', found)
    return {name: re.sub(r"<.*?>", "", text) for name, text in columns}


def said(html: str) -> str:
    """What the page says is missing."""
    found = re.search(r'<ul class="problems">(.*?)</ul>', html)
    return found[1] if found else ""


# ------------------------------------------------------------------------------- whole folders
def test_lines_of_a_comparison_are_means_over_seeds(tmp_path: Path) -> None:
    found = drawn(page(comparison_folder(tmp_path)))

    term = found["self_distillation"]
    assert list(term) == ["distilled"], "the baseline logged no such term"
    assert term["distilled"]["x"] == [epoch * STEPS + 1 for epoch in range(EPOCHS)]
    assert term["distilled"]["y"] == pytest.approx([1.5 + 0.1 * e for e in range(EPOCHS)])
    assert found["weight of self_distillation"]["distilled"]["y"][-1] == pytest.approx(1.0)
    assert found["main loss"].keys() == {"baseline", "distilled"}
    assert found["cosine of self_distillation"]["distilled"]["y"] == [-0.25] * EPOCHS
    assert found["gradient norm of the loss"]["distilled"]["y"] == [3.0] * EPOCHS
    assert found["ratio to the loss of self_distillation"]["distilled"]["y"][0] == 0.5
    assert found["distance of ema"]["distilled"]["y"][3] == pytest.approx(0.03)
    assert found["dropout_schedule: p"]["distilled"]["y"] == [0.1] * EPOCHS
    assert "val_acc" not in found, "it is the large picture"


def test_everything_that_was_logged_of_ours_is_on_the_page(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    names = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    found = drawn(page(folder))
    lines = sum(len(chart) for chart in found.values())
    assert lines == len([name for name in names if name not in ("step", "epoch")])


def test_the_table_has_the_statistics_of_the_results(tmp_path: Path) -> None:
    html = page(comparison_folder(tmp_path))
    values = [
        [100 * accuracy(v, s, EPOCHS - 1) for s in range(3)] for v in ("baseline", "distilled")
    ]
    distilled = [value + 0.1 * seed for seed, value in enumerate(values[1])]
    test = ttest_rel(distilled, values[0])
    low, high = test.confidence_interval()

    row = cells(html, "distilled")
    mean = np.mean(distilled) - np.mean(values[0])
    assert row["difference [95 %]"] == f"+{mean:.1f} [+{low:.1f}, +{high:.1f}]"
    assert row["p, corrected"] == "&lt; 0.001"
    assert row["verdict"] == "better"
    assert row["time per step"] == "× 1.50"
    assert row["peak memory"] == "× 1.50"
    assert cells(html, "baseline")["test_acc (%)"] == "76.0 ± 1.0"
    assert said(html) == ""


def test_a_run_has_one_chart_for_what_has_one_unit(tmp_path: Path) -> None:
    found = drawn(page(run_folder(tmp_path / "run")))
    assert list(found["loss and terms"]) == ["main loss", "total loss", "self_distillation"]
    assert list(found["gradient norms"]) == [
        "gradient norm of the loss",
        "gradient norm of self_distillation",
    ]
    assert found["val_acc"]["val_acc"]["x"] == [1, 2, 3, 4, 5, 6]


def test_a_page_needs_no_other_file_and_escapes_what_users_wrote(tmp_path: Path) -> None:
    html = page(comparison_folder(tmp_path))
    assert not re.findall(r'(?:src|srcset|href)="(?!#)', html)
    assert "@import" not in html
    assert "url(http" not in html
    assert "<h1>Known &lt;numbers&gt;</h1>" in html
    assert len(html) < 300_000


def test_the_page_can_be_made_somewhere_else(tmp_path: Path, capsys: Any) -> None:
    folder = run_folder(tmp_path / "run")
    assert main(["report", str(folder), "--output", str(tmp_path / "other.html")]) == 0
    assert "wrote" in capsys.readouterr().out
    assert (tmp_path / "other.html").exists()
    assert not (folder / REPORT_FILE).exists()


# ------------------------------------------------------------------------------------- thinning
def test_a_long_line_is_thinned_out_and_its_spikes_stay() -> None:
    x = np.arange(100_000.0)
    mean = np.sin(x / 5_000)
    mean[31_415], mean[77_777] = 9.0, -9.0
    kept, thin, low, high = charts.thinned(x, mean, mean - 1, mean + 1)
    assert len(kept) <= charts.POINTS
    assert {31_415.0, 77_777.0, 99_999.0} <= set(kept)
    assert thin[list(kept).index(31_415)] == 9
    assert low.min() == -10
    assert high.max() == 10
    assert (np.diff(kept) > 0).all()


def test_a_short_line_is_left_as_it_is() -> None:
    x = np.arange(5.0)
    for whole, thin in zip((x, x, x, x), charts.thinned(x, x, x, x), strict=True):
        assert (whole == thin).all()


# ---------------------------------------------------------------------------------- broken input
@pytest.mark.parametrize("cut", [1, 2, 8], ids=["no end", "in a number", "in a row"])
def test_a_line_that_was_cut_is_left_out_and_said(tmp_path: Path, cut: int) -> None:
    folder = run_folder(tmp_path / "run")
    text = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").write_text(text[:-cut])
    html = page(folder)
    assert "metrics.csv: 1 line cut off" in said(html)
    assert len(drawn(html)["val_acc"]["val_acc"]["x"]) == EPOCHS - 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "metrics.csv is empty"),
        ("1,2,3\n4,5,6\n", "begins with &#x27;1,2,3&#x27; and not with the names"),
        (None, "metrics.csv is missing"),
    ],
)
def test_a_log_that_cannot_be_read_is_said(
    tmp_path: Path, content: str | None, expected: str
) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "metrics.csv").unlink()
    if content is not None:
        (folder / "metrics.csv").write_text(content)
    assert expected in said(page(folder))


def test_numbers_that_are_not_finite_are_gaps_and_said(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    text = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").write_text(text.replace("0.7,", "nan,").replace("0.75", "inf"))
    assert "0.75" in text
    html = page(folder)
    values = drawn(html)["val_acc"]["val_acc"]["y"]
    assert None in values
    assert all(value is None or math.isfinite(value) for value in values)
    assert "val_acc" in said(html)


def test_a_run_without_validation_and_without_a_config_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.csv").write_text("epoch,step,train_loss\n0,9,0.5\n")
    missing = said(page(folder))
    assert "Nothing was logged in validation" in missing
    assert "Nothing of lightning_aux was logged" in missing
    assert "no configuration" in missing


def test_an_interrupted_comparison_says_which_runs_are_missing(tmp_path: Path) -> None:
    folder = comparison_folder(tmp_path)
    where = folder / "runs" / "distilled"
    (where / "seed2" / "result.json").unlink()
    (where / "seed1" / "metrics.csv").unlink()
    failed = json.loads((where / "seed0" / "result.json").read_text())
    (where / "seed0" / "result.json").write_text(json.dumps({**failed, "error": "OSError: <full>"}))
    html = page(folder)
    missing = said(html)
    assert (
        "distilled, seed 2: begun and not finished, there is no runs/distilled/seed2/result.json."
        in missing
    )
    assert "distilled, seed 1: metrics.csv is missing" in missing
    assert "distilled, seed 0 failed: OSError: &lt;full&gt;" in missing
    assert "failed: 1 of 2 seeds" in cells(html, "distilled")["verdict"]


def test_one_seed_has_no_interval_and_the_page_says_so(tmp_path: Path) -> None:
    html = page(comparison_folder(tmp_path, seeds=(0,)))
    assert "one seed only" in said(html)
    assert cells(html, "distilled")["bootstrap 95 %"] == "–"
    assert cells(html, "distilled")["p, corrected"] == "–"


def test_a_comparison_of_which_nothing_has_run_is_a_page_too(tmp_path: Path) -> None:
    folder = comparison_folder(tmp_path, seeds=(0, 1))
    for path in folder.glob("runs/*/*/*"):
        path.unlink()
    html = page(folder)
    assert "No run of baseline has finished." in html
    assert said(html).count("begun and not finished") == 4


@pytest.mark.parametrize("content", ["", "{", "[]", '{"title": 3}'])
def test_a_comparison_that_cannot_be_read_is_one_line(
    tmp_path: Path, content: str, capsys: Any
) -> None:
    (tmp_path / "comparison.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(tmp_path)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "comparison.json cannot be read" in error
    assert error.count("\n") == 1


def test_a_folder_with_neither_says_what_was_looked_for(tmp_path: Path, capsys: Any) -> None:
    run_folder(tmp_path / "deep" / "version_0")
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(tmp_path)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "neither a comparison (comparison.json) nor a run (metrics.csv" in error
    assert str(tmp_path / "deep" / "version_0") in error
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "nowhere")])
    assert "is not a folder" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- colours
def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_lines_have_enough_contrast(tmp_path: Path, theme: str) -> None:
    """WCAG 2.2, AA: 4.5 for text, 3 for graphics."""
    html = page(run_folder(tmp_path / "run"))
    start = ":root {" if theme == "light" else ':root[data-theme="dark"] {'
    rules = html[html.index(start) :].partition("}")[0]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", rules.replace("#fff;", "#ffffff;")))
    assert len(colours) > 15

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(colours[a]), luminance(colours[b])))
        return (high + 0.05) / (low + 0.05)

    for name in ("text", "soft", "good", "bad"):
        assert contrast(name, "card") >= 4.5
        if name in ("text", "soft"):
            assert contrast(name, "back") >= 4.5
    for name in (key for key in colours if key.startswith(("chart-series", "chart-reference"))):
        assert contrast(name, "card") >= 3


# --------------------------------------------------------------------------- of something else
def test_what_is_left_of_another_configuration_is_not_drawn(tmp_path: Path) -> None:
    folder = comparison_folder(tmp_path)
    for result in folder.glob("runs/distilled/*/result.json"):
        result.write_text(result.read_text().replace('"fingerprint": "', '"fingerprint": "old'))
    html = page(folder)
    assert said(html).count("another configuration") == 3
    assert "self_distillation" not in drawn(html), "its log is that of the other configuration too"


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": None},
        {"metrics": {"test_acc": None}},
        {"metrics": {"test_acc": "x"}},
        {"history": [{"val_acc": 0.5}]},
        {"seconds": None},
    ],
)
def test_a_result_with_something_else_in_it_is_no_result(tmp_path: Path, change: Any) -> None:
    folder = comparison_folder(tmp_path)
    file = folder / "runs" / "distilled" / "seed1" / "result.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert "distilled, seed 1: runs/distilled/seed1/result.json cannot be read" in said(
        page(folder)
    )


@pytest.mark.parametrize("stray", ['"', "\0" * 200_000, "nan,0,1"])
def test_a_line_of_anything_costs_that_line_alone(tmp_path: Path, stray: str) -> None:
    folder = run_folder(tmp_path / "run")
    header, *rows = (folder / "metrics.csv").read_text().splitlines()
    (folder / "metrics.csv").write_text("\n".join([header, rows[0], stray, *rows[1:], ""]))
    html = page(folder)
    assert "metrics.csv: 1 line cut off" in said(html)
    assert len(drawn(html)["val_acc"]["val_acc"]["x"]) == EPOCHS


def test_a_seed_that_diverges_is_a_gap_and_not_the_mean_of_the_others(tmp_path: Path) -> None:
    folder = comparison_folder(tmp_path)
    log = folder / "runs" / "distilled" / "seed1" / "metrics.csv"
    log.write_text(log.read_text().replace(",1.9,", ",nan,"))
    line = drawn(page(folder))["self_distillation"]["distilled"]
    assert [value is None for value in line["y"]] == [False] * 4 + [True, False]
