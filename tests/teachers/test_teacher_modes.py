"""The teacher's pass is in evaluation mode and leaves the student's modes and statistics alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_aux as aux
from tests.engine.small_models import WIDTH, Blind, Classifier, equal, rows, weights


class Normed(Classifier):
    """BatchNorm and dropout; notes in which mode each of its modules runs, pass by pass."""

    def __init__(self, calls_train: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5)
        )
        self.calls_train = calls_train
        self.modes: list[set[bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append({module.training for module in self.modules()})
        return super().forward(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.calls_train:
            self.train()
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


TEACHERS = {"frozen": aux.FrozenTeacher, "ema": lambda: aux.EMATeacher(decay=0.5)}


@pytest.mark.parametrize("calls_train", [False, True])
@pytest.mark.parametrize("name", TEACHERS)
def test_f29_every_module_of_the_teacher_evaluates_while_the_student_trains(
    name, calls_train, plain_trainer
):
    """Also after a validation, and when the user calls ``self.train()`` (F29)."""
    model = Normed(calls_train)
    probe = Blind(lambda step: step.teacher(name).logits)
    plain_trainer(max_epochs=2, val_check_interval=3, callbacks=[TEACHERS[name](), probe]).fit(
        model, rows(), rows()
    )
    assert model.modes == [{True}, {False}] * 12


@pytest.mark.parametrize("name", TEACHERS)
def test_f71_the_students_statistics_and_random_stream_are_as_without_a_teacher(
    name, plain_trainer
):
    """F71: running statistics move once per step, with the student's batch alone."""
    results = []
    ask = Blind(lambda step: step.teacher(name).logits)
    for callbacks in ([], [TEACHERS[name](), ask]):
        torch.manual_seed(9)
        model = Normed()
        plain_trainer(max_epochs=2, callbacks=callbacks).fit(model, rows())
        results.append((weights(model), torch.rand(1)))
    assert equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert int(results[1][0]["encoder.1.num_batches_tracked"]) == 12


def test_f29_a_frozen_teachers_statistics_stay_those_of_the_start(plain_trainer):
    model = Normed()
    initial = {n: b.clone() for n, b in model.named_buffers()}

    def look(step: aux.Step) -> bool:
        step.teacher("frozen")
        held = step._engine.teacher("frozen", "test").store.state_dict()
        return all(torch.equal(held[name], buffer) for name, buffer in initial.items())

    probe = Blind(look)
    plain_trainer(callbacks=[aux.FrozenTeacher(), probe]).fit(model, rows())
    assert probe.seen == [True] * 6


def test_f29_two_passes_of_one_teacher_over_one_batch_are_identical(plain_trainer):
    """Dropout is off: what the teacher says of a batch is a function of the batch."""

    def look(step: aux.Step) -> bool:
        return torch.equal(step.teacher("one").logits, step.teacher("two").logits)

    probe = Blind(look)
    teachers = [aux.FrozenTeacher("one"), aux.FrozenTeacher("two")]
    plain_trainer(callbacks=[*teachers, probe]).fit(Normed(), rows())
    assert probe.seen == [True] * 6


def test_modules_that_the_user_keeps_in_evaluation_mode_stay_there(plain_trainer):
    class HalfFrozen(Normed):
        def on_train_batch_start(self, *_: Any) -> None:
            self.encoder[1].eval()

        def on_train_batch_end(self, *_: Any) -> None:
            after.append([self.encoder[1].training, self.encoder[3].training, self.training])

    after: list[list[bool]] = []
    probe = Blind(lambda step: step.teacher("ema").logits)
    plain_trainer(callbacks=[aux.EMATeacher(), probe]).fit(HalfFrozen(), rows())
    assert after == [[False, True, True]] * 6


def test_a_train_method_of_the_user_is_not_called_by_the_teacher(plain_trainer):
    class Overriding(Normed):
        def train(self, mode: bool = True) -> Any:
            calls.append(mode)
            return super().train(mode)

    calls: list[bool] = []
    plain_trainer(max_steps=4).fit(Overriding(), rows())
    without, calls[:] = list(calls), []
    probe = Blind(lambda step: step.teacher("ema").logits)
    plain_trainer(max_steps=4, callbacks=[aux.EMATeacher(), probe]).fit(Overriding(), rows())
    assert calls == without
