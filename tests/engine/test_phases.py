"""``Phases`` in training: hooks at the borders, and everything that takes a time takes a border."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint

import lightning_aux as aux
from lightning_aux.engine import AuxiliaryError
from tests.contract.models import ResumableLoader
from tests.engine.small_models import (
    Classifier,
    Probe,
    Rows,
    Shrink,
    equal,
    largest_difference,
    rows,
    weights,
)

SPEC = "warmup: 2 steps, main: 50%, cool: rest"


class Phased(Classifier):
    """Notes batches and phases in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.events.append("batch")
        return super().training_step(batch, batch_idx)

    def on_phase_start(self, phase: str) -> None:
        self.events.append(f"module: {phase} starts")

    def on_phase_end(self, phase: str) -> None:
        self.events.append(f"module: {phase} ends")


class Listening(L.Callback):
    def on_phase_start(self, trainer: L.Trainer, module: Phased, phase: str) -> None:
        assert trainer.lightning_module is module
        module.events.append(f"callback: {phase} starts")

    def on_phase_end(self, trainer: L.Trainer, module: Phased, phase: str) -> None:
        assert trainer.lightning_module is module
        module.events.append(f"callback: {phase} ends")


def said(*what: str) -> list[str]:
    return [f"{who}: {each}" for each in what for who in ("callback", "module")]


@pytest.mark.parametrize("first", [True, False])
def test_the_hooks_are_called_once_each_at_their_borders(first, plain_trainer):
    model = Phased()
    added = [Listening(), aux.Phases(SPEC)] if first else [aux.Phases(SPEC), Listening()]
    plain_trainer(callbacks=added).fit(model, rows())
    assert model.events == [
        *said("warmup starts"),
        *["batch"] * 2,
        *said("warmup ends", "main starts"),
        *["batch"] * 3,
        *said("main ends", "cool starts"),
        "batch",
        *said("cool ends"),
    ]


def test_at_a_border_the_step_before_it_has_been_taken(plain_trainer):
    class Looking(L.Callback):
        def on_phase_start(self, trainer: L.Trainer, module: Phased, phase: str) -> None:
            found.append(weights(module))

    found: list[dict[str, torch.Tensor]] = []
    path = Path()
    plain_trainer(callbacks=[Looking(), path, aux.Phases(SPEC)]).fit(Phased(), rows())
    assert len(found) == 3
    for seen, steps in zip(found, (0, 2, 5), strict=True):
        assert equal(seen, path.weights[steps])


@pytest.mark.parametrize("window", [1, 2])
def test_the_hooks_see_the_step_of_the_border_and_gradients(window, plain_trainer):
    class Looking(L.Callback):
        def on_phase_start(self, trainer: L.Trainer, module: Phased, phase: str) -> None:
            seen.append((f"{phase} starts", trainer.global_step, torch.is_grad_enabled()))

        def on_phase_end(self, trainer: L.Trainer, module: Phased, phase: str) -> None:
            seen.append((f"{phase} ends", trainer.global_step, torch.is_grad_enabled()))

    seen: list[tuple[str, int, bool]] = []
    trainer = plain_trainer(callbacks=[aux.Phases(SPEC), Looking()], accumulate_grad_batches=window)
    trainer.fit(Classifier(), rows(24 * window))
    assert [each[:2] for each in seen] == [
        ("warmup starts", 0),
        ("warmup ends", 2),
        ("main starts", 2),
        ("main ends", 5),
        ("cool starts", 5),
        ("cool ends", 6),
    ]
    assert all(each[2] for each in seen)


def test_a_training_that_ends_early_has_not_ended_its_last_phase(plain_trainer):
    class Stopping(Phased):
        def on_train_batch_end(self, *_: Any) -> None:
            self.trainer.should_stop = self.global_step == 3

    model = Stopping()
    plain_trainer(callbacks=[aux.Phases(SPEC)]).fit(model, rows())
    phases = [each for each in model.events if each != "batch"]
    assert phases == [f"module: {each}" for each in ("warmup starts", "warmup ends", "main starts")]


def test_with_accumulation_borders_are_between_windows(plain_trainer):
    model = Phased()
    added = [aux.Phases("a: 1ep, b: 1 steps, c: rest"), Listening()]
    # 7 batches in windows of 3: three steps in an epoch, the last one of a single batch.
    plain_trainer(callbacks=added, max_epochs=2, accumulate_grad_batches=3).fit(model, rows(28))
    assert model.events == [
        *said("a starts"),
        *["batch"] * 7,
        *said("a ends", "b starts"),
        *["batch"] * 3,
        *said("b ends", "c starts"),
        *["batch"] * 4,
        *said("c ends"),
    ]


