"""Plain checkpoints of an average: loaded by Lightning and torch where we are not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_aux as aux
from lightning_aux.weights import export
from lightning_aux.weights.files import read_checkpoint, write_checkpoint
from tests.engine.small_models import Classifier, equal, rows, weights

# A module of the user's, in a file that knows nothing of us.
THEIRS = """
import sys
import lightning as L
import torch
from torch import nn

class Tied(L.LightningModule):
    def __init__(self, width=4):
        super().__init__()
        self.save_hyperparameters()
        self.inner = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.outer = nn.Linear(width, width, bias=False)
        self.outer.weight = self.inner.weight

    def forward(self, x):
        return self.outer(self.norm(torch.relu(self.inner(x))))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""
LOADS = (
    THEIRS
    + """
path = sys.argv[1]
module = Tied.load_from_checkpoint(path)
again = Tied()
again.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=True)
trainer = L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
data = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))
)
trainer.test(again, data, ckpt_path=path)
assert not any(name.startswith("lightning_aux") for name in sys.modules)
assert module.outer.weight is module.inner.weight
torch.save(module.state_dict(), path + ".seen")
"""
)


@pytest.fixture
def tied() -> Any:
    found: dict[str, Any] = {"__name__": "theirs"}
    exec(THEIRS, found)
    return found["Tied"]


def trained(plain_trainer: Any, module: Any, path: Path, *callbacks: Any) -> None:
    trainer = plain_trainer(max_epochs=2, callbacks=list(callbacks))
    trainer.fit(module, rows())
    trainer.save_checkpoint(path)


def test_an_exported_average_loads_wherever_we_are_not(plain_trainer, tied, tmp_path):
    teacher, module = aux.EMATeacher(0.9), tied()
    trained(plain_trainer, module, tmp_path / "run.ckpt", teacher)
    out = tmp_path / "out" / "average.ckpt"
    export(tmp_path / "run.ckpt", out)
    script = tmp_path / "theirs.py"
    script.write_text(LOADS)
    subprocess.run([sys.executable, "-W", "ignore", script, out], check=True, cwd=tmp_path)
    seen = torch.load(f"{out}.seen", weights_only=True)
    average = teacher.store.state_dict(teacher.buffers_now())
    expected = {**average, "outer.weight": average["inner.weight"]}
    assert seen.keys() == module.state_dict().keys()
    assert equal(seen, {name: expected[name] for name in seen})
    assert not equal(seen, weights(module))
    plain = torch.load(out, weights_only=True)
    assert plain["hyper_parameters"] == {"width": 4}
    run = {"optimizer_states", "lr_schedulers", "callbacks", "loops", "lightning_aux"}
    assert not run & plain.keys()


