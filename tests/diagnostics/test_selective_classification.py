"""``SelectiveClassification`` and ``RiskCoverage``: all samples count, once, wherever they are."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassCalibrationError

import lightning_aux as aux
from tests.contract.models import CLASSES, FEATURES, Classifier, Samples
from tests.contract.training import (
    fit,
    identical,
    loader,
    optimizer_state,
    quiet_trainer,
    random_state,
    seeded,
    weights,
)
from tests.two_processes import run_script

PREFIX = "aux/selective_classification/"


def area(scores: list[float], errors: list[bool]) -> float:
    """Mean of the risks, for scores that all differ."""
    assert len(set(scores)) == len(scores)
    ranked = [errors[i] for i in sorted(range(len(scores)), key=lambda i: -scores[i])]
    return sum(sum(ranked[:k]) / k for k in range(1, len(ranked) + 1)) / len(ranked)


def by_hand(z: Tensor, y: Tensor, p: float = 4.0) -> dict[str, float]:
    """From all logits and labels at once."""
    z = z.double()
    errors = [bool(each) for each in z.argmax(-1) != y]
    largest = z.softmax(-1).amax(-1).tolist()
    normalized = [max(row) / sum(abs(value) ** p for value in row) ** (1 / p) for row in z.tolist()]
    return {
        "error": sum(errors) / len(errors),
        "aurc": area(largest, errors),
        "aurc_normalized": area(normalized, errors),
    }


def ours(trainer: L.Trainer, stage: str = "val") -> dict[str, float]:
    return {
        key.removeprefix(f"{PREFIX}{stage}_"): float(value)
        for key, value in trainer.callback_metrics.items()
        if key.startswith(f"{PREFIX}{stage}_")
    }


def logits(module: Classifier, n: int) -> tuple[Tensor, Tensor]:
    data = Samples(n)
    with torch.no_grad():
        return module.eval()(data.x), data.y


# ----------------------------------------------------------------------------------- the values
def test_every_sample_of_the_run_counts_whatever_the_batches() -> None:
    module = seeded(Classifier, dropout=0.3)
    trainer = fit(module, [aux.SelectiveClassification(ece=True)], val=loader(37, batch_size=5))
    found, expected = ours(trainer), by_hand(*logits(module, 37))
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-6)
    calibration = MulticlassCalibrationError(CLASSES, n_bins=15)
    z, y = logits(module, 37)
    assert found["ece"] == pytest.approx(float(calibration(z.softmax(-1), y)), abs=1e-6)


class Evaluated(Classifier):
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_it_works_without_a_fit_and_leaves_nothing(stage: str) -> None:
    module = seeded(Evaluated)
    before = {name: sorted(each.__dict__) for name, each in module.named_modules()}
    taps = aux.Taps(logits="head")
    callback = aux.SelectiveClassification(p=2.0, coverages=(0.5,), risks=(), taps=taps)
    trainer = quiet_trainer([callback])
    getattr(trainer, stage)(module, loader(30), verbose=False)
    found = ours(trainer, {"validate": "val", "test": "test"}[stage])
    expected = by_hand(*logits(module, 30), p=2.0)
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-6)
    assert set(found) == {
        *expected,
        "aurc_optimal",
        "risk_at_coverage_0.5",
        "risk_at_coverage_0.5_normalized",
    }
    for name, each in module.named_modules():
        added = set(each.__dict__) - set(before[name]) - {"_trainer", "_device"}
        assert not added
        assert not each._forward_hooks
        assert not each._forward_pre_hooks


def test_each_dataloader_has_results_of_its_own() -> None:
    module = seeded(Evaluated)
    trainer = quiet_trainer([aux.SelectiveClassification()])
    trainer.test(module, [loader(24), loader(40)], verbose=False)
    found = ours(trainer, "test")
    for index, n in enumerate((24, 40)):
        expected = by_hand(*logits(module, n))
        for key, value in expected.items():
            assert found[f"{key}/dataloader_idx_{index}"] == pytest.approx(value, abs=1e-6)


def test_a_checkpoint_can_be_kept_by_it_and_the_sanity_check_is_none_of_it(tmp_path: Any) -> None:
    rows: list[dict[str, float]] = []

    class Notes(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
            rows.append({} if trainer.sanity_checking else ours(trainer))

    saving = ModelCheckpoint(tmp_path, "{epoch}", monitor=f"{PREFIX}val_aurc")
    fit(
        seeded(Classifier, lr=0.3),
        [saving, Notes(), aux.SelectiveClassification()],
        val=loader(30),
        max_epochs=4,
    )
    assert rows[0] == {}
    areas = [row["aurc"] for row in rows[1:]]
    assert len(areas) == 4
    assert saving.best_model_path.endswith(f"epoch={areas.index(min(areas))}.ckpt")


def test_beside_an_average_it_is_the_average_that_is_measured() -> None:
    """Of a decay of 1 the average is where training began."""
    first = seeded(Classifier)
    expected = by_hand(*logits(first, 40))
    added = [aux.EMAWeights(decay=1.0), aux.SelectiveClassification()]
    module = seeded(Classifier, lr=0.5)
    found = ours(fit(module, added, val=loader(40)))
    assert found["aurc"] == pytest.approx(expected["aurc"], abs=1e-6)
    assert found["aurc"] != pytest.approx(by_hand(*logits(module, 40))["aurc"], abs=1e-3)


class Tagger(L.LightningModule):
    """Logits for every position of a sequence, from a part that is called by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 6)
        self.classify = nn.Linear(6, 5)

    def scores(self, x: Tensor) -> Tensor:
        return self.classify(self.encoder(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.scores(batch["x"]).flatten(0, 1), batch["labels"].flatten())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.scores(batch["x"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def sequences() -> DataLoader[Any]:
    random = torch.Generator().manual_seed(5)
    x = torch.randn(9, 7, 3, generator=random)
    y = torch.randint(5, (9, 7), generator=random)
    y[:, 5:] = -100
    return DataLoader([{"x": a, "labels": b} for a, b in zip(x, y, strict=True)], batch_size=4)


def test_positions_without_a_label_do_not_count() -> None:
    module = Tagger()
    callback = aux.SelectiveClassification(taps=aux.Taps(logits="classify"))
    trainer = quiet_trainer([callback])
    trainer.validate(module, sequences(), verbose=False)
    z, y = [], []
    for batch in sequences():
        kept = batch["labels"] != -100
        z.append(module.scores(batch["x"]).detach()[kept])
        y.append(batch["labels"][kept])
    expected = by_hand(torch.cat(z), torch.cat(y))
    found = ours(trainer)
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-6)


# ------------------------------------------------------------------------------------- no harm
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_with_validation_is_bit_identical(precision: str) -> None:
    def trained(added: list[Any]) -> list[Any]:
        module = seeded(Classifier, dropout=0.3, norm=True, optimizer="adam")
        data = DataLoader(Samples(40), 8, shuffle=True)
        trainer = fit(module, added, data, loader(16), precision=precision, val_check_interval=2)
        kept = {
            key: value
            for key, value in trainer.callback_metrics.items()
            if not key.startswith("aux/")
        }
        return [weights(module), optimizer_state(trainer), random_state(), kept]

    assert identical(trained([]), trained([aux.SelectiveClassification(ece=True)]))


# ----------------------------------------------------------------------------------- refusals
class Steps(Tagger):
    """Does not say which part the model is."""


class Nameless(Classifier):
    def forward(self, x: Tensor) -> Any:
        return {"scores": super().forward(x)}

    def total_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0])["scores"], batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


