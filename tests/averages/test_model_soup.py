"""``ModelSoup``: which files are in it, and BatchNorm measured as the model really ran."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_aux as aux
from tests.averages.test_candidates import Scored, state_of, val_loss
from tests.engine.small_models import CLASSES, Classifier, equal, rows, weights


def names(soup: aux.ModelSoup) -> list[str]:
    assert soup.soup is not None
    return [Path(each).name for each in soup.soup.members]


def moments(module: Scored, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of what the BatchNorm of these weights is given, over all training data in float64."""
    module = type(module)(norm=True)
    module.load_state_dict(state)
    inputs = Classifier.forward(module.double(), torch.cat([x for x, _ in rows()]).double())
    return inputs.detach().mean(0), inputs.detach().var(0)


def fit(plain_trainer: Any, module: Any, *callbacks: Any, data: Any = None, **options: Any) -> Any:
    trainer = plain_trainer(
        **{"max_epochs": 3, "enable_checkpointing": True} | options, callbacks=list(callbacks)
    )
    trainer.fit(module, rows() if data is None else data, rows(16))
    return trainer


def every(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{epoch}", monitor=None, save_top_k=-1)


# ---------------------------------------------------------------------------------- which files
@pytest.mark.parametrize("save_last", [True, "link"])
def test_the_newest_weights_count_once(plain_trainer, tmp_path, save_last):
    saving = ModelCheckpoint(
        tmp_path, "{epoch}", monitor="val_loss", save_top_k=-1, save_last=save_last
    )
    soup = aux.ModelSoup(kind="uniform")
    fit(plain_trainer, Scored(), saving, soup)
    assert (tmp_path / "last.ckpt").exists()
    assert sorted(names(soup)) == [f"epoch={number}.ckpt" for number in range(3)]
    sets = [state_of(tmp_path / f"epoch={number}.ckpt") for number in range(3)]
    for name, value in state_of(soup.path).items():
        mean = torch.stack([each[name].double() for each in sets]).mean(0)
        assert torch.allclose(value.double(), mean, atol=1e-7)


def test_a_last_file_with_weights_of_its_own_is_in_the_soup(plain_trainer, tmp_path):
    class Worsens(Scored):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("age", float(self.global_step))
            return super().training_step(batch, batch_idx)

    saving = ModelCheckpoint(
        tmp_path, "{epoch}", "age", mode="min", save_last=True, every_n_train_steps=6
    )
    soup = aux.ModelSoup(kind="uniform")
    fit(plain_trainer, Worsens(), saving, soup)
    assert names(soup) == ["epoch=0.ckpt", "last.ckpt"]


@pytest.mark.parametrize("weights_only", [True, False])
def test_all_files_without_a_monitor_are_found(plain_trainer, tmp_path, weights_only):
    (tmp_path / "epoch=7.ckpt").write_bytes(b"of another run")
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_weights_only=weights_only)
    soup = aux.ModelSoup(kind="uniform")
    fit(plain_trainer, Scored(), saving, soup)
    assert names(soup) == [f"epoch={number}.ckpt" for number in range(3)]


def test_those_from_before_a_run_was_resumed_too(plain_trainer, tmp_path):
    fit(plain_trainer, Scored(), every(tmp_path), aux.ModelSoup(kind="uniform"), max_epochs=2)
    soup = aux.ModelSoup(kind="uniform")
    trainer = plain_trainer(
        max_epochs=3, enable_checkpointing=True, callbacks=[every(tmp_path), soup]
    )
    trainer.fit(Scored(), rows(), rows(16), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert names(soup) == [f"epoch={number}.ckpt" for number in range(3)]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"save_last": True}, {"save_top_k": 0}, {"monitor": "val_loss", "save_top_k": 1}],
    ids=str,
)
def test_what_will_keep_fewer_than_two_is_refused_before_training(
    plain_trainer, tmp_path, arguments
):
    module = Scored()
    before = weights(module)
    saving = ModelCheckpoint(tmp_path, **arguments)
    with pytest.raises(aux.AuxiliaryError, match=r"save_top_k=.* keeps fewer than the two"):
        fit(plain_trainer, module, saving, aux.ModelSoup("val_loss"))
    assert equal(weights(module), before)


