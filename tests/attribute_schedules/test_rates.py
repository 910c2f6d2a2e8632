"""``DropoutSchedule`` beside odd lengths of training, interruptions and second fits."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn

import lightning_aux as aux
from lightning_aux.functional import dropout_rate
from tests.engine.small_models import Classifier, rows

USERS_RATE = 0.123


class Witness(Classifier):
    """Notes before every forward how many optimizer steps there were and the rate that acts."""

    def __init__(self, rate: float = USERS_RATE) -> None:
        super().__init__(dropout=rate)
        self.taken = 0
        self.seen: list[tuple[int, float]] = []

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.seen.append((self.taken, self.encoder[2].p))
        return super().forward(x)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.taken += 1

    @property
    def rates(self) -> list[float]:
        return [rate for _, rate in self.seen]


class Stop(L.Callback):
    """Saves and raises when the batch number ``batches`` of the fit begins."""

    def __init__(self, batches: int, path: Path, error: type[BaseException] = RuntimeError) -> None:
        self.batches, self.path, self.error = batches, path, error
        self.begun = 0

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if self.begun == self.batches:
            trainer.save_checkpoint(self.path)
            raise self.error("stopped")
        self.begun += 1


def test_epochs_of_different_length_are_counted_in_their_own_steps(plain_trainer):
    model = Witness()
    added = [
        aux.DropoutSchedule(0.4, mode="early", until="1ep"),
        GradientAccumulationScheduler({0: 3, 1: 2}),
    ]
    plain_trainer(max_epochs=3, callbacks=added).fit(model, rows())
    # 6 batches: two steps in the first epoch, three in the others.
    taken = [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    assert [step for step, _ in model.seen] == taken
    assert model.rates == [0.4] * 6 + [0.0] * 12


@pytest.mark.parametrize("seed", range(8))
def test_max_steps_is_the_length_of_the_training_that_percent_are_of(seed, plain_trainer):
    draw = random.Random(seed)
    total, percent, window = draw.randint(2, 11), draw.randint(0, 100), draw.randint(1, 2)
    mode, bound = draw.choice([("early", "until"), ("late", "start")])
    p, cut = draw.random(), math.floor(percent * total / 100 + 0.5)
    schedule = aux.DropoutSchedule(p, mode=mode, shape="linear", **{bound: f"{percent}%"})
    model = Witness()
    plain_trainer(
        max_epochs=4, max_steps=total, accumulate_grad_batches=window, callbacks=[schedule]
    ).fit(model, rows(24 * window))
    assert model.taken == total
    assert model.rates == [
        dropout_rate(step, p, mode, total, shape="linear", **{bound: cut}) for step, _ in model.seen
    ]


def test_an_end_beyond_the_training_leaves_dropout_on(plain_trainer):
    model = Witness()
    plain_trainer(callbacks=[aux.DropoutSchedule(0.4, until="5ep")]).fit(model, rows())
    assert model.rates == [0.4] * 6


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("stop_after", [4, 8, 13])
def test_a_resumed_run_goes_on_with_the_rate_where_it_stopped(
    window, stop_after, plain_trainer, tmp_path
):
    def trainer(*more: L.Callback) -> L.Trainer:
        schedule = aux.DropoutSchedule(p=0.5, mode="early", until="80%", shape="linear")
        return plain_trainer(
            max_epochs=3, callbacks=[schedule, *more], accumulate_grad_batches=window
        )

    whole, first, second = Witness(), Witness(), Witness()
    trainer().fit(whole, rows(32))
    path = tmp_path / "stopped.ckpt"
    with pytest.raises(RuntimeError, match="stopped"):
        trainer(Stop(stop_after, path)).fit(first, rows(32))
    assert first.encoder[2].p == USERS_RATE
    second.taken = first.taken
    trainer().fit(second, rows(32), ckpt_path=path, weights_only=True)

    by_step = dict(whole.seen)
    assert len(set(by_step.values())) > 3
    assert dict(first.seen + second.seen) == by_step
    assert all(by_step[step] == rate for step, rate in first.seen + second.seen)
    assert second.encoder[2].p == USERS_RATE


def test_a_longer_second_fit_drives_again_and_restores_again(plain_trainer):
    model = Witness()
    trainer = plain_trainer(callbacks=[aux.DropoutSchedule(0.4, mode="late", start="8 steps")])
    trainer.fit(model, rows())
    assert model.encoder[2].p == USERS_RATE
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, rows())
    assert model.rates == [0.0] * 8 + [0.4] * 4
    assert model.encoder[2].p == USERS_RATE


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_the_users_rates_are_back_after_an_exception(error, plain_trainer, tmp_path):
    model = Witness()
    model.second = nn.Dropout(0.77)
    added = [aux.DropoutSchedule(0.4, until=2), Stop(3, tmp_path / "stopped.ckpt", error)]
    with pytest.raises((error, SystemExit)):
        plain_trainer(callbacks=added).fit(model, rows())
    assert model.rates == [0.4, 0.4, 0.0]
    assert model.encoder[2].p == USERS_RATE
    assert model.second.p == 0.77


def test_the_rates_are_the_users_again_in_test_and_predict(plain_trainer):
    class Tested(Witness):
        at_test = -1.0

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.at_test = self.encoder[2].p

    model = Tested()
    trainer = plain_trainer(callbacks=[aux.DropoutSchedule(0.4, until="100%")])
    trainer.fit(model, rows())
    trainer.test(model, rows(), verbose=False)
    assert model.at_test == USERS_RATE


def test_driving_draws_no_random_numbers(plain_trainer):
    # A schedule that always sets the user's own rate trains to the last bit as none at all.
    plain, driven = Witness(0.3), Witness(0.3)
    driven.load_state_dict(plain.state_dict())
    for model, added in ((plain, []), (driven, [aux.DropoutSchedule(0.3, mode="standard")])):
        L.seed_everything(5, verbose=False)
        plain_trainer(callbacks=added).fit(model, rows(shuffle=True))
    assert driven.rates == [0.3] * 6
    for ours, theirs in zip(driven.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
