"""`lightning-aux inspect`: from a config to tables, a page and an exit status."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_aux.cli import main
from tests.report.browser import CHROMIUM, chromium


def config(tmp_path: Path, *callbacks: dict[str, Any]) -> str:
    content = {
        "seed_everything": 1,
        "model": {"class_path": "tests.contract.models.Classifier", "init_args": {"dropout": 0.5}},
        "data": {"class_path": "tests.contract.models.SamplesModule"},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path)}},
            "callbacks": [{"class_path": "ModelCheckpoint"}, *callbacks],
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


EMA = {"class_path": "EMATeacher", "init_args": {"decay": 0.9}}
PUPIL = {"class_path": "SelfDistillation", "init_args": {"teacher": "ema"}}
STRANGER = {"class_path": "SelfDistillation", "init_args": {"teacher": "emma"}}


def test_all_that_works_is_status_0_and_nothing_is_written(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    path = config(tmp_path, EMA, PUPIL)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    assert main(["inspect", "--config", path, "--steps", "1"]) == 0
    out = capsys.readouterr().out
    assert "All 2 callbacks work on this batch." in out
    assert "not of lightning_aux: ModelCheckpoint." in out
    assert "encoder.2" in out
    assert "dropout 0.5" in out
    assert "logits = " in out
    assert list(work.iterdir()) == []
    assert [each.name for each in tmp_path.iterdir() if each.name != "work"] == ["config.yaml"]


def test_what_would_fail_is_status_1_and_is_on_the_page_too(tmp_path, capsys) -> None:
    page = tmp_path / "out.html"
    path = config(tmp_path, EMA, STRANGER)
    arguments = ["inspect", "--config", path, "--steps", "0", "--html", str(page)]
    assert main(arguments) == 1
    assert "no teacher is called 'emma'" in " ".join(capsys.readouterr().out.split())
    assert "no teacher is called &#x27;emma&#x27;" in page.read_text("utf-8")


def test_a_wrong_config_is_status_2(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", "--config", "nowhere.yaml"])
    assert stopped.value.code == 2
    assert "inspect: 'nowhere.yaml' is not a file" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_page_fits_a_telephone_and_needs_no_other_file(tmp_path) -> None:
    file = tmp_path / "out.html"
    main(["inspect", "--config", config(tmp_path, EMA), "--steps", "0", "--html", str(file)])
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 390, "height": 844})
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        assert page.get_by_text("a copy of the weights").first.is_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert asked == [file.as_uri()]