def test_epochs_of_different_length_have_their_own_steps(plain_trainer):
    model = Phased()
    scheduling = GradientAccumulationScheduler({0: 3, 1: 2})
    phases = aux.Phases("a: 1ep, b: 1ep, c: rest")
    plain_trainer(callbacks=[phases, scheduling], max_epochs=3).fit(model, rows())
    assert phases.began == {"a": 0, "b": 2, "c": 5}


def test_phases_that_are_shorter_than_training_end_before_it(plain_trainer):
    model = Phased()
    plain_trainer(callbacks=[aux.Phases("a: 2, b: 1"), Listening()]).fit(model, rows())
    phases = [each for each in model.events if each != "batch"]
    assert phases == said("a starts", "a ends", "b starts", "b ends")


@pytest.mark.parametrize("at", [1, 2, 4, 5])
@pytest.mark.parametrize("window", [1, 2])
def test_a_resumed_run_calls_nothing_twice_and_leaves_nothing_out(
    at, window, plain_trainer, tmp_path
):
    def train(*more: Any, **arguments: Any) -> list[str]:
        model = Phased()
        trainer = plain_trainer(
            callbacks=[aux.Phases(SPEC), Listening(), *more],
            accumulate_grad_batches=window,
            enable_checkpointing=bool(more),
        )
        trainer.fit(model, ResumableLoader(Rows(24 * window), batch_size=4), **arguments)
        return model.events

    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=at, save_top_k=-1)
    whole = train(saving)
    resumed = train(ckpt_path=tmp_path / f"step={at}.ckpt", weights_only=True)
    assert resumed.count("batch") == (6 - at) * window
    phases = [each for each in whole if each != "batch"]
    before = {1: 2, 2: 2, 4: 6, 5: 6}[at]  # a border's hooks are called by the batch after it
    assert phases == said(
        "warmup starts", "warmup ends", "main starts", "main ends", "cool starts", "cool ends"
    )
    assert [each for each in resumed if each != "batch"] == phases[before:]
    assert whole[-len(resumed) :] == resumed


def test_a_new_training_with_the_same_callback_begins_again(plain_trainer):
    phases = aux.Phases(SPEC)
    found = []
    for _ in range(2):
        model = Phased()
        plain_trainer(callbacks=[phases, Listening()]).fit(model, rows())
        found.append(model.events)
    assert found[0] == found[1]
    assert len(found[0]) == 6 + 12


def test_the_index_of_the_phase_is_logged(plain_trainer):
    class Noting(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            logged.append(float(trainer.callback_metrics["aux/phases/index"]))

    logged: list[float] = []
    added = [aux.Phases(SPEC), Noting()]
    plain_trainer(callbacks=added, log_every_n_steps=1).fit(Phased(), rows())
    assert logged == [0.0, 0.0, 1.0, 1.0, 1.0, 2.0]


def test_the_log_says_when_each_phase_begins(plain_trainer, caplog):
    plain_trainer(callbacks=[aux.Phases(SPEC)], max_epochs=2).fit(Phased(), rows())
    said = [each.message for each in caplog.records if "begins" in each.message]
    assert said == [
        f"lightning_aux: phase {name!r} begins after {steps} optimizer steps, in epoch {epoch}"
        for name, steps, epoch in (("warmup", 0, 0), ("main", 2, 0), ("cool", 8, 1))
    ]


def test_without_hooks_training_is_bit_identical_to_none(plain_trainer):
    results, streams = [], []
    for callbacks in ([], [aux.Phases(SPEC)]):
        torch.manual_seed(3)
        model = Classifier(dropout=0.3)
        plain_trainer(callbacks=callbacks).fit(model, rows(shuffle=True))
        results.append(weights(model))
        streams.append(torch.get_rng_state())
    assert equal(*results)
    assert torch.equal(*streams)


# ------------------------------------------------------------------------- what refers to a phase
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("written", "by_hand"),
    [
        ("during(0.5, main)", [0, 0, 0.5, 0.5, 0.5, 0]),
        ("linear(0, 1, until=warmup.end)", [0, 0.5, 1, 1, 1, 1]),
        ("sum(during(1, warmup), during(0.5, cool))", [1, 1, 0, 0, 0, 0.5]),
        ("step(3, 4, at=cool.start)", [3, 3, 3, 3, 3, 4]),
    ],
)
def test_a_weight_follows_the_phases_wherever_they_stand_in_the_list(
    written, by_hand, order, plain_trainer
):
    shrink = Shrink(written)
    probe = Probe(lambda step: shrink.weight_at(step.progress.steps))
    probe.needs = ()
    plain_trainer(callbacks=[shrink, probe, aux.Phases(SPEC)][::order]).fit(Classifier(), rows())
    assert probe.seen == by_hand


