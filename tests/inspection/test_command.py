"""`lightning-aux inspect`: from a config to tables, a page and an exit status."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_aux.cli import main

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
     if (found := shutil.which(name))), None
)  # fmt: skip


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
def test_the_page_is_drawn_by_a_browser(tmp_path) -> None:
    page, picture = tmp_path / "out.html", tmp_path / "out.png"
    main(["inspect", "--config", config(tmp_path, EMA), "--steps", "0", "--html", str(page)])
    subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=400,900",
         f"--screenshot={picture}", page.as_uri()],
        check=True, timeout=60,
    )  # fmt: skip
    assert len(set(picture.read_bytes())) > 200  # not one colour
