"""The command: callbacks of a config and callbacks of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_aux.cli import main
from lightning_aux.cli.trainer_cli import AuxCLI
from lightning_aux.engine import Attached

CONFIG = """
trainer:
  accelerator: cpu
  max_epochs: 1
  enable_progress_bar: false
  enable_model_summary: false
  logger: false
  enable_checkpointing: false
  callbacks:
    - {class_path: EMATeacher, init_args: {decay: 0.9}}
    - class_path: lightning.pytorch.callbacks.GradientAccumulationScheduler
      init_args: {scheduling: {0: 2}}
model: {class_path: tests.contract.models.Classifier}
data: {class_path: tests.contract.models.SamplesModule}
"""
ADDED = [
    "--trainer.callbacks+=SelfDistillation",
    "--trainer.callbacks.weight=0.25",
    "--trainer.callbacks+=DropoutSchedule",
    "--trainer.callbacks.p=0.1",
    "--trainer.callbacks.until=50%",
]
EXPECTED = [
    "EMATeacher(decay=0.9, name='ema'",
    "SelfDistillation(teacher='ema'",
    "DropoutSchedule(p=0.1, mode='early', until='50%'",
]


def ours(cli: AuxCLI) -> list[str]:
    return [repr(each) for each in cli.trainer.callbacks if isinstance(each, Attached)]


def assert_all_there(cli: AuxCLI) -> None:
    found = ours(cli)
    assert [text[: len(start)] for text, start in zip(found, EXPECTED, strict=True)] == EXPECTED
    assert "weight=0.25" in found[1]
    assert "GradientAccumulationScheduler" in [
        type(each).__name__ for each in cli.trainer.callbacks
    ]


@pytest.mark.parametrize("source", ["config", "two configs", "default config"])
def test_f66_callbacks_of_the_command_line_join_those_of_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    given = ["--config", str(tmp_path / "config.yaml")]
    if source == "two configs":
        (tmp_path / "more.yaml").write_text("trainer: {max_epochs: 2}\n")
        given += ["--config", str(tmp_path / "more.yaml")]
    kind: Any = AuxCLI
    if source == "default config":
        given = []

        class Defaulted(AuxCLI):
            def init_parser(self, **arguments: Any) -> Any:
                files = [str(tmp_path / "config.yaml")]
                return super().init_parser(default_config_files=files, **arguments)

        kind = Defaulted
    cli = kind(args=[*given, *ADDED], run=False)
    assert_all_there(cli)
    assert cli.trainer.max_epochs == (2 if source == "two configs" else 1)


def test_f66_what_is_printed_of_both_is_a_config_of_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    given, printed = ["--config", str(tmp_path / "config.yaml"), *ADDED], []
    for arguments in (given, ["--config", str(tmp_path / "printed.yaml")]):
        with pytest.raises(SystemExit) as stopped:
            main(["fit", *arguments, "--print_config"])
        assert stopped.value.code == 0
        printed.append(capsys.readouterr().out)
        (tmp_path / "printed.yaml").write_text(printed[0])
    assert printed[0] == printed[1]
    assert len(yaml.safe_load(printed[0])["trainer"]["callbacks"]) == 4


def test_f66_the_config_saved_beside_a_run_has_both_and_trains_again(
    tmp_path: Path,
) -> None:
    logged = CONFIG.replace(
        "logger: false",
        f"logger: {{class_path: CSVLogger, init_args: {{save_dir: '{tmp_path}'}}}}",
    )
    (tmp_path / "config.yaml").write_text(logged)
    assert main(["fit", "--config", str(tmp_path / "config.yaml"), *ADDED]) == 0
    (saved,) = tmp_path.rglob("version_0/config.yaml")
    callbacks = yaml.safe_load(saved.read_text())["trainer"]["callbacks"]
    names = [each["class_path"].rpartition(".")[2] for each in callbacks]
    assert names == ["EMATeacher", "GradientAccumulationScheduler", *names[2:]]
    assert names[2:] == ["SelfDistillation", "DropoutSchedule"]
    assert main(["fit", "--config", str(saved)]) == 0
