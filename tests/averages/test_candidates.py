"""``ModelSoup`` and ``WiSEFT``: chosen on the validation data, and nothing else has noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_aux as aux
from tests.engine.small_models import CLASSES, Classifier, equal, rows, weights


class Scored(Classifier):
    """Logs its validation loss; with BatchNorm if asked."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__(lr=0.2)
        self.norm = nn.BatchNorm1d(CLASSES) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class Stops(L.Callback):
    """Counts what a callback of the user's is told of validations."""

    def __init__(self) -> None:
        self.validations = 0

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        self.validations += not trainer.sanity_checking


def val_loss(state: dict[str, Tensor], norm: bool = False) -> float:
    module = Scored(norm)
    module.load_state_dict(state)
    module.eval()
    losses = []
    with torch.no_grad():
        for x, y in rows(16):
            losses.append(F.cross_entropy(module(x), y))
    return float(torch.stack(losses).mean())


def fit(plain_trainer: Any, tmp_path: Path, *callbacks: Any, norm: bool = False, **options: Any):
    saving = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", save_top_k=-1)
    module = Scored(norm)
    trainer = plain_trainer(
        **{"max_epochs": 4, "enable_checkpointing": True} | options,
        callbacks=[saving, *callbacks],
    )
    trainer.fit(module, rows(), rows(16))
    return module, trainer, saving


