"""C10: what is logged adds up, under the names that are promised, only when Lightning logs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger

from lightning_aux import DropoutSchedule, EMAAnchor, EMATeacher, Objective, SelfDistillation
from lightning_aux.engine import Attached
from lightning_aux.registry import ENTRIES
from tests.contract.models import Classifier
from tests.contract.training import callbacks, every_entry, every_term, fit, seeded

EVERY, STEPS = 2, 10
WEIGHT = "linear(0.2, 1, until=100%)"


class Counting(Classifier):
    """Notes what is handed to `log_dict`, and logs its own loss on every step."""

    def __init__(self, **model: Any) -> None:
        super().__init__(**model)
        self.handed_over: list[tuple[int, list[str]]] = []

    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        self.handed_over.append((self.global_step, list(dictionary)))
        super().log_dict(dictionary, *args, **kwargs)

    def total_loss(self, batch: Any) -> Any:
        loss = super().total_loss(batch)
        self.log("theirs", loss)
        return loss


def logged(
    added: list[Attached], folder: Path, **arguments: Any
) -> tuple[list[dict[str, float]], Counting]:
    """The rows of `metrics.csv` that hold something of ours, empty cells left out."""
    module = seeded(Counting, dropout=0.1)
    logger = CSVLogger(folder, name="", version="run")
    fit(module, added, logger=logger, log_every_n_steps=EVERY, **arguments)
    with (folder / "run" / "metrics.csv").open() as file:
        rows = [
            {key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(file)
        ]
    return [row for row in rows if any(key.startswith("aux/") for key in row)], module


@every_term
def test_main_and_weighted_term_add_up_to_the_total(tmp_path: Path, entry: str) -> None:
    rows, _ = logged(callbacks(entry, WEIGHT), tmp_path)
    name = ENTRIES[entry].objective
    assert len(rows) == STEPS // EVERY
    for row in rows:
        # Only a term without weight is not computed.
        term = row[f"aux/{name}/weight"] and row[f"aux/{name}/weight"] * row[f"aux/{name}"]
        assert row["aux/main"] + term == pytest.approx(row["aux/total"], abs=1e-6)
        assert row["aux/main"] == pytest.approx(row["theirs"], abs=1e-6)
    assert any(abs(row["aux/total"] - row["aux/main"]) > 1e-4 for row in rows)


@every_term
def test_the_logged_weight_is_that_of_the_step(tmp_path: Path, entry: str) -> None:
    rows, _ = logged(callbacks(entry, WEIGHT), tmp_path)
    # Lightning logs steps 1, 3, 5, …: the weight is that after as many optimizer steps.
    expected = [
        0.2 + 0.8 * step / STEPS if step >= ENTRIES[entry].begins else 0.0
        for step in range(EVERY - 1, STEPS, EVERY)
    ]
    weights = [row[f"aux/{ENTRIES[entry].objective}/weight"] for row in rows]
    assert weights == pytest.approx(expected)


@every_entry
def test_nothing_is_handed_over_on_steps_where_lightning_does_not_log(
    tmp_path: Path, entry: str
) -> None:
    _, module = logged(callbacks(entry, 0.5), tmp_path)
    # What is known once the optimizer has stepped comes in a second handful.
    steps = sorted({step for step, keys in module.handed_over if keys})
    due = list(range(EVERY - 1, STEPS, EVERY))
    silent = ENTRIES[entry].objective is None and not steps
    assert silent or steps == due
    assert all(key.startswith("aux/") for _, keys in module.handed_over for key in keys)


def test_several_terms_add_up_to_the_total(tmp_path: Path) -> None:
    added = [
        EMATeacher(decay=0.9),
        SelfDistillation(weight=0.5, temperature=2.0),
        SelfDistillation(weight=0.25, on="encoder", divergence="mse", name="hints"),
        EMAAnchor(weight="cosine(1, 0.1)", decay=0.8),
        DropoutSchedule(p=0.2, mode="late", start="50%"),
    ]
    rows, _ = logged(added, tmp_path)
    for row in rows:
        named = ("self_distillation", "hints", "ema_anchor")
        terms = sum(row[f"aux/{name}/weight"] * row[f"aux/{name}"] for name in named)
        assert row["aux/main"] + terms == pytest.approx(row["aux/total"], abs=1e-6)
    rates = [row["aux/dropout_schedule/p"] for row in rows]
    assert rates == pytest.approx([0.0, 0.0, 0.2, 0.2, 0.2])


@every_term
def test_f41_a_logged_row_under_accumulation_is_of_one_micro_batch(
    tmp_path: Path, entry: str
) -> None:
    rows, _ = logged(callbacks(entry, 0.5), tmp_path, accumulate_grad_batches=2, max_epochs=4)
    name = ENTRIES[entry].objective
    assert rows
    for row in rows:
        assert row["aux/main"] == pytest.approx(row["theirs"], abs=1e-6)
        weight = row[f"aux/{name}/weight"]
        term = weight and 0.5 * row[f"aux/{name}"]
        assert row["aux/total"] == pytest.approx(row["aux/main"] + term, abs=1e-6)
    assert rows[-1][f"aux/{name}/weight"] == 0.5


@every_entry
def test_hyperparameters_of_every_callback_are_in_the_loggers_config(
    tmp_path: Path, entry: str
) -> None:
    added = callbacks(entry, WEIGHT)
    logged(added, tmp_path)
    config = yaml.safe_load((tmp_path / "run" / "hparams.yaml").read_text())
    for each in added:
        noted = config["aux"][each.name]
        assert noted == {"class": type(each).__name__, **each.hyperparameters}
    assert config["dropout"] == 0.1  # the module's own stay


def test_hyperparameters_are_every_init_argument_with_its_value() -> None:
    teacher = EMATeacher(0.5, every=3)
    assert teacher.hyperparameters == {
        "decay": 0.5,
        "name": "ema",
        "warmup": False,
        "every": 3,
        "start": 0,
        "buffers": "copy",
        "optimizer": None,
        "half_life": None,
        "length": None,
        "lookahead": 0,
        "offload": False,
    }


class Scaled(Objective):
    def __init__(self, scale: float, *, extra: str = "x", **common: Any) -> None:
        super().__init__(**common)


def test_hyperparameters_are_also_what_is_handed_on_to_the_base_class() -> None:
    assert Scaled(2.0, weight=0.5, nonfinite="skip").hyperparameters == {
        "scale": 2.0,
        "extra": "x",
        "weight": 0.5,
        "name": None,
        "taps": None,
        "nonfinite": "skip",
        "optimizer": 0,
        "backward": None,
    }
