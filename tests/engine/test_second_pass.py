"""``step.again()``: the model once more in one step, with a gradient and without a trace."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_aux as aux
from tests.engine.small_models import (
    WIDTH,
    Classifier,
    equal,
    largest_difference,
    rows,
    weights,
)
from tests.two_processes import run_script


class Normed(Classifier):
    """With BatchNorm, an activation in place, dropout, and spectral norm where asked."""

    def __init__(self, dropout: float = 0.0, spectral: bool = False) -> None:
        super().__init__()
        first = nn.Linear(WIDTH, 8)
        if spectral:
            first = nn.utils.parametrizations.spectral_norm(first)
        self.encoder = nn.Sequential(
            first, nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(dropout)
        )


class Twice(aux.Objective):
    """R-Drop's idea: the distance between the logits of two passes (Liang et al. 2021)."""

    def __init__(self, weight: Any = 0.5, **arguments: Any) -> None:
        super().__init__(weight, **arguments)
        self.distances: list[float] = []

    def loss(self, step: aux.Step) -> Tensor:
        distance = (step.logits - step.again().logits).square().mean()
        self.distances.append(float(distance.detach()))
        return distance


class Folded(aux.Objective):
    """The same for another input."""

    def loss(self, step: aux.Step) -> Tensor:
        return (step.logits - step.again(step.input().abs()).logits).square().mean()


class FoldedByHand(Normed):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        kept = deepcopy(dict(self.named_buffers()))
        folded = self(x.abs())
        for name, value in self.named_buffers():
            value.data = kept[name]
        return F.cross_entropy(logits, y) + 0.5 * (logits - folded).square().mean()


def trained(plain_trainer: Any, model: L.LightningModule, *callbacks: Any, **fit: Any) -> Any:
    plain_trainer(callbacks=list(callbacks), max_epochs=2).fit(model, rows(), **fit)
    return weights(model)


def made(kind: type[L.LightningModule], *arguments: Any, **named: Any) -> Any:
    torch.manual_seed(3)
    return kind(*arguments, **named)


def test_the_gradient_reaches_the_model_through_both_passes(plain_trainer):
    by_hand = trained(plain_trainer, made(FoldedByHand))
    attached = trained(plain_trainer, made(Normed), Folded(0.5))
    plain = trained(plain_trainer, made(Normed))
    assert largest_difference(attached, by_hand) < 1e-6
    assert largest_difference(attached, plain) > 1e-3


class Copied(L.Callback):
    """The buffers of a model after every batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, module: nn.Module, *_: Any) -> None:
        self.seen.append({name: value.clone() for name, value in module.named_buffers()})


@pytest.mark.parametrize("spectral", [False, True])
def test_f71_running_statistics_are_those_of_one_pass(spectral, plain_trainer):
    """Statistics depend on the weights, so these stay where they are: the rate is 0."""
    results = []
    for callbacks in ([], [Twice()], [Folded(), Twice(name="too")]):
        model, copied = made(Normed, 0.2, spectral), Copied()
        model.lr = 0.0
        torch.manual_seed(4)
        trained(plain_trainer, model, *callbacks, copied)
        assert model.encoder[1].momentum == 0.1
        results.append(copied.seen)
    assert int(results[0][-1]["encoder.1.num_batches_tracked"]) == 12
    for result in results[1:]:
        assert all(equal(one, other) for one, other in zip(results[0], result, strict=True))


def test_dropout_draws_other_masks_and_leaves_the_users_stream_alone(plain_trainer):
    drawn = []

    class Drawing(Normed):
        def on_train_batch_end(self, *_: Any) -> None:
            drawn[-1].append(torch.rand(1).item())

    twice = Twice()
    for callbacks in ([], [twice]):
        drawn.append([])
        torch.manual_seed(4)
        trained(plain_trainer, made(Drawing, 0.4), *callbacks)
    assert drawn[0] == drawn[1]
    assert min(twice.distances) > 0
    assert len(set(twice.distances)) == 12


def test_a_resumed_run_draws_the_masks_of_the_run_that_never_stopped(plain_trainer, tmp_path):
    def run(epochs: int, **fit: Any) -> Any:
        twice = Twice()
        trainer = plain_trainer(callbacks=[twice], max_epochs=epochs)
        torch.manual_seed(9)
        trainer.fit(made(Reseeded, 0.4), rows(), **fit)
        return trainer, twice.distances, weights(trainer.lightning_module)

    class Reseeded(Normed):
        def on_train_batch_start(self, *_: Any) -> None:
            torch.set_rng_state(torch.Generator().manual_seed(self.global_step).get_state())

    _, whole, expected = run(2)
    trainer, first, _ = run(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    _, second, resumed = run(2, ckpt_path=tmp_path / "one.ckpt")
    assert first + second == whole
    assert equal(expected, resumed)


def test_what_the_model_logs_and_counts_is_that_of_one_pass(plain_trainer):
    class Logging(Normed):
        def forward(self, x: Tensor) -> Any:
            self.log("rows", float(len(x)), on_epoch=True, on_step=False, reduce_fx="sum")
            return super().forward(x)

    model = made(Logging)
    trainer = plain_trainer(callbacks=[Twice()])
    trainer.fit(model, rows())
    assert trainer.logged_metrics["rows"] == 24


def test_features_of_the_second_pass_are_its_own(plain_trainer):
    seen = []

    class Both(aux.Objective):
        def loss(self, step: aux.Step) -> Tensor:
            first, second = step.features("encoder"), step.again(step.input().abs()).features()
            seen.append((torch.equal(first, second), first.requires_grad, second.requires_grad))
            return step.loss * 0

    both = Both(reads="encoder", taps=aux.Taps(features="encoder"))
    plain_trainer(callbacks=[both]).fit(made(Normed), rows())
    assert seen == [(False, True, True)] * 6


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("second_pass")
    script = Path(__file__).with_name("second_pass_in_two_processes.py")
    run_script(str(script), folder, timeout=120)
    return folder


@pytest.mark.xdist_group("second_pass")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_f71_two_processes_train_and_count_as_by_hand(strategy, two_processes):
    """``ddp`` writes the buffers of one process into all of them before every step."""
    for rank in (0, 1):
        results = torch.load(two_processes / f"{strategy}.{rank}.pt")
        attached, by_hand, plain = (results[key] for key in ("attached", "by hand", "plain"))
        assert int(attached["encoder.1.num_batches_tracked"]) == 6
        assert largest_difference(attached, by_hand) < 1e-6
        assert largest_difference(attached, plain) > 1e-3
