"""Weights & Biases: what a real offline run holds, read back from the file on disk."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, WandbLogger

import lightning_aux as aux
from lightning_aux.cli import main
from tests.cli.toy import ToyModel
from tests.contract.models import ResumableLoader
from tests.engine.small_models import Classifier, Rows, rows

wandb = pytest.importorskip("wandb")
offline_file = pytest.importorskip("tests.wandb.offline_file")

EPOCHS, STEPS_PER_EPOCH = 3, 6
TERMS = {"self_distillation", "hints", "ema_anchor", "early_learning_regularization"}
WEIGHT = "linear(0.1, 1, until=100%)"


class Configured(Classifier):
    """Has hyperparameters of its own and logs something in validation."""

    def __init__(self, dropout: float = 0.2, lr: float = 0.05) -> None:
        super().__init__(dropout, lr)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        torch.manual_seed(self.global_step)  # a resumed run draws what the first would have
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/output", self(batch[0]).mean())


class Saved(ToyModel):
    """Saves its hyperparameters."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr)
        self.save_hyperparameters()


class Interrupted(L.Callback):
    """Saves a checkpoint after a step, and stops once Lightning has logged that step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step = step
        self.path = path

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")


def attached(weight: str | float = WEIGHT) -> list[L.Callback]:
    return [
        aux.EMATeacher(decay=0.9, warmup=True),
        aux.SelfDistillation(temperature=2.0, weight=weight),
        aux.SelfDistillation(on="enc*r", divergence="mse", weight=0.25, name="hints"),
        aux.EMAAnchor(space="weight", weight=0.01, decay=0.8, every=2),
        aux.EarlyLearningRegularization(weight=0.5, momentum=0.6),
        aux.DropoutSchedule(p=0.3, mode="early", until="50%", shape="linear"),
    ]


@pytest.fixture
def fit(plain_trainer: Callable[..., L.Trainer]) -> Callable[..., None]:
    def run(logger: Any, added: list[L.Callback], ckpt_path: Any = None, **arguments: Any) -> None:
        L.seed_everything(3, verbose=False)
        settings = {"max_epochs": EPOCHS, "log_every_n_steps": 1} | arguments
        trainer = plain_trainer(logger=logger, callbacks=added, **settings)
        data = ResumableLoader(Rows(STEPS_PER_EPOCH * 4), batch_size=4)
        trainer.fit(Configured(), data, rows(8), ckpt_path=ckpt_path, weights_only=True)

    return run


def finished(folder: Path) -> list[Any]:
    """The runs below the ``save_dir`` of a WandbLogger, once W&B has closed their files."""
    wandb.finish()
    wandb.teardown()  # the process that writes the file ends a moment after finish() returns
    return [offline_file.read(path) for path in folder.glob("wandb/offline-run-*/run-*.wandb")]


def every_argument(callback: Any, **given: Any) -> dict[str, Any]:
    """The signature's defaults and what was given, worked out without the package's own way."""
    parameters = inspect.signature(type(callback).__init__).parameters
    defaults = {name: each.default for name, each in parameters.items() if name != "self"}
    if defaults.pop("common", None) is not None:
        of_all = {"name": None, "taps": None, "nonfinite": "raise", "optimizer": 0}
        defaults |= {**of_all, "backward": None}
    return {"class": type(callback).__name__, **defaults, **given}


def test_f68_config_has_one_entry_per_callback_with_every_init_argument(fit, tmp_path):
    added = attached()
    fit(WandbLogger(offline=True, save_dir=tmp_path), added, max_epochs=1)
    (run,) = finished(tmp_path)

    teacher, distillation, hints, anchor, early, dropout = added
    assert run.config["aux"] == {
        "ema": every_argument(teacher, decay=0.9, warmup=True),
        "self_distillation": every_argument(distillation, temperature=2.0, weight=WEIGHT),
        "hints": every_argument(hints, on="enc*r", divergence="mse", weight=0.25, name="hints"),
        "ema_anchor": every_argument(anchor, space="weight", weight=0.01, decay=0.8, every=2),
        "early_learning_regularization": every_argument(early, weight=0.5, momentum=0.6),
        "dropout_schedule": every_argument(dropout, p=0.3, until="50%", shape="linear"),
    }
    # Nothing a second time at the root, and the module's own are still there.
    assert {key for key in run.config if not key.startswith("_")} == {"aux", "dropout", "lr"}
    assert run.config["dropout"] == 0.2
    assert run.config["lr"] == 0.05
    written = [value for key, value in run.updates if key == "aux"]
    assert all(value == written[0] for value in written)


def test_f68_config_has_callbacks_that_add_no_term_too(fit, tmp_path):
    added = {
        "ema_weights": aux.EMAWeights(half_life="3 steps"),
        "swa": aux.SWATeacher(start="50%"),
        "dropout_schedule": aux.DropoutSchedule(p="early(0.1, until=warmup.end)"),
        "phases": aux.Phases("warmup: 4, main: rest"),
        "gradients": aux.GradientMonitor(every=2),
        "taps": aux.Taps(logits="classifier"),
    }
    fit(WandbLogger(offline=True, save_dir=tmp_path), list(added.values()), max_epochs=1)
    (run,) = finished(tmp_path)
    assert run.config["aux"] == {
        name: {"class": type(each).__name__, **each.hyperparameters} for name, each in added.items()
    }
    assert run.config["aux"]["swa"]["start"] == "50%"
    assert run.config["aux"]["ema_weights"]["half_life"] == "3 steps"


def test_f68_a_hyperparameter_of_the_users_own_that_is_called_aux_stays(plain_trainer, tmp_path):
    class WithAux(Classifier):
        def __init__(self, aux: float = 0.3) -> None:
            super().__init__()
            self.save_hyperparameters()

    logger = WandbLogger(offline=True, save_dir=tmp_path)
    plain_trainer(logger=logger, callbacks=[aux.EMATeacher()]).fit(WithAux(), rows())
    (run,) = finished(tmp_path)
    assert run.config["aux"] == 0.3
    assert run.config["lightning_aux"] == {"ema": every_argument(aux.EMATeacher())}


@pytest.mark.parametrize("saved", [False, True], ids=["without", "with hyperparameters"])
def test_f68_config_of_the_command_has_the_callbacks_once(saved, monkeypatch, tmp_path):
    monkeypatch.chdir(Path(__file__).parents[2])
    config = {
        "model": {"class_path": "tests.cli.toy.ToyModel"},
        "data": {"class_path": "tests.cli.toy.ToyData"},
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "default_root_dir": str(tmp_path),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "limit_val_batches": 0,
            "logger": {
                "class_path": "WandbLogger",
                "init_args": {"offline": True, "save_dir": str(tmp_path)},
            },
            "callbacks": [
                {"class_path": "EMATeacher", "init_args": {"decay": 0.75}},
                {
                    "class_path": "EMAAnchor",
                    "init_args": {"teacher": "ema", "space": "weight", "weight": WEIGHT},
                },
            ],
        },
    }
    if saved:  # LightningCLI notes a module's arguments for itself beside those that it saves
        config["model"] = {"class_path": f"{__name__}.Saved", "init_args": {"lr": 0.01}}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "fit.yaml")]) == 0
    (run,) = finished(tmp_path)
    assert run.config["aux"] == {
        "ema": every_argument(aux.EMATeacher(), decay=0.75),
        "ema_anchor": every_argument(aux.EMAAnchor(), teacher="ema", space="weight", weight=WEIGHT),
    }
    theirs = {"lr", "_instantiator"} if saved else set()  # the last is Lightning's
    assert run.config.keys() - {"_wandb"} == theirs | {"aux"}
    named = {(key, "aux" in value) for key, value in run.updates if isinstance(value, dict)}
    assert named <= {("_wandb", False), ("aux", False)}


def test_history_holds_every_term_and_they_add_up_to_the_total(fit, tmp_path):
    loggers = [
        WandbLogger(offline=True, save_dir=tmp_path),
        CSVLogger(tmp_path, name="", version="csv"),
    ]
    fit(loggers, attached(), log_every_n_steps=2)
    (run,) = finished(tmp_path)
    history = run.aux_rows()

    steps = EPOCHS * STEPS_PER_EPOCH
    assert [row["trainer/global_step"] for row in history] == list(range(1, steps, 2))
    promised = {"aux/main", "aux/total", "aux/dropout_schedule/p"}
    promised |= {
        f"aux/early_learning_regularization/{each}" for each in ("agreement", "label_agreement")
    }
    promised |= {f"aux/{name}{end}" for name in TERMS for end in ("", "/weight")}
    promised |= {f"aux/{name}/distance" for name in ("ema", "ema_anchor.teacher")}
    for row in history:
        assert {key for key in row if key.startswith("aux/")} == promised
        terms = sum(row[f"aux/{name}"] * row[f"aux/{name}/weight"] for name in TERMS)
        assert row["aux/main"] + terms == pytest.approx(row["aux/total"], abs=1e-5)
        share = row["trainer/global_step"] / steps
        assert row["aux/self_distillation/weight"] == pytest.approx(0.1 + 0.9 * share)
        assert row["aux/hints/weight"] == 0.25
    assert any(abs(row["aux/total"] - row["aux/main"]) > 0.01 for row in history)
    # The table of runs shows the last value of each.
    shown = {key: value for key, value in run.summary.items() if key in promised}
    assert shown == {key: history[-1][key] for key in promised}


@pytest.mark.parametrize("one_run_object", [False, True], ids=["new_run_object", "same_run_object"])
def test_f69_resuming_drops_no_step_and_changes_no_config(one_run_object, fit, tmp_path):
    checkpoint = tmp_path / "half.ckpt"
    whole = WandbLogger(offline=True, save_dir=tmp_path / "whole")
    fit(whole, attached())
    (expected,) = finished(tmp_path / "whole")

    def logger(part: str) -> WandbLogger:
        return WandbLogger(offline=True, save_dir=tmp_path / part, id="one", resume="allow")

    with pytest.raises(RuntimeError, match="power cut"):
        fit(logger("first"), [*attached(), Interrupted(STEPS_PER_EPOCH + 2, checkpoint)])
    if not one_run_object:
        wandb.finish()
    fit(logger("second"), attached(), ckpt_path=checkpoint)

    parts = finished(tmp_path / "first") + finished(tmp_path / "second")
    assert len(parts) == (1 if one_run_object else 2)
    assert {part.id for part in parts} == {"one"}
    history = [row for part in parts for row in part.aux_rows()]
    steps = EPOCHS * STEPS_PER_EPOCH
    assert [row["trainer/global_step"] for row in history] == list(range(steps))
    assert history == expected.aux_rows()
    for part in parts:
        own_steps = [row["_step"] for row in part.history]
        assert own_steps == sorted(set(own_steps))
        assert part.config["aux"] == expected.config["aux"]


def test_f68_resuming_with_another_argument_updates_its_one_entry(fit, tmp_path):
    checkpoint = tmp_path / "half.ckpt"
    logger = WandbLogger(offline=True, save_dir=tmp_path, id="one", resume="allow")
    with pytest.raises(RuntimeError, match="power cut"):
        fit(logger, [*attached(weight=0.5), Interrupted(STEPS_PER_EPOCH, checkpoint)])
    fit(logger, attached(weight=0.75), ckpt_path=checkpoint)
    (run,) = finished(tmp_path)
    assert run.config["aux"]["self_distillation"]["weight"] == 0.75
    assert len(run.config["aux"]) == len(attached())
    weights = [row["aux/self_distillation/weight"] for row in run.aux_rows()]
    resumed = (EPOCHS - 1) * STEPS_PER_EPOCH
    assert weights == [0.5] * STEPS_PER_EPOCH + [0.75] * resumed
