"""`lightning-aux teach`: from one config to a folder of logits, and from there to a student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_aux.cli import main
from lightning_aux.teachers.storage import LogitsFile
from tests.contract.models import Classifier, Samples


def config(tmp_path: Path, *callbacks: dict[str, Any], name: str = "config.yaml") -> str:
    content = {
        "seed_everything": 1,
        "model": {"class_path": "tests.contract.models.Classifier", "init_args": {"dropout": 0.5}},
        "data": {"class_path": "tests.contract.models.SamplesModule"},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path / "runs"),
            "callbacks": [
                *callbacks,
                {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path)}},
            ],
        },
    }
    path = tmp_path / name
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_a_trained_model_is_written_and_teaches_another(tmp_path, capsys):
    path, out = config(tmp_path), str(tmp_path / "logits")
    assert main(["fit", "--config", path]) == 0
    (checkpoint,) = tmp_path.glob("*.ckpt")
    saved = sorted((tmp_path / "runs").rglob("*"))
    arguments = ["--ckpt_path", str(checkpoint), "--storage", "float32"]
    assert main(["teach", "--config", path, "--out", out, *arguments]) == 0
    assert f"wrote {out}, 0.00" in capsys.readouterr().out
    assert sorted((tmp_path / "runs").rglob("*")) == saved  # no log, no second config

    model = Classifier()
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    with torch.no_grad():
        expected = model.eval()(Samples(16).x)
    found = LogitsFile(out, "test").rows(torch.arange(16), torch.device("cpu"))
    assert torch.allclose(found, expected, atol=1e-6)

    student = config(
        tmp_path,
        {"class_path": "StoredTeacher", "init_args": {"path": out}},
        {"class_path": "SelfDistillation", "init_args": {"teacher": "stored"}},
        name="student.yaml",
    )
    assert main(["fit", "--config", student]) == 0


def test_the_k_most_probable_classes_are_written(tmp_path):
    path, out = config(tmp_path), str(tmp_path / "logits")
    assert main(["teach", "--config", path, "--out", out, "--storage", "top-k", "--k", "2"]) == 0
    assert {each.name for each in (tmp_path / "logits").iterdir()} == {
        "logits.json", "logits.npy", "classes.npy", "rest.npy", "targets.npy",
    }  # fmt: skip


def test_a_config_that_fit_has_saved_will_do(tmp_path):
    assert main(["fit", "--config", config(tmp_path)]) == 0
    (saved,) = (tmp_path / "runs").rglob("config.yaml")
    out = str(tmp_path / "logits")
    assert main(["teach", "--config", str(saved), "--out", out]) == 0


def test_what_is_wrong_is_said_in_one_line(tmp_path, capsys):
    path, out = config(tmp_path), str(tmp_path / "logits")
    for arguments, message in (
        (["--config", "nowhere.yaml", "--out", out], "'nowhere.yaml' is not a file"),
        (["--config", path], "--out"),
        (["--config", path, "--out", out, "--storage", "int8"], "--storage"),
        (["--config", path, "--out", str(tmp_path)], "is there already"),
        (["--config", path, "--out", out, "--storage", "top-k"], "k=None and storage='top-k'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["teach", *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
        assert not Path(out).exists()
