"""``GradientDirection``: the two statistics against plain loops, and training as without it."""

from __future__ import annotations

import itertools
import json
import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_aux as aux
from lightning_aux.functional import direction_error, direction_variance
from tests.contract.models import Classifier, Samples
from tests.contract.training import fit, identical, optimizer_state, random_state, seeded, weights
from tests.two_processes import run_script

N, SIZE = 40, 8


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a @ b) / (a.norm() * b.norm()))


def flat(gradients: Any) -> Tensor:
    return torch.cat([each.flatten() for each in gradients]).double()


# --------------------------------------------------------------------------------- the formulas
def test_variance_and_error_are_the_means_over_all_pairs_and_all_gradients():
    gradients, full = torch.randn(7, 30, dtype=torch.double), torch.randn(30, dtype=torch.double)
    pairs = [(1 - cosine(a, b)) / 2 for a, b in itertools.permutations(gradients, 2)]
    assert float(direction_variance(gradients)) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    errors = [(1 - cosine(each, full)) / 2 for each in gradients]
    assert float(direction_error(gradients, full)) == pytest.approx(sum(errors) / 7, abs=1e-6)


def test_gradients_of_one_direction_have_no_variance_and_opposite_ones_the_most():
    one = torch.randn(1, 9)
    assert float(direction_variance(one * torch.tensor([[1.0], [2.0], [5.0]]))) < 1e-6
    assert float(direction_variance(torch.cat([one, -one]))) == pytest.approx(1.0)
    assert float(direction_error(one, -one[0])) == pytest.approx(1.0)


# --------------------------------------------------------------------------- against a plain loop
class Noted(Classifier):
    """Keeps a copy of itself as it is when each epoch begins."""

    def on_train_epoch_start(self) -> None:
        copies.append(weights(self))


copies: list[dict[str, Tensor]] = []


def by_hand(state: dict[str, Tensor], callback: aux.GradientDirection, count: int, whole: int):
    model = Classifier(norm=True)
    model.load_state_dict(state)
    data = Samples(N)

    def gradient(number: int) -> Tensor:
        rows = callback._groups[number]
        x, y = torch.stack([data[i][0] for i in rows]), torch.stack([data[i][1] for i in rows])
        copy = deepcopy(model)
        loss = F.cross_entropy(copy(x), y)
        return flat(torch.autograd.grad(loss, list(copy.parameters())))

    gradients = [gradient(number) for number in range(count)]
    full = sum(gradient(number) for number in range(whole))
    pairs = [(1 - cosine(a, b)) / 2 for a, b in itertools.permutations(gradients, 2)]
    errors = [(1 - cosine(each, full)) / 2 for each in gradients]
    norms = [float(each.norm()) for each in gradients]
    return sum(pairs) / len(pairs), sum(errors) / count, sum(norms) / count


def test_every_epoch_is_measured_as_a_plain_loop_would():
    """Without dropout, so that nothing is random; BatchNorm normalises by each mini-batch."""
    copies.clear()
    callback = aux.GradientDirection(batches=3, full=0)
    fit(seeded(Noted, norm=True), [callback], DataLoader(Samples(N), SIZE), max_epochs=3)
    assert [at for at, _ in callback.measured] == [0, 5, 10]
    for (_, found), state in zip(callback.measured, copies, strict=True):
        variance, error, norm = by_hand(state, callback, 3, 5)
        assert found["variance"] == pytest.approx(variance, abs=1e-5)
        assert found["error"] == pytest.approx(error, abs=1e-5)
        assert found["norm"] == pytest.approx(norm, rel=1e-5)


