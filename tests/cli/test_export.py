"""`lightning-aux export`: from a run of the command to a plain file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_aux.cli import main
from tests.contract.models import Classifier


class ByName(Classifier):
    """Gives its batches names, after the transfer to the device."""

    def __init__(self) -> None:
        super().__init__(norm=True)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return dict(zip("xy", batch, strict=True))

    def forward(self, batch: Any) -> Any:
        return super().forward(batch["x"])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("seen", batch["x"].mean())
        return torch.nn.functional.cross_entropy(self(batch), batch["y"])

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return None


class Frozen(ByName):
    """With its BatchNorm in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder[1].eval()


def run(tmp_path: Path, *callbacks: str, model: Any = None, **trainer: Any) -> Path:
    norm = {"class_path": "tests.contract.models.Classifier", "init_args": {"norm": True}}
    config = {
        "seed_everything": 1,
        "model": norm if model is None else {"class_path": f"tests.cli.test_export.{model}"},
        "data": {"class_path": "tests.contract.models.SamplesModule"},
        "trainer": {
            **trainer,
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path),
            "callbacks": [
                *({"class_path": each} for each in callbacks),
                {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path)}},
            ],
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "config.yaml")]) == 0
    (path,) = tmp_path.glob("*.ckpt")
    return path


def test_the_average_of_a_run_becomes_a_plain_checkpoint(tmp_path, capsys):
    path, out = run(tmp_path, "EMAWeights"), tmp_path / "average.pt"
    assert main(["export", str(path), "--out", str(out)]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    source, written = (torch.load(each, weights_only=True) for each in (path, out))
    kept = source["lightning_aux"]["members"]["ema_weights.teacher"]["weights"]
    assert written["state_dict"].keys() == source["state_dict"].keys()
    assert all(torch.equal(value, kept[name]) for name, value in written["state_dict"].items())


def test_batch_norm_is_measured_again_over_the_training_data(tmp_path, capsys):
    path, out = run(tmp_path, "EMAWeights"), tmp_path / "average.pt"
    config = ["--recompute-batch-norm", str(tmp_path / "config.yaml")]
    main(["export", str(path), "--out", str(out)])
    before = torch.load(out, weights_only=True)["state_dict"]
    assert main(["export", str(path), "--out", str(out), *config]) == 0
    assert "measured the statistics of 1 BatchNorm layer\n" in capsys.readouterr().out
    after = torch.load(out, weights_only=True)["state_dict"]
    from tests.contract.models import SamplesModule

    data = SamplesModule()
    data.setup("fit")
    x = torch.cat([batch[0] for batch in data.train_dataloader()]).double()
    inputs = x @ after["encoder.0.weight"].double().T + after["encoder.0.bias"].double()
    assert torch.allclose(after["encoder.1.running_mean"].double(), inputs.mean(0), atol=1e-5)
    assert torch.allclose(after["encoder.1.running_var"].double(), inputs.var(0), rtol=1e-4)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"encoder.1.running_mean", "encoder.1.running_var"}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_the_model_is_run_as_it_was_trained(tmp_path, capsys, precision):
    path = run(tmp_path, "EMAWeights", model="ByName", precision=precision)
    out = tmp_path / "average.pt"
    config = ["--recompute-batch-norm", str(tmp_path / "config.yaml")]
    assert main(["export", str(path), "--out", str(out), *config]) == 0
    assert "measured the statistics of 1 BatchNorm layer\n" in capsys.readouterr().out
    from tests.contract.models import SamplesModule

    data = SamplesModule()
    data.setup("fit")
    x = torch.cat([batch[0] for batch in data.train_dataloader()]).double()
    after = torch.load(out, weights_only=True)["state_dict"]
    inputs = x @ after["encoder.0.weight"].double().T + after["encoder.0.bias"].double()
    error = 1e-4 if precision == "32-true" else 0.03
    assert torch.allclose(after["encoder.1.running_mean"].double(), inputs.mean(0), atol=error)
    assert torch.allclose(after["encoder.1.running_var"].double(), inputs.var(0), rtol=error)


def test_a_frozen_norm_is_left_and_named(tmp_path, capsys):
    path = run(tmp_path, "EMAWeights", model="Frozen")
    out = tmp_path / "average.pt"
    config = ["--recompute-batch-norm", str(tmp_path / "config.yaml")]
    assert main(["export", str(path), "--out", str(out), *config]) == 0
    said = capsys.readouterr().out
    assert "measured the statistics of 0 BatchNorm layers" in said
    assert "left as they are, in evaluation mode from the start: encoder.1" in said
    after = torch.load(out, weights_only=True)["state_dict"]
    assert torch.equal(after["encoder.1.running_var"], torch.ones(len(after["encoder.1.bias"])))


def test_what_is_wrong_is_said_in_one_line(tmp_path, capsys):
    path = run(tmp_path)
    for arguments, message in (
        ([str(path), "--out", str(tmp_path / "out.pt")], "has no averaged weights"),
        (["nowhere.ckpt", "--out", str(tmp_path / "out.pt")], "'nowhere.ckpt' is not a file"),
        ([str(path)], "--out"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["export", *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
