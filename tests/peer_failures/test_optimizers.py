"""Optimizers, their groups and schedulers, and what is frozen: all as without us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from lightning_aux import (
    AttributeSchedule,
    DropoutSchedule,
    EMAAnchor,
    EMAWeights,
    MultiSampleDropout,
    QuantizedWeights,
    Step,
    StochasticDepthSchedule,
)
from lightning_aux.registry import ENTRIES
from tests.contract.models import Classifier, EpochShuffle
from tests.contract.probe import Probe
from tests.contract.training import (
    callbacks,
    fit,
    identical,
    loader,
    optimizer_state,
    seeded,
    weights,
)

STEPS = 5  # per epoch
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning.pytorch")
every_case = pytest.mark.parametrize("case", [*ENTRIES, "head"])
# All but those that are asked to set the rate themselves, or to begin its schedule again.
OF_THE_RATE = ("generations", "attribute_schedule")
every_case_of_one_training = pytest.mark.parametrize(
    "case", [*(name for name in ENTRIES if name not in OF_THE_RATE), "head"]
)


def attached(case: str) -> list[Any]:
    """The callbacks of a case; no time in them depends on the length of the training."""
    if case == "head":
        return [Probe(0.5)]
    if case == "dropout_schedule":
        return [DropoutSchedule(p=0.3, until=12, shape="linear")]
    if case == "stochastic_depth_schedule":
        return [StochasticDepthSchedule(1.0, "encoder.1", mode="early", until=7)]
    if case == "attribute_schedule":
        return [AttributeSchedule({"optimizer.lr": "linear(0.2, 0.05, until=12)"})]
    return list(callbacks(case, 0.5))


def shuffled() -> Any:
    return loader(8 * STEPS, sampler=EpochShuffle(8 * STEPS))


# -------------------------------------------- F37: what is frozen stays the user's
class Unfreezing(BaseFinetuning):
    """The encoder trains from the second epoch on."""

    def freeze_before_training(self, module: Any) -> None:
        self.freeze(module.encoder)

    def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.encoder, optimizer, lr=0.01)


class ByHand(L.Callback):
    """The same without a group of its own: the user's plain way."""

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        module.encoder.requires_grad_(trainer.current_epoch >= 1)


class Trainable(L.Callback):
    """Which parameters are trainable in each step, and how far the encoder moved in it."""

    def __init__(self) -> None:
        self.maps: list[dict[str, bool]] = []
        self.moved: list[bool] = []

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self.maps.append({name: each.requires_grad for name, each in module.named_parameters()})
        self.before = module.encoder[0].weight.detach().clone()

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.moved.append(not torch.equal(self.before, module.encoder[0].weight))