class Loud(L.LightningModule):
    """Scales its input by whether its dropout drops anything."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.layer = nn.Linear(6, 4)
        self.rates: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.rates.append(self.drop.p)
        return F.cross_entropy(self.layer(self.drop(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_the_full_gradient_is_taken_without_dropout_and_the_others_with_the_rate_of_now():
    model = Loud()
    rate = aux.DropoutSchedule("step(0.3, 0.6, at=5)")
    fit(model, [rate, aux.GradientDirection(batches=2, full=3)], DataLoader(Samples(N), SIZE))
    measurement = [0.3] * 2 + [0.0] * 3, [0.6] * 2 + [0.0] * 3
    assert model.rates == [*measurement[0], *[0.3] * 5, *measurement[1], *[0.6] * 5]
    assert model.drop.p == 0.5


def test_dropout_that_makes_gradients_noisier_shows():
    """A linear model on one repeated sample: without dropout all gradients are one."""
    data = TensorDataset(torch.ones(64, 6), torch.zeros(64, dtype=torch.long))
    found = []
    for rate in (0.0, 0.8):
        callback = aux.GradientDirection(batches=8, every="100%")
        fit(
            Loud(),
            [aux.DropoutSchedule(rate, mode="standard"), callback],
            DataLoader(data, 1),
            max_epochs=1,
        )
        found.append(callback.measured[0][1])
    assert found[0]["variance"] < 1e-5
    assert found[0]["error"] < 1e-5
    assert found[1]["variance"] > 0.05


# ---------------------------------------------------------------------- gradients out of range
def measured_in_half_precision(scale: float) -> dict[str, float]:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    callback = aux.GradientDirection(batches=3, full=4, every="100%")
    plugin = L.pytorch.plugins.MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    fit(seeded(Classifier), [callback], DataLoader(Samples(N), SIZE), max_epochs=1, plugins=plugin)
    return callback.measured[0][1]


def test_a_scale_at_which_float16_overflows_changes_no_measurement() -> None:
    low, high = measured_in_half_precision(2.0**4), measured_in_half_precision(2.0**30)
    for key in ("variance", "error", "norm"):
        assert high[key] == pytest.approx(low[key], rel=1e-2)


class Spoilt(Samples):
    """Some samples are NaN."""

    def __init__(self, spoilt: int) -> None:
        super().__init__(N)
        self.spoilt = range(spoilt)

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return (x * float("nan") if index in self.spoilt else x), y


def test_a_mini_batch_without_a_finite_gradient_is_left_out_and_said() -> None:
    model = seeded(Classifier, norm=True)
    state = weights(model)
    callback = aux.GradientDirection(batches=5, full=5, every="100%")
    with pytest.warns(UserWarning, match="gradient_direction has left out 2 of 10 mini-batches"):
        fit(model, [callback], DataLoader(Spoilt(1), SIZE), max_epochs=1)
    rest = [rows for rows in callback._groups if 0 not in rows]
    callback._groups = rest
    variance, error, norm = by_hand(state, callback, 4, 4)
    found = callback.measured[0][1]
    assert len(rest) == 4
    assert found["variance"] == pytest.approx(variance, abs=1e-5)
    assert found["error"] == pytest.approx(error, abs=1e-5)
    assert found["norm"] == pytest.approx(norm, rel=1e-5)


def test_where_too_few_are_left_nothing_is_noted() -> None:
    callback = aux.GradientDirection(batches=5, every="100%")
    with pytest.warns(UserWarning, match="has left out 10 of 10"):
        fit(seeded(Classifier), [callback], DataLoader(Spoilt(N), SIZE), max_epochs=1)
    assert callback.measured == []


# --------------------------------------------------------------------------------- two processes
@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gradient_direction")
    run_script(str(Path(__file__).with_name("two_processes.py")), folder, timeout=120)
    return folder


@pytest.mark.xdist_group("gradient_direction")
def test_two_processes_whose_model_communicates_find_what_one_process_finds(two_processes):
    callback = aux.GradientDirection(batches=3, full=5, every="100%")
    fit(seeded(Classifier, norm=True), [callback], DataLoader(Samples(N), SIZE), max_epochs=1)
    for rank in (0, 1):
        found = json.loads((two_processes / f"measured.{rank}.json").read_text())
        for key in ("variance", "error", "norm"):
            assert found[key] == pytest.approx(callback.measured[0][1][key], rel=1e-4)


@pytest.mark.xdist_group("gradient_direction")
def test_an_error_on_one_process_is_an_error_on_both(two_processes):
    first, second = (
        json.loads((two_processes / f"raised.{rank}.json").read_text()) for rank in (0, 1)
    )
    assert first[0] == "AuxiliaryError"
    assert "could not be measured on another process" in first[1]
    assert second == ["ValueError", "only here"]


# ------------------------------------------------------------------------------------ no harm
MODEL = {"dropout": 0.3, "norm": True, "optimizer": "adam"}


def trained(added: list[Any], **options: Any) -> tuple[Any, Any]:
    module = seeded(Classifier, **MODEL)
    data = DataLoader(Samples(N), SIZE, shuffle=True)
    trainer = fit(module, added, data, **options)
    return module, trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_is_bit_identical_to_training_without(precision: str, accumulate: int) -> None:
    options = {"precision": precision, "accumulate_grad_batches": accumulate}
    callback = aux.GradientDirection(every=2, batches=3, full=2)
    plain, before = trained([], **options)
    plain_random = random_state()
    watched, after = trained([callback], **options)
    assert len(callback.measured) >= 2
    assert identical(weights(plain), weights(watched))
    assert identical(optimizer_state(before), optimizer_state(after))
    assert identical(plain_random, random_state())


class Drawing(Classifier):
    """Draws with NumPy and Python in its step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return super().training_step((x * float(numpy.random.rand() + random.random()), y), 0)


