"""Mixins: the same training as the callbacks, bit for bit, alone and together."""

from __future__ import annotations

import copy
import pickle
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


@pytest.mark.parametrize(
    "returned", [Callback(), (Callback(),), None], ids=["one", "tuple", "none"]
)
def test_what_lightning_takes_from_configure_callbacks_is_taken(returned, plain_trainer):
    class WithOwn(Plain):
        def configure_callbacks(self) -> Any:
            return returned

    class Mixed(aux.EMAAnchorMixin, WithOwn):
        pass

    model = Mixed()
    trainer = plain_trainer(callbacks=[])
    trainer.fit(model, rows())
    own = 0 if returned is None else 1
    assert [type(each) for each in model.configure_callbacks()[:own]] == [Callback] * own
    assert any(type(each) is aux.EMAAnchor for each in trainer.callbacks)


# ---------------------------------------------------------------------------------- a second fit
def twice(trainer: Any, model: L.LightningModule) -> None:
    trainer.fit(model, rows())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, rows())


def test_a_second_fit_goes_on_with_the_teacher_and_the_memory(plain_trainer):
    class Both(aux.SelfDistillationMixin, Own):
        ema_teacher = {"decay": 0.9}

    torch.manual_seed(1)
    mixed = Both()
    twice(plain_trainer(), mixed)
    made = {each.name: each for each in mixed.configure_callbacks()}
    teacher, elr = made["ema"], made["early_learning_regularization"]
    torch.manual_seed(1)
    plain = Plain()
    added = [
        aux.EMATeacher(decay=0.9),
        aux.SelfDistillation(),
        aux.EarlyLearningRegularization(weight=1.0),
    ]
    twice(plain_trainer(callbacks=added), plain)
    assert teacher.updates == added[0].updates == 12
    assert torch.equal(elr.memory.rows, added[2].memory.rows)
    assert equal(teacher.store.state_dict(), added[0].store.state_dict())
    assert equal(weights(mixed), weights(plain))


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_of_the_module_makes_callbacks_of_its_own(copied, plain_trainer):
    model = Anchored()
    plain_trainer(max_epochs=3).fit(model, rows())
    other = copied(model)
    plain_trainer().fit(other, rows())
    (own,), (fresh,) = model.configure_callbacks(), other.configure_callbacks()
    assert own is not fresh
    assert own.engine.module is model
    assert fresh.engine.module is other
    assert (own.own_teacher.updates, fresh.own_teacher.updates) == (18, 6)


def test_two_modules_of_a_class_have_callbacks_each(plain_trainer):
    assert Anchored().configure_callbacks() != Anchored().configure_callbacks()


@pytest.mark.parametrize(
    "given", [{}, {"dropout_schedule": {"until": "50%"}}], ids=["none", "no p"]
)
def test_a_dropout_mixin_without_a_rate_says_what_to_write(given, plain_trainer):
    forgetful = type("Forgetful", (aux.DropoutScheduleMixin, Plain), given)
    message = r"Forgetful: DropoutScheduleMixin needs a rate.*dropout_schedule = \{'p': 0\.1"
    with pytest.raises(aux.AuxiliaryError, match=message):
        plain_trainer().fit(forgetful(), rows())


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