# ------------------------------------------------------------------------- what BatchNorm is given
@pytest.mark.parametrize("arguments", [{}, {"monitor": "val_loss", "mode": "min"}], ids=str)
def test_a_uniform_soup_is_measured_too(plain_trainer, tmp_path, arguments):
    soup, module = aux.ModelSoup(kind="uniform", **arguments), Scored(norm=True)
    fit(plain_trainer, module, every(tmp_path), soup)
    state = state_of(soup.path)
    mean, variance = moments(module, state)
    assert torch.allclose(state["norm.running_mean"].double(), mean, atol=1e-6)
    assert torch.allclose(state["norm.running_var"].double(), variance, rtol=1e-5)
    if arguments:
        assert val_loss(state, norm=True) == pytest.approx(soup.soup.score, abs=1e-6)


class Frozen(Scored):
    """Keeps its BatchNorm in evaluation mode, or only for the time of training."""

    always = True

    def on_train_epoch_start(self) -> None:
        self.norm.eval()

    def on_train_epoch_end(self) -> None:
        self.norm.train(not self.always)


@pytest.mark.parametrize("always", [True, False])
def test_a_frozen_norm_keeps_its_statistics(plain_trainer, tmp_path, caplog, always):
    soup, module = aux.ModelSoup("val_loss", "min"), Frozen(norm=True)
    module.always = always
    module.norm.running_mean.fill_(0.25)
    module.norm.running_var.fill_(1.5)
    with caplog.at_level("INFO"):
        fit(plain_trainer, module, every(tmp_path), soup)
    state = state_of(soup.path)
    assert torch.equal(state["norm.running_mean"], torch.full((CLASSES,), 0.25))
    assert torch.equal(state["norm.running_var"], torch.full((CLASSES,), 1.5))
    assert "model_soup does not measure 'norm'" in caplog.text


def as_dictionary(batch: list[Any]) -> dict[str, Tensor]:
    x, y = torch.utils.data.default_collate(batch)
    return {"x": x, "label": y}


