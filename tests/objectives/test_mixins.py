"""Mixins: the same training as the callbacks, bit for bit, alone and together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

import lightning_aux as aux
from tests.engine.small_models import Classifier, equal, rows, weights


class Plain(Classifier):
    def __init__(self) -> None:
        super().__init__(dropout=0.2, lr=0.1)


class Anchored(aux.EMAAnchorMixin, Plain):
    ema_anchor = {"weight": 0.7, "decay": 0.9, "entropy": 0.1}


class Distilled(aux.SelfDistillationMixin, Plain):
    self_distillation = {"temperature": 2.0, "weight": "linear(0, 1, until=50%)"}
    ema_teacher = {"decay": 0.9}


class Dropped(aux.DropoutScheduleMixin, Plain):
    dropout_schedule = {"p": 0.4, "until": "50%"}


class Everything(aux.EMAAnchorMixin, aux.SelfDistillationMixin, aux.DropoutScheduleMixin, Plain):
    ema_anchor = Anchored.ema_anchor
    self_distillation = Distilled.self_distillation
    ema_teacher = Distilled.ema_teacher
    dropout_schedule = Dropped.dropout_schedule


class Own(aux.AuxiliaryMixin, Plain):
    def auxiliary_callbacks(self) -> list[Any]:
        return [*super().auxiliary_callbacks(), aux.EarlyLearningRegularization(weight=1.0)]


def anchor() -> list[Any]:
    return [aux.EMAAnchor(**Anchored.ema_anchor)]


def distillation() -> list[Any]:
    return [aux.EMATeacher(decay=0.9), aux.SelfDistillation(**Distilled.self_distillation)]


def dropout() -> list[Any]:
    return [aux.DropoutSchedule(p=0.4, until="50%")]


PAIRS: dict[type[Plain], Callable[[], list[Any]]] = {
    Anchored: anchor,
    Distilled: distillation,
    Dropped: dropout,
    Everything: lambda: [*anchor(), *distillation(), *dropout()],
    Own: lambda: [aux.EarlyLearningRegularization(weight=1.0)],
}


def trained(plain_trainer: Any, model: L.LightningModule, callbacks: list[Any]) -> Any:
    plain_trainer(max_epochs=2, callbacks=callbacks).fit(model, rows(24, 4, shuffle=True))
    return weights(model)


@pytest.mark.parametrize("mixed", PAIRS, ids=lambda each: each.__name__)
def test_a_mixin_trains_as_its_callbacks_to_the_last_bit(mixed, plain_trainer):
    torch.manual_seed(1)
    by_mixin = trained(plain_trainer, mixed(), [])
    torch.manual_seed(1)
    by_callbacks = trained(plain_trainer, Plain(), PAIRS[mixed]())
    torch.manual_seed(1)
    without = trained(plain_trainer, Plain(), [])
    assert equal(by_mixin, by_callbacks)
    assert not equal(by_mixin, without)


def test_the_modules_own_callbacks_stay(plain_trainer):
    class Counting(Callback):
        batches = 0

        def on_train_batch_end(self, *_: Any) -> None:
            self.batches += 1

    class WithOwn(Plain):
        def configure_callbacks(self) -> list[Callback]:
            return [counting]

    class Mixed(aux.EMAAnchorMixin, WithOwn):
        pass

    counting = Counting()
    model = Mixed()
    assert [type(each).__name__ for each in model.configure_callbacks()] == [
        "Counting",
        "EMAAnchor",
    ]
    plain_trainer(callbacks=[]).fit(model, rows())
    assert counting.batches == 6


def test_a_mixin_adds_to_the_trainers_callbacks(plain_trainer):
    """The module brings its anchor, the Trainer an objective of another class."""
    torch.manual_seed(1)
    mixed = trained(plain_trainer, Anchored(), [aux.EarlyLearningRegularization()])
    torch.manual_seed(1)
    both = trained(plain_trainer, Plain(), [*anchor(), aux.EarlyLearningRegularization()])
    assert equal(mixed, both)


def test_arguments_that_do_not_fit_are_refused_by_the_objective_itself(plain_trainer):
    class Mistaken(aux.EMAAnchorMixin, Plain):
        ema_anchor = {"space": "hidden"}

    with pytest.raises(aux.AuxiliaryError, match="space='hidden' is unknown"):
        plain_trainer().fit(Mistaken(), rows())


def test_the_class_attributes_of_a_mixin_are_not_shared(plain_trainer):
    plain_trainer().fit(Everything(), rows())
    assert aux.EMAAnchorMixin.ema_anchor == {}
    assert aux.SelfDistillationMixin.self_distillation == {}
    assert Everything.dropout_schedule == {"p": 0.4, "until": "50%"}