def test_what_the_step_draws_with_numpy_and_python_is_put_back_and_the_same_each_time() -> None:
    results = []
    callback = aux.GradientDirection(every=2, batches=3, full=2)
    for added in ([], [callback]):
        module = seeded(Drawing, lr=0.0)
        fit(module, added, DataLoader(Samples(N), SIZE), max_epochs=1)
        results.append(random_state())
    assert identical(*results)
    norms = [found["norm"] for _, found in callback.measured]
    assert norms == [norms[0]] * 3


def test_measurements_of_a_resumed_run_are_those_of_an_uninterrupted_one(tmp_path: Any) -> None:
    whole = aux.GradientDirection(batches=3)
    saving = L.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    model = {**MODEL, "reseeds": True}
    module = seeded(Classifier, **model)
    fit(module, [whole, saving], DataLoader(Samples(N), SIZE), max_epochs=3)
    rest = aux.GradientDirection(batches=3)
    fit(
        seeded(Classifier, **model),
        [rest],
        DataLoader(Samples(N), SIZE),
        max_epochs=3,
        ckpt_path=tmp_path / "epoch=0.ckpt",
    )
    values = [
        [(at, {key: found[key] for key in ("variance", "error", "norm")}) for at, found in each]
        for each in (whole.measured, rest.measured)
    ]
    assert values[0] == values[1]


def test_the_latest_measurement_is_logged(tmp_path: Any) -> None:
    rows: list[dict[str, Any]] = []

    class Rows(L.pytorch.loggers.CSVLogger):
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            rows.append(dict(metrics))

    callback = aux.GradientDirection(batches=3)
    module = seeded(Classifier)
    fit(module, [callback], logger=Rows(tmp_path), log_every_n_steps=5)
    logged = [row for row in rows if "aux/gradient_direction/variance" in row]
    assert [row["aux/gradient_direction/variance"] for row in logged] == pytest.approx(
        [found["variance"] for _, found in callback.measured]
    )


# ------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": 1}, "at least two"),
        ({"full": -1}, "at least two"),
        ({"every": "soon"}, "every='soon'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(aux.AuxiliaryError, match=message):
        aux.GradientDirection(**arguments)


def test_manual_optimisation_and_streams_are_refused_before_the_first_step() -> None:
    from tests.contract.models import Stream

    with pytest.raises(aux.AuxiliaryError, match="manual optimisation"):
        fit(seeded(Classifier, manual=True), [aux.GradientDirection()])
    with pytest.raises(aux.AuxiliaryError, match="by index"):
        fit(
            seeded(Classifier),
            [aux.GradientDirection(every=3)],
            DataLoader(Stream(), SIZE),
            max_epochs=1,
        )