def test_ties_that_the_file_no_longer_shows_are_found_by_name(plain_trainer, tied, tmp_path):
    """As a sharded run saves them: every name a tensor of its own."""
    teacher = aux.EMATeacher(0.9)
    trained(plain_trainer, tied(), tmp_path / "run.ckpt", teacher)
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    saved["state_dict"] = {name: value.clone() for name, value in saved["state_dict"].items()}
    torch.save(saved, tmp_path / "broken.ckpt")
    export(tmp_path / "broken.ckpt", tmp_path / "out.ckpt")
    seen = torch.load(tmp_path / "out.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(seen["outer.weight"], teacher.store.state_dict()["inner.weight"])


def test_half_precision_weights_stay_so(plain_trainer, tmp_path):
    trainer = plain_trainer(precision="bf16-true", callbacks=[aux.EMATeacher(0.9)])
    trainer.fit(Classifier(), rows())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    export(tmp_path / "run.ckpt", tmp_path / "out.ckpt")
    kept = torch.load(tmp_path / "run.ckpt", weights_only=True)["lightning_aux"]["members"]["ema"]
    seen = torch.load(tmp_path / "out.ckpt", weights_only=True)["state_dict"]
    assert {value.dtype for value in seen.values()} == {torch.bfloat16}
    assert {value.dtype for value in kept["weights"].values()} == {torch.float32}
    assert equal(seen, {name: value.bfloat16() for name, value in kept["weights"].items()})


def test_names_within_a_compiled_module_are_the_same_names(plain_trainer, tmp_path):
    module = Classifier()
    module.encoder = torch.compile(module.encoder, backend="eager")
    teacher = aux.EMATeacher(0.9)
    trained(plain_trainer, module, tmp_path / "run.ckpt", teacher)
    export(tmp_path / "run.ckpt", tmp_path / "out.ckpt")
    seen = torch.load(tmp_path / "out.ckpt", weights_only=True)["state_dict"]
    assert seen.keys() == module.state_dict().keys()
    average = teacher.store.state_dict()
    assert torch.equal(seen["encoder._orig_mod.0.weight"], average["encoder.0.weight"])


def test_which_average_is_asked_when_there_are_several(plain_trainer, tmp_path):
    path = tmp_path / "run.ckpt"
    trained(plain_trainer, Classifier(), path, aux.EMATeacher(0.9), aux.EMATeacher(0.5, "short"))
    with pytest.raises(aux.AuxiliaryError, match=r"Several teachers.*Choose one of 'ema', 'short'"):
        export(path, tmp_path / "out.ckpt")
    with pytest.raises(aux.AuxiliaryError, match=r"No teacher 'long'.*'ema', 'short'"):
        export(path, tmp_path / "out.ckpt", "long")
    export(path, tmp_path / "out.ckpt", "short")
    kept = torch.load(path, weights_only=True)["lightning_aux"]["members"]["short"]["weights"]
    assert equal(torch.load(tmp_path / "out.ckpt", weights_only=True)["state_dict"], kept)


def test_files_that_cannot_be_used_are_named(plain_trainer, tmp_path):
    with pytest.raises(aux.AuxiliaryError, match=r"'nowhere\.ckpt' is not a file"):
        export("nowhere.ckpt", tmp_path / "out.ckpt")
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    with pytest.raises(aux.AuxiliaryError, match="cannot be read with weights_only=True"):
        export(tmp_path / "text.ckpt", tmp_path / "out.ckpt")
    trained(plain_trainer, Classifier(), tmp_path / "plain.ckpt")
    with pytest.raises(aux.AuxiliaryError, match="has no averaged weights"):
        export(tmp_path / "plain.ckpt", tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.ones(2)}, path)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="No space"):
            write_checkpoint(read_checkpoint(path, "test"), {"a": torch.zeros(2)}, path)
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(2))
    assert [each.name for each in tmp_path.iterdir()] == ["weights.pt"]


def test_a_file_of_the_old_format_is_read(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(tmp_path / "old.pt", "test")["a"], torch.ones(2))


# ---------------------------------------------------- what must not pass for an average
def test_raw_weights_under_other_names_are_not_the_average(plain_trainer, tmp_path):
    class Renamed(Classifier):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            state = checkpoint["state_dict"]
            renamed = {name.replace("encoder", "net"): value for name, value in state.items()}
            checkpoint["state_dict"] = renamed

    trained(plain_trainer, Renamed(), tmp_path / "run.ckpt", aux.EMATeacher(0.9))
    with pytest.raises(
        aux.AuxiliaryError,
        match=r"no value for 'net\.0\.weight', 'net\.0\.bias' .*'encoder\.0\.weight', .*renamed",
    ):
        export(tmp_path / "run.ckpt", tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()


def test_what_a_module_adds_to_its_state_dict_stays_and_is_named(plain_trainer, tmp_path):
    class Adds(Classifier):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"]["scale"] = torch.tensor(2.5)

    trained(plain_trainer, Adds(), tmp_path / "run.ckpt", aux.EMATeacher(0.9))
    with pytest.warns(UserWarning, match="the average has no value for 'scale' of the state_dict"):
        export(tmp_path / "run.ckpt", tmp_path / "out.ckpt")
    written = torch.load(tmp_path / "out.ckpt", weights_only=True)["state_dict"]
    kept = torch.load(tmp_path / "run.ckpt", weights_only=True)["lightning_aux"]["members"]["ema"]
    assert written.pop("scale") == 2.5
    assert equal(written, kept["weights"])


def test_why_there_is_no_average_in_a_file_of_weights_alone(plain_trainer, tmp_path):
    saving = ModelCheckpoint(tmp_path, save_weights_only=True)
    plain_trainer(callbacks=[aux.EMAWeights(0.9), saving], enable_checkpointing=True).fit(
        Classifier(), rows()
    )
    with pytest.raises(
        aux.AuxiliaryError, match=r"save_weights_only=True.*save_weights_only=False"
    ):
        export(saving.best_model_path, tmp_path / "out.ckpt")


@pytest.mark.skipif(os.name != "posix", reason="rights of files")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_others_may_read_what_is_written_as_any_other_file(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_checkpoint({"a": torch.ones(2)}, {"a": torch.zeros(2)}, tmp_path / "out.pt")
    finally:
        os.umask(before)
    assert (tmp_path / "out.pt").stat().st_mode & 0o777 == 0o666 & ~mask