class ByName(Scored):
    """Its batches are dictionaries, and nobody calls its forward."""

    forward = L.LightningModule.forward

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.norm(Classifier.forward(self, batch["x"]))
        self.log("train_loss", F.cross_entropy(logits, batch["label"]))
        return F.cross_entropy(logits, batch["label"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log(
            "val_loss", F.cross_entropy(self.norm(Classifier.forward(self, batch[0])), batch[1])
        )


def test_batches_by_name_and_no_forward(plain_trainer, tmp_path):
    soup, module = aux.ModelSoup(kind="uniform"), ByName(norm=True)
    trainer = fit(plain_trainer, module, every(tmp_path), soup, data=rows(collate_fn=as_dictionary))
    state = state_of(soup.path)
    mean, variance = moments(module, state)
    assert torch.allclose(state["norm.running_mean"].double(), mean, atol=1e-6)
    assert torch.allclose(state["norm.running_var"].double(), variance, rtol=1e-5)
    assert "train_loss" in trainer.callback_metrics


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_other_precisions_are_measured_as_they_trained(plain_trainer, tmp_path, precision):
    soup, module = aux.ModelSoup(kind="uniform"), Scored(norm=True)
    fit(plain_trainer, module, every(tmp_path), soup, precision=precision)
    state = state_of(soup.path)
    averaged = torch.stack(
        [state_of(each)["norm.running_mean"].double() for each in soup.soup.members]
    ).mean(0)
    mean, variance = moments(module, {name: value.float() for name, value in state.items()})
    error = 1e-9 if precision == "64-true" else 0.02
    assert torch.allclose(state["norm.running_mean"].double(), mean, atol=max(error, 1e-6))
    assert torch.allclose(state["norm.running_var"].double(), variance, rtol=max(error, 1e-5))
    assert not torch.allclose(averaged, mean, atol=0.02)


class Manual(Scored):
    """In manual optimisation, on a model of two parts."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__(norm)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        self.optimizers().step()
        self.optimizers().zero_grad()


def test_in_manual_optimisation_nothing_is_stepped(plain_trainer, tmp_path):
    soup, module = aux.ModelSoup(kind="uniform"), Manual()
    trainer = fit(plain_trainer, module, every(tmp_path), soup)
    assert equal(weights(module), state_of(tmp_path / "epoch=2.ckpt"))
    assert trainer.global_step == 18
    mean, _ = moments(module, state_of(soup.path))
    assert torch.allclose(state_of(soup.path)["norm.running_mean"].double(), mean, atol=1e-6)


class Paired(Manual):
    """Takes two arguments, which nobody could guess from a batch."""

    def forward(self, x: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        return super().forward(x * scale)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(F.cross_entropy(self(batch[0], 1.0), batch[1]))
        self.optimizers().step()
        self.optimizers().zero_grad()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0], 1.0), batch[1]))


def test_taps_say_how_the_model_runs(plain_trainer, tmp_path):
    soup, module = aux.ModelSoup(kind="uniform"), Paired()
    taps = aux.Taps(forward=lambda module, batch: module(batch[0], 1.0))
    fit(plain_trainer, module, every(tmp_path), soup, taps)
    mean, _ = moments(module, state_of(soup.path))
    assert torch.allclose(state_of(soup.path)["norm.running_mean"].double(), mean, atol=1e-6)


@pytest.mark.parametrize("kind", ["uniform", "greedy"])
def test_a_model_that_cannot_be_run_costs_the_statistics_not_the_soup(
    plain_trainer, tmp_path, kind
):
    soup = aux.ModelSoup("val_loss", "min", kind=kind)
    with pytest.warns(UserWarning, match=r"ended with TypeError: .*scale.*Taps\(forward="):
        fit(plain_trainer, Paired(), every(tmp_path), soup)
    sets = [state_of(each) for each in soup.soup.members]
    for name, value in state_of(soup.path).items():
        if value.is_floating_point():
            mean = torch.stack([each[name].double() for each in sets]).mean(0)
            assert torch.allclose(value.double(), mean, atol=1e-6)


def test_several_loaders_and_streams_are_measured_as_they_were_trained_on(plain_trainer, tmp_path):
    class Two(Scored):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["a"], batch_idx)

    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            while True:
                yield from rows().dataset

    for number, (kind, data, options) in enumerate(
        (
            (Two, {"a": rows(), "b": rows(8)}, {}),
            (Scored, DataLoader(Endless(), 4), {"max_steps": 18, "val_check_interval": 6}),
        )
    ):
        folder = tmp_path / str(number)
        soup, module = aux.ModelSoup(kind="uniform"), kind(norm=True)
        saving = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=6)
        fit(plain_trainer, module, saving, soup, data=data, **options)
        mean, _ = moments(module, state_of(soup.path))
        assert torch.allclose(state_of(soup.path)["norm.running_mean"].double(), mean, atol=1e-6)


@pytest.mark.parametrize("shown", [True, False])
def test_a_progress_bar_where_the_trainer_has_one(
    plain_trainer, tmp_path, monkeypatch, capsys, shown
):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes what it writes to for a terminal
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    soup = aux.ModelSoup(kind="uniform")
    fit(plain_trainer, Scored(norm=True), every(tmp_path), soup, enable_progress_bar=shown)
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert ("BatchNorm statistics" in said) == shown


def test_nobody_notices_the_measuring(plain_trainer, tmp_path):
    """Weights, buffers, gradients, random stream, metrics of torchmetrics, and what was logged."""
    from torchmetrics.classification import MulticlassAccuracy

    class Counts(Scored):
        def __init__(self) -> None:
            super().__init__(norm=True)
            self.accuracy = MulticlassAccuracy(CLASSES)
            self.register_buffer("steps", torch.zeros(()))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.accuracy(self(batch[0]), batch[1])
            if torch.is_grad_enabled() or not self.training:
                self.log("accuracy", self.accuracy)
            self.steps += 1.0
            return super().training_step(batch, batch_idx)

    def run(folder: Path, *ours: Any) -> Any:
        L.seed_everything(0)
        module = Counts()
        trainer = fit(plain_trainer, module, every(folder), *ours)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        kept = module.accuracy.tp.clone(), module.accuracy._update_count
        return weights(module), metrics, kept[1], kept[0].tolist(), torch.rand(2).tolist()

    state, *rest = run(tmp_path / "plain")
    ours, *others = run(tmp_path / "ours", aux.ModelSoup(kind="uniform"))
    assert equal(state, ours)
    assert rest == others


# ------------------------------------------------------------------------------------------- NaN
class Diverged(Scored):
    """Its validation is NaN."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("val_loss", loss * torch.nan)


def test_a_soup_without_any_score_is_refused(plain_trainer, tmp_path):
    with pytest.raises(aux.AuxiliaryError, match="the score of every checkpoint is NaN"):
        fit(plain_trainer, Diverged(), every(tmp_path), aux.ModelSoup("val_loss", "min"))
    assert not (tmp_path / "soup.ckpt").exists()