class Filtering(Classifier):
    """Optimizes what is trainable when training begins, as `BaseFinetuning` asks for."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([each for each in self.parameters() if each.requires_grad], lr=0.05)


# Heads beside a finetuning callback are a named error.
WITH_HEADS = ("dual_head_distillation", "multi_teacher_distillation")


@pytest.mark.parametrize(
    ("case", "how"),
    [
        (case, how)
        for case in ENTRIES
        for how in ("by hand", "by a finetuning callback")
        if how == "by hand" or case not in WITH_HEADS
    ],
)
def test_f37_a_resumed_run_trains_what_had_been_unfrozen_before_it_stopped(
    tmp_path: Path, case: str, how: str
) -> None:
    """With a finetuning callback Lightning 2.6 itself freezes anew; then it does so without us too.

    What is compared is the run with ours and the run without, resumed in the second epoch.
    """

    def run(ours: bool, ckpt_path: Path | None, *more: Any) -> tuple[Trainable, dict[str, Any]]:
        by_hand = how == "by hand"
        module = seeded(Classifier if by_hand else Filtering, optimizer="adam", reseeds=True)
        added = attached(case) if ours else []
        watching = Trainable()
        freezing = ByHand() if by_hand else Unfreezing()
        fit(
            module,
            [freezing, *added, watching, *more],
            shuffled(),
            max_epochs=4,
            ckpt_path=ckpt_path,
        )
        ended = {"weights": weights(module), "ours": [each.state() for each in added]}
        return watching, ended

    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2 * STEPS, save_top_k=-1)
    whole, expected = run(True, None, saving)
    bare, _ = run(False, None)
    assert whole.maps == bare.maps
    assert [each["encoder.0.weight"] for each in whole.maps] == [False] * STEPS + [True] * 3 * STEPS
    assert whole.moved == bare.moved == [False] * STEPS + [True] * 3 * STEPS

    path = tmp_path / f"step={2 * STEPS}.ckpt"
    resumed, actual = run(True, path)
    if how == "by hand":
        assert resumed.maps == whole.maps[2 * STEPS :]
        assert resumed.moved == [True] * 2 * STEPS
        assert identical(actual, expected)
    else:
        bare, _ = run(False, path)
        assert resumed.maps == bare.maps


def test_f37_the_distance_to_an_average_counts_what_is_trainable_now(tmp_path: Path) -> None:
    """The average follows frozen parameters, and the anchor pulls them once they are unfrozen."""
    counted: list[int] = []

    class Counting(EMAAnchor):
        def loss(self, step: Step) -> Tensor:
            counted.append(len(step.weights(self.teacher)[0]))
            return super().loss(step)

    added = [Counting(space="weight", weight=0.5, decay=0.5), ByHand()]
    fit(seeded(Classifier), added, shuffled(), max_epochs=2)
    assert counted == [2] * STEPS + [4] * STEPS


# -------------------------------------------- F40: the rate that is set is the rate of the step
class Following(L.Callback):
    """Every step is `-lr · gradient` with the rate that the scheduler has just set."""

    def __init__(self, rates: Any, added: list[Any]) -> None:
        self.rates, self.added = rates, added
        self.groups: list[Any] = []
        self.wrong: list[str] = []
        self.steps = 0

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        parameters = [*module.parameters(), *self._of_head()]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.before = [
            (p, p.detach().clone(), g.detach().clone())
            for p, g in zip(parameters, gradients, strict=True)
        ]

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        (optimizer,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
        same = config.scheduler.optimizer.param_groups is optimizer.param_groups
        self.groups.append((same, [id(each) for each in optimizer.param_groups]))
        rate = self.rates(self.steps)
        for parameter, before, gradient in self.before:
            if not torch.allclose(parameter, before - rate * gradient, atol=1e-7):
                self.wrong.append(f"step {self.steps}, {tuple(parameter.shape)}")
        self.steps += 1

    def _of_head(self) -> list[nn.Parameter]:
        heads = [each.head for each in self.added if hasattr(each, "head")]
        return [parameter for head in heads for parameter in head.parameters()]


@every_case_of_one_training
def test_f40_the_rate_that_a_scheduler_sets_is_the_rate_of_the_step(case: str) -> None:
    """A warm-up from 0: where a step used another group than the scheduler, nothing would move."""

    def rates(step: int) -> float:
        return 0.1 * step / 10

    class WarmingUp(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            self.made = optimizer.param_groups, [id(each) for each in optimizer.param_groups]
            scheduler = LambdaLR(optimizer, lambda step: step / 10)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    module, added = seeded(WarmingUp), attached(case)
    following = Following(rates, added)
    trainer = fit(module, [*added, following], shuffled(), max_epochs=2)
    assert following.wrong == []
    assert following.steps == 2 * STEPS
    groups, ids = module.made
    assert trainer.optimizers[0].param_groups is groups
    assert following.groups == [(True, ids)] * 2 * STEPS
    if case == "head":
        assert len(following.before) == 6
        assert all(bool(gradient.any()) for _, _, gradient in following.before[-2:])


# -------------------------------------------- F56: learning-rate schedulers
def by_step(optimizer: Any) -> dict[str, Any]:
    scheduler = LambdaLR(optimizer, lambda step: 0.9**step)
    return {"scheduler": scheduler, "interval": "step", "frequency": 2, "name": "theirs"}


def by_epoch(optimizer: Any) -> dict[str, Any]:
    return {"scheduler": LambdaLR(optimizer, lambda epoch: 0.5**epoch)}


def on_plateau(optimizer: Any) -> dict[str, Any]:
    scheduler = ReduceLROnPlateau(optimizer, patience=0, threshold=0.1)
    return {"scheduler": scheduler, "monitor": "val_loss", "strict": True, "frequency": 1}


class Rates(L.Callback):
    """The configuration of the schedulers, and the rate of every step."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.kept: list[bool] = []

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        (config,) = trainer.lr_scheduler_configs
        self.first = config, config.scheduler
        self.settings = {
            name: value for name, value in vars(config).items() if name != "scheduler"
        } | {"class": type(config.scheduler).__name__}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])
        (config,) = trainer.lr_scheduler_configs
        kept = (config, config.scheduler)
        self.kept.append(all(a is b for a, b in zip(kept, self.first, strict=True)))


