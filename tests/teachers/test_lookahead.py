"""``EMATeacher(lookahead=K)``: a loop by hand, and a student that has not noticed."""

from __future__ import annotations

import random
from copy import deepcopy
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

import lightning_aux as aux
from tests.engine.small_models import CLASSES, Classifier, equal, largest_difference, rows, weights
from tests.gpu import training as scaled


class Student(Classifier):
    """With everything that a step changes: moments, running statistics, masks, metrics, logs."""

    def __init__(self) -> None:
        super().__init__(dropout=0.3)
        self.norm = nn.BatchNorm1d(CLASSES)
        self.mean = MeanMetric()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.mean(loss.detach())
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def fit(plain_trainer: Any, *callbacks: Any, **options: Any) -> tuple[Student, L.Trainer]:
    L.seed_everything(5)
    module = Student()
    trainer = plain_trainer(**{"max_epochs": 2} | options, callbacks=list(callbacks))
    trainer.fit(module, rows())
    return module, trainer


@pytest.mark.parametrize("ahead", [1, 3])
def test_the_student_is_restored_bit_for_bit(ahead, plain_trainer):
    """Nothing learns from the teacher: training is what it is without us."""
    ours, trainer = fit(plain_trainer, aux.EMATeacher(0.9, lookahead=ahead))
    random = torch.get_rng_state()
    plain, other = fit(plain_trainer)
    assert equal(weights(ours), weights(plain))
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(ours.mean.compute(), plain.mean.compute())
    assert trainer.global_step == other.global_step == 12
    first, second = (each.optimizers[0].state_dict() for each in (trainer, other))
    assert first["param_groups"] == second["param_groups"]
    for key, state in first["state"].items():
        assert equal(state, second["state"][key])
    assert {k: float(v) for k, v in trainer.callback_metrics.items()} == {
        k: float(v) for k, v in other.callback_metrics.items()
    }
    progress = [
        each.fit_loop.epoch_loop.automatic_optimization.optim_progress.state_dict()
        for each in (trainer, other)
    ]
    assert progress[0] == progress[1]


class Mixes(Student):
    """Mixes samples, as most implementations do, with numbers that are not torch's."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        share = (float(np.random.beta(1, 1)) + random.random()) / 2
        return super().training_step((share * x + (1 - share) * x.flip(0), y), batch_idx)


def test_random_numbers_of_python_and_numpy_are_restored(plain_trainer):
    found = []
    for callbacks in ([], [aux.EMATeacher(0.9, lookahead=2)]):
        L.seed_everything(5)
        module = Mixes()
        plain_trainer(max_epochs=2, callbacks=callbacks).fit(module, rows())
        found.append((weights(module), random.random(), float(np.random.rand())))
    (plain, *numbers), (ours, *others) = found
    assert equal(ours, plain)
    assert numbers == others


def by_hand(ahead: int, decay: float = 0.9) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The procedure of FST-D: the teacher of each step has seen the virtual ones before it."""
    L.seed_everything(5)
    student = Classifier()
    teacher = deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)

    def average() -> None:
        with torch.no_grad():
            for phi, theta in zip(teacher.parameters(), student.parameters(), strict=True):
                phi.copy_(decay * phi + (1 - decay) * theta)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        with torch.no_grad():
            taught = teacher(x).softmax(1)
        logits = student(x)
        divergence = F.kl_div(logits.log_softmax(1), taught, reduction="batchmean")
        (F.cross_entropy(logits, y) + divergence).backward()
        optimizer.step()

    for _ in range(2):
        for x, y in rows():
            before = deepcopy(student.state_dict()), deepcopy(optimizer.state_dict())
            for _ in range(ahead):
                step(x, y)
                average()
            student.load_state_dict(before[0])
            optimizer.load_state_dict(before[1])
            step(x, y)
            average()
    return weights(student), weights(teacher)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_student_and_teacher_are_those_of_the_procedure(ahead, plain_trainer):
    teacher = aux.EMATeacher(0.9, lookahead=ahead)
    L.seed_everything(5)
    module = Classifier()
    plain_trainer(max_epochs=2, callbacks=[teacher, aux.SelfDistillation()]).fit(module, rows())
    student, expected = by_hand(ahead)
    assert largest_difference(weights(module), student) < 1e-5
    assert largest_difference(teacher.store.state_dict(), expected) < 1e-5
    if ahead:
        assert largest_difference(by_hand(0)[1], expected) > 1e-3


def test_memories_and_other_teachers_see_real_steps_only(plain_trainer):
    other = aux.EMATeacher(0.9, "other")
    memory = aux.EarlyLearningRegularization(weight=0.0)
    fit(plain_trainer, aux.EMATeacher(0.9, lookahead=2), other, memory)
    alone, again = aux.EMATeacher(0.9, "other"), aux.EarlyLearningRegularization(weight=0.0)
    fit(plain_trainer, alone, again)
    assert other.updates == alone.updates == 12
    assert equal(other.store.state_dict(), alone.store.state_dict())
    assert torch.equal(memory.memory.rows, again.memory.rows)


def test_an_error_in_a_virtual_step_leaves_the_student(plain_trainer):
    class Fails(Classifier):
        calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.calls += 1
            if self.calls == 5:  # the second virtual step of the second batch
                self.left = self.before
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

        def on_train_batch_start(self, *_: Any) -> None:
            self.before = weights(self)

    module = Fails()
    with pytest.raises(RuntimeError, match="on purpose"):
        plain_trainer(callbacks=[aux.EMATeacher(0.9, lookahead=2)]).fit(module, rows())
    assert equal(weights(module), module.left)


def test_where_it_cannot_work_is_said_before_training(plain_trainer):
    class Manual(Classifier):
        automatic_optimization = False

    with pytest.raises(aux.AuxiliaryError, match="lookahead=-1 counts virtual steps"):
        aux.EMATeacher(lookahead=-1)
    with pytest.raises(aux.AuxiliaryError, match="only with every=1"):
        aux.EMATeacher(lookahead=1, every=2)
    message = "works with automatic optimisation and accumulate_grad_batches=1"
    with pytest.raises(aux.AuxiliaryError, match=message):
        plain_trainer(callbacks=[aux.EMATeacher(lookahead=1)]).fit(Manual(), rows())
    with pytest.raises(aux.AuxiliaryError, match=message):
        fit(plain_trainer, aux.EMATeacher(lookahead=1), accumulate_grad_batches=2)
    for schedule in ({0: 4}, {1: 2}):  # Trainer.accumulate_grad_batches is 1 before training
        with pytest.raises(aux.AuxiliaryError, match=message):
            fit(plain_trainer, aux.EMATeacher(lookahead=1), GradientAccumulationScheduler(schedule))


@pytest.mark.parametrize("fused", [False, True])
def test_a_virtual_step_that_a_scaler_skips_moves_no_teacher(fused):
    """The second batch is too large, in its virtual step and in its real one."""
    teacher = aux.EMATeacher(0.5, lookahead=1)
    seen = scaled.ByBatch(lambda: teacher.store.pairs()[1])
    module = scaled.new(fused=fused, overflows=(2, 3))
    scaled.fit(module, "cpu", [teacher, seen], precision="16-mixed", max_epochs=1)
    first, second, third = seen.seen[:3]
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(second, third, strict=True))
