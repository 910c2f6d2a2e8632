"""``lightning.pytorch`` and ``pytorch_lightning``: one set of callbacks serves both.

The Trainer and the module are of one namespace, as Lightning itself asks; the callbacks are ours.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as unified
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_aux as aux
from tests.engine.small_models import equal, largest_difference, rows, weights

standalone = pytest.importorskip("pytorch_lightning")
NAMESPACES = {"lightning.pytorch": unified, "pytorch_lightning": standalone}


def net_of(namespace: ModuleType) -> Any:
    """A plain module of that namespace, which knows nothing of us."""

    class Net(namespace.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Tanh())
            self.classifier = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.encoder(x * x.new_tensor([1.0, 1.0, 1.0, 0.01])))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.02)

    torch.manual_seed(7)
    return Net()


def callbacks() -> list[Any]:
    return [
        aux.EMATeacher(decay=0.8),
        aux.SelfDistillation(on="encoder", divergence="mse"),
        aux.EMAAnchor(weight=0.5, entropy=0.1),
        aux.EarlyLearningRegularization(weight=1.0),
        aux.DropoutSchedule(0.4, until="50%"),
    ]


def trainer_of(namespace: ModuleType, folder: Path, attached: list[Any], epochs: int) -> Any:
    return namespace.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=False, callbacks=attached,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=folder,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMESPACES)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(name, tmp_path):
    """Early dropout is over when the run is cut, so no random number is drawn afterwards."""
    namespace = NAMESPACES[name]
    saved = tmp_path / "half.ckpt"

    class Saving(namespace.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(saved)

    whole = net_of(namespace)
    trainer_of(namespace, tmp_path, [*callbacks(), Saving()], 4).fit(whole, rows())
    resumed = net_of(namespace)
    again = callbacks()
    trainer_of(namespace, tmp_path, again, 4).fit(resumed, rows(), ckpt_path=saved)
    assert equal(weights(whole), weights(resumed))
    assert again[0].updates == 24
    checkpoint = torch.load(saved, weights_only=True)
    assert list(checkpoint["state_dict"]) == list(weights(net_of(namespace)))
    assert not equal(checkpoint["state_dict"], weights(whole))


def test_both_train_alike(tmp_path):
    results = []
    for namespace in NAMESPACES.values():
        model = net_of(namespace)
        torch.manual_seed(8)
        trainer_of(namespace, tmp_path, callbacks(), 3).fit(model, rows())
        results.append(weights(model))
    assert equal(*results)


@pytest.mark.parametrize("name", NAMESPACES)
def test_objectives_change_the_training_of_either(name, tmp_path):
    results = []
    for attached in ([], callbacks()):
        model = net_of(NAMESPACES[name])
        torch.manual_seed(8)
        trainer_of(NAMESPACES[name], tmp_path, attached, 2).fit(model, rows())
        results.append(weights(model))
    assert largest_difference(*results) > 1e-3


@pytest.mark.parametrize("name", NAMESPACES)
def test_nothing_is_left_on_the_module(name, tmp_path):
    left = []
    for attached in ([], callbacks()):
        model = net_of(NAMESPACES[name])
        trainer_of(NAMESPACES[name], tmp_path, attached, 1).fit(model, rows())
        left.append(sorted(model.__dict__))
        assert not any(module._forward_hooks for module in model.modules())
        assert model.encoder[1].p == 0.1
    assert left[0] == left[1]


SCRIPT = """
import sys
import torch
from torch import nn
import {namespace} as pl

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Tanh())
        self.classifier = nn.Linear(8, 3)

    def forward(self, x):
        return self.classifier(self.encoder(x))

net = Net.load_from_checkpoint(sys.argv[1], strict=True, weights_only=True).eval()
assert "lightning_aux" not in sys.modules
print(float(net(torch.ones(1, 4)).sum()))
"""


@pytest.mark.parametrize("name", NAMESPACES)
def test_a_process_that_has_never_heard_of_us_loads_the_checkpoint(name, tmp_path):
    model = net_of(NAMESPACES[name])
    trainer = trainer_of(NAMESPACES[name], tmp_path, callbacks(), 1)
    trainer.fit(model, rows())
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    script = tmp_path / "load.py"
    script.write_text(SCRIPT.format(namespace=name))
    done = subprocess.run(
        [sys.executable, script, tmp_path / "net.ckpt"],
        capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model.eval().classifier(model.encoder(torch.ones(1, 4))).sum()
    assert float(done.stdout) == pytest.approx(float(expected), abs=1e-5)