@pytest.mark.parametrize("kind", [by_step, by_epoch, on_plateau], ids=lambda kind: kind.__name__)
@every_case_of_one_training
def test_f56_schedulers_and_the_curve_of_the_rate_are_those_without_us(
    tmp_path: Path, case: str, kind: Any
) -> None:
    """Fresh and resumed, step by step; the term itself weighs nothing, so losses are the same."""

    class Scheduled(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(
                [
                    {"params": self.encoder.parameters(), "lr": 0.05},
                    {"params": self.head.parameters(), "lr": 0.01},
                ]
            )
            return {"optimizer": optimizer, "lr_scheduler": kind(optimizer)}

    def run(folder: Path, ours: bool, ckpt_path: Path | None = None) -> Any:
        added: list[Any] = []
        if ours:
            added = {
                "head": lambda: [Probe(0.0)],
                # at the model's own rate, so that the monitored loss is the same
                "dropout_schedule": lambda: [DropoutSchedule(p=0.2, mode="standard")],
                "multi_sample_dropout": lambda: [MultiSampleDropout("encoder", weight=0.0)],
                "stochastic_depth_schedule": lambda: [StochasticDepthSchedule(0.0, "encoder.1")],
                "ema_weights": lambda: [EMAWeights(decay=0.0)],
                # Of two values one is the least and one the greatest: the losses are the same.
                "quantized_weights": lambda: [QuantizedWeights(bucket=2)],
            }.get(case, lambda: list(callbacks(case, 0.0)))()
        watching = Rates()
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=8, save_top_k=-1)
        module = seeded(Scheduled, dropout=0.2, reseeds=True)
        trainer = fit(
            module,
            [*added, watching, saving],
            shuffled(),
            loader(16),
            max_epochs=4,
            ckpt_path=ckpt_path,
        )
        (config,) = trainer.lr_scheduler_configs
        state = {k: v for k, v in config.scheduler.state_dict().items() if not callable(v)}
        return watching, state, optimizer_state(trainer)

    (bare, *without), (ours, *with_us) = (run(tmp_path / str(own), own) for own in (False, True))
    assert ours.settings == bare.settings
    assert ours.rates == bare.rates
    assert len({tuple(each) for each in bare.rates}) > 1
    assert all(ours.kept)
    assert identical(with_us, without)

    (bare, *_), (ours, *_) = (
        run(tmp_path / f"again {own}", own, tmp_path / str(own) / "step=8.ckpt")
        for own in (False, True)
    )
    assert ours.settings == bare.settings
    assert ours.rates == bare.rates
    assert len(ours.rates) == 4 * STEPS - 8
    assert all(ours.kept)
