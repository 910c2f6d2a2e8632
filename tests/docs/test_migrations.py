"""What docs/how-to/migrate.md says is equal: ours, against the other's rule as a plain loop."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_aux as aux

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "migrate.md"
STEPS_PER_EPOCH = 6
Weights = dict[str, Tensor]
ROWS = TensorDataset(
    torch.randn(48, 4, generator=torch.Generator().manual_seed(0)),
    torch.randint(3, (48,), generator=torch.Generator().manual_seed(0)),
)


class Net(L.LightningModule):
    """Keeps its weights of every step, the initial ones first."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        between = nn.BatchNorm1d(8) if norm else nn.Tanh()
        self.body = nn.Sequential(nn.Linear(4, 8), between, nn.Linear(8, 3))
        self.seen: list[Weights] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def keep(self) -> None:
        self.seen.append({name: p.detach().clone() for name, p in self.named_parameters()})

    def on_train_start(self) -> None:
        self.keep()

    def on_train_batch_end(self, *_: Any) -> None:
        self.keep()


def fit(*callbacks: L.Callback, norm: bool = False, epochs: int = 4) -> tuple[Net, L.Trainer]:
    L.seed_everything(1, verbose=False)
    module = Net(norm)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(ROWS, batch_size=8))
    return module, trainer


def average_of(trainer: L.Trainer, folder: Path) -> Weights:
    trainer.save_checkpoint(folder / "run.ckpt")
    aux.EMAWeights.export(folder / "run.ckpt", folder / "average.ckpt")
    return torch.load(folder / "average.ckpt", weights_only=True)["state_dict"]


def assert_equal(ours: Weights, theirs: Weights) -> None:
    floating = {name: value for name, value in theirs.items() if value.is_floating_point()}
    for name, value in floating.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6)
    assert floating


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"decay": 0.9}, {"decay": 0.9, "start": 1, "buffers": "average"}),
        ({"decay": 0.9, "use_buffers": False}, {"decay": 0.9, "start": 1}),
        (
            {"decay": 0.9, "update_starting_at_step": 5},
            {"decay": 0.9, "start": 6, "buffers": "average"},
        ),
        (
            {"decay": 0.9, "update_every_n_steps": 4},
            {"decay": 0.9 ** (1 / 4), "every": 4, "start": 1, "buffers": "average"},
        ),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_lightnings_average_is_ours(
    theirs: dict[str, Any], ours: dict[str, Any], tmp_path: Path
) -> None:
    module, _ = fit(EMAWeightAveraging(**theirs), norm=True)
    _, trainer = fit(aux.EMAWeights(**ours), norm=True)
    assert_equal(average_of(trainer, tmp_path), module.state_dict())


def test_lightnings_mean_over_epochs_is_ours(tmp_path: Path) -> None:
    class AtEpochEnds(WeightAveraging):
        def should_update(self, step_idx: Any = None, epoch_idx: Any = None) -> bool:
            return epoch_idx is not None and epoch_idx >= 1

    module, _ = fit(AtEpochEnds())
    _, trainer = fit(
        aux.SWATeacher(start="2ep", every="1ep"),
        aux.EMAWeights(teacher="swa"),
    )
    assert_equal(average_of(trainer, tmp_path), dict(module.named_parameters()))


def test_lightnings_swa_is_ours_of_one_epoch_less(tmp_path: Path) -> None:
    swa = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=2, annealing_epochs=1)
    module, _ = fit(swa, epochs=6)
    _, trainer = fit(
        aux.SWATeacher(start="1ep", every="1ep"),
        aux.EMAWeights(teacher="swa"),
        epochs=5,
    )
    assert_equal(average_of(trainer, tmp_path), dict(module.named_parameters()))


def timm_v3(step: int | None, decay: float, after: int) -> float:
    """`ModelEmaV3.get_decay` without warm-up."""
    if step is None:
        return decay
    return decay if step - after - 1 > 0 else 0.0