def unlabelled() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(8, FEATURES)), 4)


class Unlabelled(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


@pytest.mark.parametrize(
    ("module", "data", "val", "added", "message"),
    [
        (Steps, sequences, sequences, {}, r"Steps\.validation_step does not call self"),
        (Nameless, loader, loader, {}, "no logits in what Nameless"),
        (Unlabelled, loader, unlabelled, {}, "the batch has no target"),
        (Classifier, loader, loader, {"taps": aux.Taps(logits="haed")}, "Near matches: 'head'"),
        (Classifier, loader, loader, {"taps": aux.Taps(target="0")}, "must be class indices"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_trained(
    module: Any, data: Any, val: Any, added: Any, message: str
) -> None:
    callback = aux.SelectiveClassification(**added)
    trainer = quiet_trainer([callback])
    with pytest.raises(aux.AuxiliaryError, match=f"selective_classification: .*{message}"):
        trainer.fit(module(), data(), val())
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 0.0}, "p=0.0 is no norm"),
        ({"coverages": (0.0,)}, "must be above 0"),
        ({"risks": (1.5,)}, "between 0 and 1"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(aux.AuxiliaryError, match=message):
        aux.SelectiveClassification(**arguments)
    with pytest.raises(ValueError, match=message):
        aux.RiskCoverage(**arguments)


# ---------------------------------------------------------------------------------- the metric
def test_the_metric_needs_nothing_of_lightning() -> None:
    random = torch.Generator().manual_seed(3)
    z, y = torch.randn(60, 4, generator=random), torch.randint(4, (60,), generator=random)
    metric = aux.RiskCoverage()
    for rows in torch.arange(60).split(7):
        metric.update(z[rows], y[rows])
    expected = by_hand(z, y)
    found = {key: float(value) for key, value in metric.compute().items()}
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-6)
    metric.reset()
    metric.update(z[:9], F.one_hot(y[:9], 4).float(), mask=torch.arange(9) < 8)
    assert float(metric.compute()["error"]) == pytest.approx(by_hand(z[:8], y[:8])["error"])


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_without_examples_there_is_no_number() -> None:
    found = aux.RiskCoverage(ece=True).compute()
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.slow
def test_two_processes_with_different_numbers_of_samples_are_one(tmp_path: Any) -> None:
    """One of them has no sample at all of the second dataloader."""
    from tests.diagnostics import two_ranks

    run_script(two_ranks.__file__, tmp_path, timeout=120)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["metrics"] == second["metrics"]
    for index, samples in enumerate(two_ranks.LOADERS):
        rows = torch.tensor(sorted(i for each in samples for i in each))
        data = Samples(40)
        expected = by_hand(first["logits"][rows], data.y[rows])
        for key, value in expected.items():
            found = first["metrics"][f"{PREFIX}val_{key}/dataloader_idx_{index}"]
            assert found == pytest.approx(value, abs=1e-6)
    assert first["warnings"] == []
