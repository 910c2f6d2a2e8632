"""``AttributeSchedule``: the number of every step is the one by hand, and it is given back."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_aux as aux
from lightning_aux.engine import AuxiliaryError
from tests.contract.models import ResumableLoader
from tests.engine.small_models import (
    Classifier,
    Rows,
    equal,
    largest_difference,
    leaves,
    rows,
    weights,
)


class Scaled(nn.Module):
    """A layer with a number of its own."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("shift", torch.tensor(0.5))

    @property
    def twice(self) -> float:
        return 2 * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Model(Classifier):
    """Notes in every training step whatever ``look(self)`` returns, beside the steps taken."""

    def __init__(self, look: Any = lambda model: 0.0, groups: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Scaled(1.0 + place) for place in range(3))
        self.temperature = 3
        self.word = "no number"
        self.look = look
        self.groups = groups
        self.noted: list[tuple[int, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.noted.append((self.trainer.global_step, self.look(self)))
        x, y = batch
        logits = self(x)
        for block in self.blocks:
            logits = block(logits)
        return F.cross_entropy(logits / self.temperature, y)

    def configure_optimizers(self) -> Any:
        if not self.groups:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        groups = [
            {"params": self.encoder.parameters(), "lr": 0.05},
            {"params": self.classifier.parameters(), "lr": 0.02},
        ]
        return torch.optim.AdamW(groups, betas=(0.8, 0.9), weight_decay=0.1)


def group(model: L.LightningModule, place: int = 0, optimizer: int = 0) -> dict[str, Any]:
    return model.trainer.optimizers[optimizer].param_groups[place]


def cosine(start: float, end: float, total: int) -> np.ndarray:
    return end + (start - end) * (1 + np.cos(np.pi * np.arange(total) / total)) / 2


def line(start: float, end: float, total: int) -> np.ndarray:
    return start + (end - start) * np.arange(total) / total


def fit(plain_trainer: Any, model: Any, values: Any, data: Any = None, **trainer: Any) -> L.Trainer:
    added = [aux.AttributeSchedule(values), *trainer.pop("callbacks", [])]
    fitted = plain_trainer(callbacks=added, **trainer)
    fitted.fit(model, rows() if data is None else data)
    return fitted


# ------------------------------------------------------------------------------------- the places
# A path, how to look there, the user's own value, and whether the model has AdamW with two groups.
PLACES: dict[str, tuple[Any, Any, bool]] = {
    "optimizer.lr": (lambda model: group(model)["lr"], 0.05, False),
    "optimizer.momentum": (lambda model: group(model)["momentum"], 0.9, False),
    "optimizer[0].lr": (lambda model: group(model)["lr"], 0.05, False),
    "optimizer.weight_decay": (lambda model: group(model, 1)["weight_decay"], 0.1, True),
    "optimizer.betas[0]": (lambda model: group(model)["betas"][0], 0.8, True),
    "optimizer.betas[1]": (lambda model: group(model, 1)["betas"][1], 0.9, True),
    "optimizer.groups[1].lr": (lambda model: group(model, 1)["lr"], 0.02, True),
    "optimizer[0].groups[0].betas[1]": (lambda model: group(model)["betas"][1], 0.9, True),
    "model.temperature": (lambda model: model.temperature, 3, False),
    "model.blocks.1.scale": (lambda model: model.blocks[1].scale, 2.0, False),
    "model.blocks.*.scale": (lambda model: model.blocks[2].scale, 3.0, False),
    "model.blocks.0.shift": (lambda model: model.blocks[0].shift.item(), 0.5, False),
}
every_place = pytest.mark.parametrize("path", PLACES)


@every_place
def test_the_value_of_every_step_is_the_closed_form_and_the_users_own_is_given_back(
    path, plain_trainer
):
    look, own, groups = PLACES[path]
    model = Model(look, groups)
    # 7 batches in windows of 3: the third window of an epoch has one batch.
    trainer = fit(
        plain_trainer,
        model,
        {path: "cosine(0.7, 0.2)"},
        rows(28),
        max_epochs=2,
        accumulate_grad_batches=3,
    )
    assert trainer.global_step == 6
    by_hand = cosine(0.7, 0.2, 6)
    steps = [0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 4, 4, 4, 5]
    assert [step for step, _ in model.noted] == steps
    seen = [value for _, value in model.noted]
    # A buffer is float32.
    np.testing.assert_allclose(seen, by_hand[steps], rtol=1e-6 if "shift" in path else 1e-14)
    model.trainer = trainer
    assert look(model) == own
    assert type(look(model)) is type(own)


def test_other_groups_other_entries_and_other_modules_are_left_alone(plain_trainer):
    def look(model: Model) -> Any:
        scales = [block.scale for block in model.blocks]
        return scales, group(model)["lr"], group(model)["betas"], group(model, 1)["betas"]

    model = Model(look, groups=True)
    values = {
        "optimizer.groups[1].lr": 0.5,
        "optimizer.groups[1].betas[0]": 0.6,
        "model.blocks.[02].scale": 0.1,
    }
    fit(plain_trainer, model, values)
    assert {str(seen) for _, seen in model.noted} == {
        "([0.1, 2.0, 0.1], 0.05, (0.8, 0.9), (0.6, 0.9))"
    }
    assert [block.scale for block in model.blocks] == [1.0, 2.0, 3.0]


def test_a_buffer_is_filled_in_place_before_during_and_after(plain_trainer):
    model = Model(lambda model: (id(model.blocks[0].shift), model.blocks[0].shift.data_ptr()))
    before = model.look(model)
    fit(plain_trainer, model, {"model.blocks.0.shift": "linear(0, 1)"})
    assert [seen for _, seen in model.noted] == [before] * 6
    assert model.look(model) == before


def test_a_rate_that_is_a_tensor_in_the_optimizer_is_filled_in_place(plain_trainer):
    class Capturable(Model):
        def configure_optimizers(self) -> Any:
            self.rate = torch.tensor(0.05)
            return torch.optim.Adam(self.parameters(), lr=self.rate, foreach=False)

    model = Capturable(lambda model: (group(model)["lr"] is model.rate, model.rate.item()))
    fit(plain_trainer, model, {"optimizer.lr": "linear(0.5, 0)"})
    np.testing.assert_allclose([seen[1] for _, seen in model.noted], line(0.5, 0, 6), rtol=1e-6)
    assert all(same for _, (same, _) in model.noted)
    assert model.rate.item() == pytest.approx(0.05)


@pytest.mark.parametrize(
    "path", ["callback:SelfDistillation.temperature", "callback:mine.temperature"]
)
def test_a_number_of_a_callback_of_ours_changes_its_term(path, plain_trainer):
    """A wrong teacher's KL at a temperature T per step, with the factor T²."""
    terms: list[tuple[float, float]] = []

    class Compared(aux.SelfDistillation):
        def loss(self, step: aux.Step) -> Tensor:
            term = super().loss(step)
            temperature = 1 + step.progress.steps
            log_student = (step.logits.double() / temperature).log_softmax(1)
            teacher = (step.teacher("frozen").logits.double() / temperature).softmax(1)
            by_hand = (teacher * (teacher.log() - log_student)).sum(1).mean() * temperature**2
            terms.append((term.item(), by_hand.item()))
            return term

    Compared.__name__ = "SelfDistillation"
    distillation = Compared(teacher="frozen", name="mine")
    callbacks = [distillation, aux.FrozenTeacher("frozen")]
    model = Classifier()
    fit(plain_trainer, model, {path: "linear(1, 7)"}, callbacks=callbacks)
    assert len(terms) == 6
    ours, by_hand = np.array(terms).T
    np.testing.assert_allclose(ours, by_hand, rtol=1e-3, atol=1e-6)
    assert by_hand[1:].min() > 1e-6
    assert distillation.temperature == 1.0


class Users(L.Callback):
    """The user's own, which knows nothing of us."""

    def __init__(self) -> None:
        self.strength = 7.0
        self.noted: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.noted.append(self.strength)


class Data(L.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.mixup = 0.4
        self.augment = Scaled(2.0)

    def train_dataloader(self) -> Any:
        return rows()


def test_a_users_callback_and_the_datamodule_are_driven_and_given_back(plain_trainer):
    users, data = Users(), Data()
    model = Model(lambda model: (data.mixup, data.augment.scale))
    values = {
        "callback:Users.strength": "linear(0, 6)",
        "datamodule.mixup": "linear(6, 0)",
        "datamodule.augment.scale": 5,
    }
    plain_trainer(callbacks=[users, aux.AttributeSchedule(values)]).fit(model, datamodule=data)
    assert users.noted == pytest.approx(range(6))
    assert [seen for _, seen in model.noted] == [(6.0 - step, 5.0) for step in range(6)]
    assert (users.strength, data.mixup, data.augment.scale) == (7.0, 0.4, 2.0)


class TwoOptimizers(Classifier):
    """Manual optimisation: the second optimizer steps with every third batch only."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.noted: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.noted.append([group(self, optimizer=place)["lr"] for place in (0, 1)])
        first, second = self.optimizers()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss)
        first.step()
        if batch_idx % 3 == 2:
            second.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.encoder.parameters(), lr=0.05),
            torch.optim.SGD(self.classifier.parameters(), lr=0.02),
        ]


def test_of_two_optimizers_the_named_one_is_driven_by_the_steps_of_the_counted_one(plain_trainer):
    model = TwoOptimizers()
    added = [
        aux.AttributeSchedule({"optimizer[1].lr": "linear(1, 7)"}),
        aux.AttributeSchedule({"optimizer.lr": "linear(0, 60)"}, name="other"),
    ]
    plain_trainer(callbacks=added).fit(model, rows())
    assert model.noted == [[10.0 * step, 1.0 + step] for step in range(6)]
    assert [group(model, optimizer=place)["lr"] for place in (0, 1)] == [0.05, 0.02]
    # Counted by the second, whose number it then is without being said.
    model = TwoOptimizers()
    added = [aux.AttributeSchedule({"optimizer.lr": "linear(1, 7)"}, optimizer=1)]
    plain_trainer(callbacks=added).fit(model, rows())
    assert model.noted == [[0.05, 1.0]] * 3 + [[0.05, 2.0]] * 3


# ------------------------------------------------------------------------------ what it trains to
def by_hand(
    rates: np.ndarray, epochs: int = 1, window: int = 1, size: int = 24
) -> dict[str, Tensor]:
    """The same training as a loop in plain torch."""
    model = seeded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    step = 0
    for _ in range(epochs):
        batches = list(rows(size))
        for place, (x, y) in enumerate(batches):
            (F.cross_entropy(model(x), y) / window).backward()
            if (place + 1) % window == 0 or place + 1 == len(batches):
                optimizer.param_groups[0]["lr"] = float(rates[step])
                optimizer.step()
                optimizer.zero_grad()
                step += 1
    assert step == len(rates)
    return weights(model)


def seeded() -> Classifier:
    torch.manual_seed(4)
    return Classifier()


@pytest.mark.parametrize("window", [1, 3])
def test_training_with_a_driven_rate_is_the_loop_in_plain_torch(window, plain_trainer):
    model = seeded()
    fit(
        plain_trainer,
        model,
        {"optimizer.lr": "cosine(0.2, 0.01)"},
        rows(28),
        max_epochs=2,
        accumulate_grad_batches=window,
    )
    total = 2 * math.ceil(7 / window)
    expected = by_hand(cosine(0.2, 0.01, total), 2, window, 28)
    assert largest_difference(weights(model), expected) < 1e-7
    constant = by_hand(np.full(total, 0.05), 2, window, 28)
    assert largest_difference(constant, expected) > 1e-2


def test_training_with_a_driven_rate_is_that_with_a_lambda_lr(plain_trainer):
    class Scheduled(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 2 * (1 - k / 12))
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    torch.manual_seed(4)
    theirs = Scheduled()
    plain_trainer(max_epochs=2).fit(theirs, rows())
    ours = seeded()
    fit(plain_trainer, ours, {"optimizer.lr": "linear(0.1, 0)"}, max_epochs=2)
    assert largest_difference(weights(ours), weights(theirs)) < 1e-7


def test_each_value_is_logged_under_its_path(plain_trainer):
    class Noting(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            logged.append({key: float(each) for key, each in trainer.callback_metrics.items()})

    logged: list[dict[str, float]] = []
    values = {"optimizer.lr": "linear(0, 6)", "model.blocks.*.scale": "linear(6, 0)"}
    fit(plain_trainer, Model(), values, callbacks=[Noting()], log_every_n_steps=1)
    for step, seen in enumerate(logged):
        assert seen["aux/attribute_schedule/optimizer.lr"] == step
        assert seen["aux/attribute_schedule/model.blocks.*.scale"] == 6 - step


# ------------------------------------------------------------------------------------- given back
class Stop(L.Callback):
    def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            raise RuntimeError("stopped")


@every_place
def test_the_users_own_is_given_back_after_an_exception(path, plain_trainer):
    look, own, groups = PLACES[path]
    model = Model(look, groups)
    with pytest.raises(RuntimeError, match="stopped"):
        fit(plain_trainer, model, {path: 0.25}, callbacks=[Stop()])
    assert [seen for _, seen in model.noted] == [0.25] * 3
    assert look(model) == own


MANY = {
    "optimizer.lr": "cosine(0.2, 0.01)",
    "optimizer.momentum": "linear(0.5, 0.95)",
    "model.temperature": "linear(1, 4)",
    "model.blocks.0.shift": "linear(0, 1)",
    "model.blocks.*.scale": "step(1, 0.9, at=7)",
}


def many(model: Model) -> Any:
    scales = [block.scale for block in model.blocks]
    shift = model.blocks[0].shift.item()
    return group(model)["lr"], group(model)["momentum"], model.temperature, shift, scales


@pytest.mark.parametrize("window", [1, 3])
def test_a_run_resumed_within_an_epoch_is_bit_identical_and_knows_what_the_users_own_was(
    window, plain_trainer, tmp_path
):
    def train(values: dict[str, str], *more: Any, **arguments: Any) -> tuple[Model, L.Trainer]:
        torch.manual_seed(4)
        model = Model(many)
        trainer = plain_trainer(
            callbacks=[aux.AttributeSchedule(values), *more],
            max_epochs=3,
            accumulate_grad_batches=window,
            enable_checkpointing=bool(more),
        )
        trainer.fit(model, ResumableLoader(Rows(32), batch_size=4), **arguments)
        return model, trainer

    at = 3 if window == 1 else 4  # in the first epoch; in the second, of three steps each
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=at, save_top_k=-1)
    whole, _ = train(MANY, saving)
    assert saving.best_model_path
    path = tmp_path / f"step={at}.ckpt"
    # In another order: numbers are known by their paths.
    turned = dict(reversed(MANY.items()))
    resumed, trainer = train(turned, ckpt_path=path, weights_only=True)
    assert equal(weights(resumed), weights(whole))
    assert resumed.noted == whole.noted[-len(resumed.noted) :]
    assert 0 < len(resumed.noted) < len(whole.noted)
    assert all(
        torch.equal(one, other)
        for one, other in zip(
            leaves(trainer.optimizers[0].state_dict()["state"]),
            leaves(whole.trainer.optimizers[0].state_dict()["state"]),
            strict=True,
        )
    )
    for model in (whole, resumed):
        assert many(model) == (0.05, 0.9, 3, 0.5, [1.0, 2.0, 3.0])


def test_a_number_that_the_user_changed_before_resuming_is_the_one_given_back(
    plain_trainer, tmp_path
):
    values = {"model.temperature": "linear(1, 4)"}
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    fit(plain_trainer, Model(), values, callbacks=[saving], enable_checkpointing=True)
    model = Model()
    model.temperature = 8
    trainer = plain_trainer(callbacks=[aux.AttributeSchedule(values)])
    trainer.fit(model, rows(), ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
    assert model.temperature == 8


def test_a_second_fit_drives_again_and_gives_back_again(plain_trainer):
    model = Model(lambda model: model.temperature)
    trainer = plain_trainer(
        callbacks=[aux.AttributeSchedule({"model.temperature": "linear(6, 0)"})]
    )
    trainer.fit(model, rows())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, rows())
    first = [6.0 - step for step in range(6)]
    second = [6 - 6 * step / 12 for step in range(6, 12)]
    assert [seen for _, seen in model.noted] == pytest.approx(first + second)
    assert model.temperature == 3


def test_validation_within_training_sees_the_value_of_its_step_and_later_ones_the_users(
    plain_trainer,
):
    class Validated(Model):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(self.temperature)

    seen: list[float] = []
    model = Validated()
    trainer = plain_trainer(
        callbacks=[aux.AttributeSchedule({"model.temperature": "linear(6, 0)"})],
        num_sanity_val_steps=0,
    )
    trainer.fit(model, rows(), rows(4))
    trainer.validate(model, rows(4), verbose=False)
    assert seen == [1.0, 3]  # after the step whose value was 1


# ------------------------------------------------------------------------------------- refusals
class Never(Model):
    def __init__(self, scheduler: Any = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.scheduler = scheduler
        self.weightless = nn.Parameter(torch.ones(()))

    @property
    def fixed(self) -> float:
        return 0.5

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("trained")

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return optimizer if self.scheduler is None else [[optimizer], [self.scheduler(optimizer)]]


WRONG: list[tuple[str, str]] = [
    ("optimiser.lr", r"begins with 'optimiser'; a path begins with optimizer, model, callback"),
    ("optimizer.lrr", r"SGD has no 'lrr'\. Near matches: 'lr'"),
    ("optimizer", r"cannot be read\. Write 'optimizer\.lr'"),
    ("optimizer.lr.x", r"cannot be read"),
    ("optimizer[1].lr", r"configure_optimizers returned 1, counted from 0"),
    ("optimizer.groups[2].lr", r"there are 1 parameter groups, counted from 0"),
    ("optimizer.lr[0]", r"'lr' is 0\.05, which has no entry 0"),
    ("optimizer.nesterov", r"optimizer\.nesterov is a bool, and a schedule takes the place"),
    ("optimizer.params", r"SGD has no 'params'"),
    ("model.block.0.scale", r"no module has the path 'block\.0'\. Near matches: .*'blocks\.0'"),
    ("model.blocks.0.sclae", r"Scaled has no attribute 'sclae'\. Near matches: 'scale'"),
    ("model.blocks.*.sclae", r"Scaled has no attribute 'sclae'\. Near matches: 'scale'"),
    ("model.temprature", r"Never has no attribute 'temprature'\. Near matches: 'temperature'"),
    ("model", r"Never has no attribute ''"),
    ("model.word", r"model\.word is a str, and a schedule takes the place of a number"),
    ("model.groups", r"model\.groups is a bool"),
    ("model.encoder", r"model\.encoder is a Layers"),
    ("model.weightless", r"model\.weightless is a tensor of shape"),
    ("model.encoder.0.weight", r"model\.encoder\.0\.weight is a tensor of shape \(8, 4\)"),
    ("model.fixed", r"model\.fixed cannot be set"),
    ("model.blocks.0.twice", r"model\.blocks\.0\.twice cannot be set"),
    ("callback:User.strength", r"no callback is called 'User'\. Near matches: 'Users'"),
    ("callback:Users.strenght", r"Users has no attribute 'strenght'\. Near matches: 'strength'"),
    ("callback:Users", r"names no attribute"),
    ("callback:Users.noted", r"callback:Users\.noted is a list"),
    ("callback:EMATeacher.decay", r"callback:EMATeacher\.decay is a Constant"),
    ("callback:FrozenTeacher.optimizer", r"there are 2 of FrozenTeacher\. Say which by its name"),
    ("datamodule.mixup", r"Trainer\.fit was given no datamodule"),
]


@pytest.mark.parametrize(("path", "message"), WRONG)
def test_a_path_that_leads_to_no_number_is_refused_before_the_first_step(
    path, message, plain_trainer
):
    teachers = [aux.EMATeacher(), aux.FrozenTeacher("one"), aux.FrozenTeacher("two")]
    model = Never()
    with pytest.raises(AuxiliaryError, match=message) as raised:
        fit(plain_trainer, model, {path: 0.1}, callbacks=[Users(), *teachers])
    assert str(raised.value).startswith("attribute_schedule: ")


def test_an_attribute_that_the_datamodule_has_not_lists_near_ones(plain_trainer):
    trainer = plain_trainer(callbacks=[aux.AttributeSchedule({"datamodule.mixpu": 0.1})])
    with pytest.raises(AuxiliaryError, match=r"Data has no attribute 'mixpu'.*Near.*'mixup'"):
        trainer.fit(Never(), datamodule=Data())


def one_cycle(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)


def step_lr(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2)


@pytest.mark.parametrize(
    ("path", "scheduler", "groups"),
    [
        ("optimizer.lr", step_lr, False),
        ("optimizer.groups[1].lr", step_lr, True),
        ("optimizer.lr", torch.optim.lr_scheduler.ReduceLROnPlateau, False),
        ("optimizer.momentum", one_cycle, False),
        ("optimizer.betas[0]", one_cycle, True),
    ],
)
def test_what_a_learning_rate_scheduler_sets_is_refused(path, scheduler, groups, plain_trainer):
    class Monitored(Never):
        def configure_optimizers(self) -> Any:
            optimizer = Model.configure_optimizers(self)
            config = {"scheduler": scheduler(optimizer), "monitor": "loss"}
            return {"optimizer": optimizer, "lr_scheduler": config}

    with pytest.raises(AuxiliaryError, match=r"is set by the \w+ that configure_optimizers"):
        fit(plain_trainer, Monitored(groups=groups), {path: 0.1})


def test_what_the_scheduler_does_not_set_is_driven_beside_it(plain_trainer):
    class Scheduled(Model):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    model = Scheduled(lambda model: (group(model)["lr"], group(model)["momentum"]))
    fit(plain_trainer, model, {"optimizer.momentum": "linear(0, 0.6)"})
    expected = [(0.05 / (1 + step), 0.1 * step) for step in range(6)]
    np.testing.assert_allclose([seen for _, seen in model.noted], expected, rtol=1e-12)


TWICE: list[tuple[dict[str, Any], list[Any]]] = [
    ({"optimizer.lr": 1}, [aux.AttributeSchedule({"optimizer.groups[0].lr": 2}, name="other")]),
    ({"optimizer.lr": 1, "optimizer[0].lr": 2}, []),
    ({"model.blocks.0.scale": 1, "model.blocks.*.scale": 2}, []),
    ({"model.encoder.2.p": 0.1}, [aux.DropoutSchedule(0.1, until=2)]),
]


@pytest.mark.parametrize(("values", "others"), TWICE)
def test_a_number_has_one_schedule(values, others, plain_trainer):
    with pytest.raises(AuxiliaryError, match=r"is driven by \w+ already"):
        fit(plain_trainer, Never(), values, callbacks=others)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "no path is named"),
        ({"optimizer.lr": "cosin(1, 0)"}, r"(?s)attribute_schedule: optimizer\.lr: .*cosine"),
        ({"optimizer.lr": "linear(0, 1, until=2.5)"}, r"(?s)optimizer\.lr: .*no unit of time"),
    ],
)
def test_schedules_that_cannot_be_read_are_refused_when_it_is_made(values, message):
    with pytest.raises(AuxiliaryError, match=message):
        aux.AttributeSchedule(values)


def test_a_time_that_this_training_has_not_is_refused_and_the_numbers_are_the_users(plain_trainer):
    model = Never()
    with pytest.raises(AuxiliaryError, match=r"attribute_schedule: .*max_steps/max_epochs"):
        fit(plain_trainer, model, {"model.temperature": "linear(0, 1)"}, max_epochs=-1)
    assert model.temperature == 3


def test_a_generation_that_begins_again_goes_on_with_the_number_of_now(plain_trainer):
    """The optimizer gets its first settings back, and the schedule counts on."""
    rates: list[float] = []

    class Noting(Classifier):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    added = [
        aux.SnapshotTeacher("zz", every=2, restart=True),
        aux.AttributeSchedule({"optimizer.lr": "step(0.3, 0.2, at=3)"}),
    ]
    plain_trainer(callbacks=added).fit(Noting(), rows())
    assert rates == [0.3] * 3 + [0.2] * 3