def composer(update: int, half_life: int, interval: int) -> float:
    """The smoothing of `EMA` in the update after this many batches."""
    return 2 ** (-interval / half_life) if update % interval == 0 else 1.0


LOOPS: dict[str, tuple[Callable[[int], float], dict[str, Any]]] = {
    "timm V2, or V3 without a step": (lambda n: timm_v3(None, 0.9, 0), {"decay": 0.9}),
    "timm V3 with a step": (lambda n: timm_v3(n, 0.9, 0), {"decay": 0.9, "start": 1}),
    "timm V3 after a step": (lambda n: timm_v3(n, 0.9, 5), {"decay": 0.9, "start": 6}),
    "Composer by half-life": (
        lambda n: 0.0 if n == 1 else composer(n, 5, 1),
        {"half_life": "5 steps", "start": 1},
    ),
    "Composer by half-life, every third batch": (
        lambda n: 0.0 if n == 6 else 1.0 if n < 6 else composer(n, 5, 3),
        {"half_life": "5 steps", "start": 6, "every": 3},
    ),
}


@pytest.mark.parametrize("case", LOOPS)
def test_averages_of_timm_and_composer_are_ours(case: str, tmp_path: Path) -> None:
    decay, arguments = LOOPS[case]
    module, trainer = fit(aux.EMAWeights(**arguments))
    average = copy.deepcopy(module.seen[0])
    for n, weights in enumerate(module.seen[1:], 1):
        for name, value in weights.items():
            average[name] = decay(n) * average[name] + (1 - decay(n)) * value
    assert_equal(average_of(trainer, tmp_path), average)


def test_timms_warm_up_to_a_plain_mean_is_ours(tmp_path: Path) -> None:
    module, trainer = fit(aux.SWATeacher(start=1, every=1), aux.EMAWeights(teacher="swa"))
    average = copy.deepcopy(module.seen[1])
    for n, weights in enumerate(module.seen[2:], 2):
        decay = 1 - (1 + (n - 1)) ** -1.0
        for name, value in weights.items():
            average[name] = decay * average[name] + (1 - decay) * value
    assert_equal(average_of(trainer, tmp_path), average)


class HandWritten(Net):
    """The loss of another library in the training step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.term(self(batch[0]), batch)

    def term(self, logits: Tensor, batch: Any) -> Tensor:
        raise NotImplementedError


def trained(kind: type[Net], *callbacks: L.Callback) -> Weights:
    L.seed_everything(1, verbose=False)
    module = kind()
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(ROWS, batch_size=8))
    return module.state_dict()


def test_torchdistills_kd_loss_is_ours() -> None:
    torch.manual_seed(3)
    teacher = nn.Linear(4, 3)
    alpha, temperature = 0.3, 4.0

    class Theirs(HandWritten):
        def term(self, logits: Tensor, batch: Any) -> Tensor:
            taught = teacher(batch[0]).detach()
            soft = F.kl_div(
                torch.log_softmax(logits / temperature, dim=1),
                torch.softmax(taught / temperature, dim=1),
                reduction="batchmean",
            )
            hard = F.cross_entropy(logits, batch[1])
            return alpha * hard + (1 - alpha) * temperature**2 * soft

    ours = aux.KnowledgeDistillation(
        module=teacher, temperature=temperature, weight=1 - alpha, blend=True
    )
    assert_equal(trained(Net, ours), trained(Theirs))


def test_composers_label_smoothing_is_ours() -> None:
    class Theirs(HandWritten):
        def term(self, logits: Tensor, batch: Any) -> Tensor:
            onehot = F.one_hot(batch[1], 3).float()
            return F.cross_entropy(logits, onehot * (1 - 0.2) + 0.2 / 3)

    assert_equal(trained(Net, aux.LabelSmoothing(weight=0.2)), trained(Theirs))


def test_every_class_that_the_page_names_of_ours_exists() -> None:
    named = re.findall(r"\[`(\w+)(?:\([^`]*\))?`\]\(\.\./cards", PAGE.read_text("utf-8"))
    assert named
    assert not [name for name in named if not hasattr(aux, name)]
