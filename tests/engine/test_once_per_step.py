"""Lazy and shared: a forward, a callable or an index is computed once per step, on first use."""

from __future__ import annotations

import torch
from torch import Tensor

import lightning_aux as aux
from tests.engine.small_models import Blind, Classifier, Probe, rows


class Counting(Classifier):
    """Counts the calls of its forward in training and in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = {True: 0, False: 0}

    def forward(self, x: Tensor) -> Tensor:
        self.calls[self.training] += 1
        return super().forward(x)


def test_one_teacher_forward_per_step_however_many_objectives_ask(plain_trainer):
    model = Counting()
    callbacks = [
        aux.EMATeacher(decay=0.9),
        aux.SelfDistillation(name="on_logits"),
        aux.SelfDistillation(name="correct", only_correct=True, divergence="js"),
        aux.SelfDistillation(name="on_features", on="encoder", divergence="mse"),
        aux.SelfDistillation(name="on_glob", on="encoder.*", divergence="cosine"),
        aux.EMAAnchor(teacher="ema"),
    ]
    plain_trainer(callbacks=callbacks).fit(model, rows())
    assert model.calls == {True: 6, False: 6}


def test_each_named_teacher_runs_once(plain_trainer):
    model = Counting()
    callbacks = [
        aux.EMATeacher(decay=0.9),
        aux.FrozenTeacher(),
        aux.SelfDistillation("ema", name="a"),
        aux.SelfDistillation("frozen", name="b"),
        aux.SelfDistillation("frozen", name="c", divergence="reverse_kl"),
    ]
    plain_trainer(callbacks=callbacks).fit(model, rows())
    assert model.calls == {True: 6, False: 12}


def test_a_teacher_that_nobody_asks_runs_no_forward(plain_trainer):
    model = Counting()
    callbacks = [aux.EMATeacher(), aux.FrozenTeacher(), Blind(lambda step: step.logits.sum())]
    plain_trainer(callbacks=callbacks).fit(model, rows())
    assert model.calls == {True: 6, False: 0}


def test_a_teacher_of_a_silent_objective_runs_no_forward(plain_trainer):
    model = Counting()
    # Three of the six steps have weight 0.
    callbacks = [aux.EMATeacher(), aux.SelfDistillation(weight="late(1, start=50%)")]
    plain_trainer(callbacks=callbacks).fit(model, rows())
    assert model.calls == {True: 6, False: 3}


def test_a_callable_tap_is_called_once_per_pass_for_all_objectives(plain_trainer):
    calls: list[str] = []

    def logits(seen: aux.Pass) -> Tensor:
        calls.append("student" if isinstance(seen, aux.Step) else "teacher")
        return seen.returned

    def target(seen: aux.Pass) -> Tensor:
        calls.append("target")
        return seen.batch[1]

    callbacks = [
        aux.Taps(logits=logits, target=target),
        aux.FrozenTeacher(),
        aux.SelfDistillation("frozen", name="a", only_correct=True),
        aux.SelfDistillation("frozen", name="b", only_correct=True),
    ]
    plain_trainer(max_steps=2, callbacks=callbacks).fit(Classifier(), rows())
    assert sorted(calls) == ["student"] * 2 + ["target"] * 2 + ["teacher"] * 2


def test_all_objectives_share_one_index_tensor(plain_trainer):
    one, other = Probe(lambda step: step.index, name="a"), Probe(lambda step: step.index, name="b")
    plain_trainer(max_steps=2, callbacks=[one, other]).fit(Classifier(), rows())
    assert all(mine is yours for mine, yours in zip(one.seen, other.seen, strict=True))
    assert not torch.equal(one.seen[0], one.seen[1])


def test_what_a_default_was_bound_to_is_said_once(plain_trainer, caplog):
    with caplog.at_level("INFO"):
        trainer = plain_trainer(
            callbacks=[Blind(lambda step: (step.logits, step.target), name=each) for each in "ab"]
        )
        trainer.fit(Classifier(), rows())
    said = [each.message for each in caplog.records if each.message.startswith("lightning_aux")]
    assert said == [
        "lightning_aux: logits = Classifier.forward(...)",
        "lightning_aux: target = batch[1]",
    ]