def state_of(path: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


# -------------------------------------------------------------------------------------------- soups
def test_a_greedy_soup_of_the_runs_own_checkpoints_is_the_recipe(plain_trainer, tmp_path):
    soup = aux.ModelSoup(monitor="val_loss", mode="min")
    _, _, saving = fit(plain_trainer, tmp_path, soup)
    files = list(saving.best_k_models)
    assert len(files) == 4
    scores = {path: val_loss(state_of(path)) for path in files}
    ranked = sorted(scores, key=scores.get)
    members, best = ranked[:1], scores[ranked[0]]
    for path in ranked[1:]:
        sets = [state_of(each) for each in [*members, path]]
        mean = {n: sum(each[n].double() for each in sets) / len(sets) for n in sets[0]}
        loss = val_loss({name: value.float() for name, value in mean.items()})
        if loss <= best:
            members, best = [*members, path], loss
    assert list(map(Path, soup.soup.members)) == list(map(Path, members))
    assert soup.soup.score == pytest.approx(best, abs=1e-6)
    assert soup.path == tmp_path / "soup.ckpt"
    assert val_loss(state_of(soup.path)) == pytest.approx(best, abs=1e-6)


def test_a_uniform_soup_needs_no_validation(plain_trainer, tmp_path):
    soup = aux.ModelSoup(kind="uniform", batch_norm="average")
    _, _, saving = fit(plain_trainer, tmp_path, soup)
    sets = [state_of(path) for path in saving.best_k_models]
    for name, value in state_of(soup.path).items():
        assert torch.allclose(value.double(), sum(each[name].double() for each in sets) / 4)


def test_checkpoints_of_other_runs_are_found_by_glob(plain_trainer, tmp_path):
    for seed in range(3):
        L.seed_everything(seed)
        fit(plain_trainer, tmp_path / f"run{seed}", max_epochs=1)
    soup = aux.ModelSoup("val_loss", "min", checkpoints=[str(tmp_path / "run*" / "*.ckpt")])
    _, trainer, _ = fit(plain_trainer, tmp_path / "last", soup, max_epochs=1)
    assert len(soup.soup.scores) == 3
    fresh = Scored()
    trainer.validate(fresh, rows(16), ckpt_path=soup.path, verbose=False)
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(soup.soup.score, abs=1e-6)


def test_batch_norm_is_measured_for_the_soup(plain_trainer, tmp_path):
    soup = aux.ModelSoup("val_loss", "min")
    fit(plain_trainer, tmp_path, soup, norm=True)
    state = state_of(soup.path)
    module = Scored(norm=True)
    module.load_state_dict(state)
    x = torch.cat([batch[0] for batch in rows()])
    with torch.no_grad():
        inputs = Classifier.forward(module, x).double()
    assert torch.allclose(state["norm.running_mean"].double(), inputs.mean(0), atol=1e-6)
    assert torch.allclose(state["norm.running_var"].double(), inputs.var(0), atol=1e-6)
    assert val_loss(state, norm=True) == pytest.approx(soup.soup.score, abs=1e-6)


# ------------------------------------------------------------------------------------------ WiSE-FT
def test_the_curve_is_that_of_weights_in_between(plain_trainer, tmp_path):
    mix = aux.WiSEFT("val_loss", "min", coefficients=[0, 0.4, 0.8, 1])
    torch.manual_seed(0)
    before = weights(Scored())
    torch.manual_seed(0)
    module, _, _ = fit(plain_trainer, tmp_path, mix)
    after = weights(module)
    for coefficient, loss in mix.curve.items():
        between = {n: (1 - coefficient) * before[n] + coefficient * after[n] for n in after}
        assert loss == pytest.approx(val_loss(between), abs=1e-5)
    assert mix.coefficient == min(mix.curve, key=mix.curve.get)
    assert val_loss(state_of(mix.path)) == pytest.approx(min(mix.curve.values()), abs=1e-6)
    lines = (tmp_path / "wise_ft.csv").read_text().splitlines()
    assert lines[0] == "coefficient,val_loss"
    assert [tuple(map(float, line.split(","))) for line in lines[1:]] == list(mix.curve.items())
    assert (tmp_path / "wise_ft.png").stat().st_size > 5000


def test_the_anchor_is_that_of_the_first_run_after_resuming(plain_trainer, tmp_path):
    first = aux.WiSEFT("val_loss", "min", coefficients=[0])
    torch.manual_seed(0)
    before = weights(Scored())
    torch.manual_seed(0)
    _, trainer, _ = fit(plain_trainer, tmp_path / "first", first, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = aux.WiSEFT("val_loss", "min", coefficients=[0])
    plain_trainer(max_epochs=2, callbacks=[second], default_root_dir=tmp_path / "second").fit(
        Scored(), rows(), rows(16), ckpt_path=tmp_path / "half.ckpt"
    )
    assert equal(state_of(second.path), before)


# ------------------------------------------------------------------------------- leaving no trace
@pytest.mark.parametrize("norm", [False, True])
def test_nobody_else_notices(plain_trainer, tmp_path, norm):
    """Weights, random stream, metrics, progress, callbacks and the log are as without us."""

    def run(folder: Path, *ours: Any) -> Any:
        L.seed_everything(0)
        count, logger = Stops(), CSVLogger(folder, name="", version="")
        stopping = EarlyStopping("val_loss", patience=9)
        module, trainer, saving = fit(
            plain_trainer, folder, stopping, count, *ours, norm=norm, logger=logger
        )
        progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress.state_dict()
        kept = {Path(path).name: float(value) for path, value in saving.best_k_models.items()}
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        log = (folder / "metrics.csv").read_text().splitlines()
        modes = [each.training for each in module.modules()]
        drawn = torch.rand(3)
        return weights(module), (
            *(count.validations, stopping.wait_count, kept, metrics, progress, log, modes),
            drawn.tolist(),
        )

    state, rest = run(tmp_path / "plain")
    ours, theirs = run(
        tmp_path / "ours",
        aux.ModelSoup("val_loss", "min"),
        aux.WiSEFT("val_loss", "min", coefficients=[0, 1]),
        aux.EMAWeights(decay=0.0),
    )
    assert equal(state, ours)
    assert rest == theirs


def test_other_averages_do_not_stand_in_for_a_candidate(plain_trainer, tmp_path):
    soup = aux.ModelSoup("val_loss", "min")
    fit(plain_trainer, tmp_path, aux.EMAWeights(decay=0.99), soup)
    for path, score in soup.soup.scores.items():
        assert score == pytest.approx(val_loss(state_of(path)), abs=1e-6)


def test_an_error_in_between_leaves_the_live_weights(plain_trainer, tmp_path):
    class Fails(Scored):
        def on_validation_epoch_end(self) -> None:
            if not self.trainer.callbacks:  # of ours
                self.after = live()
                raise RuntimeError("on purpose")

    module = Fails()
    live = lambda: None  # noqa: E731
    seen: list[dict[str, Tensor]] = []

    class Last(L.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            seen.append(weights(module))

    trainer = plain_trainer(
        max_epochs=2, callbacks=[Last(), aux.WiSEFT("val_loss", coefficients=[0.5])]
    )
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(module, rows(), rows(16))
    assert equal(weights(module), seen[-1])
    assert any(isinstance(each, Last) for each in trainer.callbacks)


# ----------------------------------------------------------------------------------------- messages
def test_what_cannot_be_chosen_is_said(plain_trainer, tmp_path):
    with pytest.raises(aux.AuxiliaryError, match="a greedy soup is chosen by a metric"):
        aux.ModelSoup()
    with pytest.raises(aux.AuxiliaryError, match="kind='thick' is unknown"):
        aux.ModelSoup("val_loss", kind="thick")
    with pytest.raises(aux.AuxiliaryError, match="coefficients is empty"):
        aux.WiSEFT("val_loss", coefficients=[])
    for callback in (aux.ModelSoup("val_loss"), aux.WiSEFT("val_loss")):
        with pytest.raises(aux.AuxiliaryError, match="there is no validation to choose by"):
            plain_trainer(
                callbacks=[callback, ModelCheckpoint(tmp_path)], enable_checkpointing=True
            ).fit(Scored(), rows())
    with pytest.raises(aux.AuxiliaryError, match="no ModelCheckpoint among"):
        plain_trainer(callbacks=[aux.ModelSoup("val_loss")]).fit(Scored(), rows(), rows(16))
    with pytest.raises(aux.AuxiliaryError, match=r"checkpoints='no/\*' matches no file"):
        fit(plain_trainer, tmp_path, aux.ModelSoup("val_loss", checkpoints=["no/*"]))
    with pytest.raises(aux.AuxiliaryError, match=r"monitor='acc' was not logged.*'val_loss'"):
        fit(plain_trainer, tmp_path, aux.WiSEFT("acc"))
    with pytest.raises(aux.AuxiliaryError, match="at least two checkpoints, not of 1"):
        fit(plain_trainer, tmp_path / "one", aux.ModelSoup("val_loss"), max_epochs=1)