def test_a_term_during_a_phase_trains_as_the_term_switched_by_hand(plain_trainer):
    class ByHand(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss + 0.5 * self(batch[0]).square().mean() * (2 <= batch_idx < 5)

    results = []
    for cls, callbacks in ((ByHand, []), (Classifier, [Shrink("during(0.5, main)")])):
        torch.manual_seed(3)
        model = cls()
        plain_trainer(callbacks=[*callbacks, aux.Phases(SPEC)]).fit(model, rows())
        results.append(weights(model))
    assert largest_difference(*results) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "by_hand"),
    [
        ({"p": 0.5, "until": "warmup.end"}, [0.5] * 2 + [0.0] * 4),
        ({"p": 0.5, "mode": "late", "start": "cool.start"}, [0.0] * 5 + [0.5]),
        (
            {"p": 0.5, "mode": "standard", "start": "main.start", "until": "main.end"},
            [0.0] * 2 + [0.5] * 3 + [0.0],
        ),
        ({"p": "during(0.5, main)"}, [0.0] * 2 + [0.5] * 3 + [0.0]),
    ],
)
def test_dropout_takes_borders_for_times(arguments, by_hand, plain_trainer):
    class Noting(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            rates.append(self.encoder[2].p)
            return super().training_step(batch, batch_idx)

    rates: list[float] = []
    schedule = aux.DropoutSchedule(**arguments)
    plain_trainer(callbacks=[schedule, aux.Phases(SPEC)]).fit(Noting(), rows())
    assert rates == by_hand


class Path(L.Callback):
    """The weights of the student after every step, the first ones included."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, trainer: Any, model: Any) -> None:
        self.weights.append(weights(model))

    def on_train_batch_end(self, trainer: Any, model: Any, *args: Any) -> None:
        self.weights.append(weights(model))


@pytest.mark.parametrize(("start", "first"), [("main.start", 2), ("warmup.start", 0)])
def test_a_teacher_begins_with_the_student_at_the_border(start, first, plain_trainer):
    path, teacher = Path(), aux.EMATeacher(decay=0.5, start=start)
    plain_trainer(callbacks=[path, teacher, aux.Phases(SPEC)]).fit(Classifier(), rows())
    average = path.weights[first]
    for after in path.weights[first + 1 :]:
        average = {name: 0.5 * average[name] + 0.5 * after[name] for name in average}
    assert len(path.weights) == 7
    assert largest_difference(teacher.store.state_dict(), average) < 1e-6


# ------------------------------------------------------------------------------------- refusals
class Never(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("trained")


@pytest.mark.parametrize(
    ("added", "name"),
    [
        (Shrink("during(1, mian)"), "shrink"),
        (aux.DropoutSchedule(0.1, until="mian.end"), "dropout_schedule"),
        (aux.EMATeacher(start="mian.start"), "ema"),
        (aux.AttributeSchedule({"optimizer.lr": "linear(0, 1, until=mian.end)"}), "attribute_sch"),
    ],
)
@pytest.mark.parametrize("phases", [True, False])
def test_a_phase_that_there_is_not_is_a_named_error_before_the_first_step(
    added, name, phases, plain_trainer
):
    message = r"'mian'\. Did you mean 'main'.*There are warmup, main, cool"
    if not phases:
        message = r"'mian'\. Name them: Phases\("
    with pytest.raises(AuxiliaryError, match=message) as raised:
        plain_trainer(callbacks=[added, *([aux.Phases(SPEC)] if phases else [])]).fit(
            Never(), rows()
        )
    assert str(raised.value).startswith(name)


@pytest.mark.parametrize(
    ("spec", "trainer", "message"),
    [
        ("a: 5, b: 5", {}, "phases 'a: 5 steps, b: 5 steps': the phases take 10 .* has 6"),
        ("a: 1%, b: rest", {}, "the phase 'a' has no optimizer step"),
        ("a: 10%, b: rest", {"max_epochs": -1}, "max_steps/max_epochs"),
    ],
)
def test_phases_without_room_are_refused_before_the_first_step(
    spec, trainer, message, plain_trainer
):
    with pytest.raises(AuxiliaryError, match=message):
        plain_trainer(callbacks=[aux.Phases(spec)], **trainer).fit(Never(), rows())


def test_a_division_that_is_none_is_refused_when_it_is_made():
    with pytest.raises(AuxiliaryError, match=r"^phases: the phases take 110%"):
        aux.Phases("a: 60%, b: 50%")


def test_training_has_one_division(plain_trainer):
    with pytest.raises(AuxiliaryError, match=r"two callbacks are called 'phases'.*Only one"):
        plain_trainer(callbacks=[aux.Phases(SPEC), aux.Phases(SPEC)]).fit(Never(), rows())
