"""``FrozenTeacher(module=...)``: another architecture, which training leaves as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import SumMetric

import lightning_aux as aux
from lightning_aux.cli import main
from lightning_aux.teachers.frozen import fingerprint_of
from tests.engine.small_models import (
    CLASSES,
    WIDTH,
    Blind,
    Classifier,
    equal,
    largest_difference,
    rows,
    weights,
)


class Wide(nn.Module):
    """A teacher of three layers, with a BatchNorm and a dropout, that says what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(16, CLASSES)
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Any:
        self.calls.append((self.training, torch.is_grad_enabled()))
        return {"logits": self.out(self.drop(self.body(x)))}


class Restless(Wide):
    """Changes whatever a forward can change, also in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.seen = SumMetric()

    def forward(self, x: Tensor) -> Any:
        self.count += 1
        self.seen.update(x.mean())
        return super().forward(x + 0.1 * torch.randn_like(x))


def wide(kind: type[Wide] = Wide) -> Wide:
    torch.manual_seed(5)
    module = kind()
    module(torch.randn(64, WIDTH))  # its running statistics are not those of a new one
    module.calls.clear()
    return module


def distilled(plain_trainer: Any, teacher: aux.FrozenTeacher, **trainer: Any) -> Classifier:
    torch.manual_seed(1)
    student = Classifier()
    term = aux.SelfDistillation(teacher.name, temperature=2.0, weight=0.5)
    added = [teacher, term, *trainer.pop("callbacks", ())]
    plain_trainer(callbacks=added, **({"max_epochs": 2} | trainer)).fit(student, rows())
    return student


def by_hand(teacher: nn.Module, epochs: int = 2) -> Classifier:
    """The same training in a plain loop: cross-entropy and ½·T²·KL."""
    torch.manual_seed(1)
    student, teacher = Classifier(), copy.deepcopy(teacher).eval()
    optimizer = student.configure_optimizers()
    for x, y in [batch for _ in range(epochs) for batch in rows()]:
        logits = student(x)
        with torch.no_grad():
            p = (teacher(x)["logits"] / 2).softmax(-1)
        kl = (p * (p.log() - (logits / 2).log_softmax(-1))).sum(-1).mean()
        optimizer.zero_grad()
        (F.cross_entropy(logits, y) + 0.5 * 4 * kl).backward()
        optimizer.step()
    return student


def test_the_student_learns_as_in_a_loop_by_hand(plain_trainer):
    module = wide()
    attached = distilled(plain_trainer, aux.FrozenTeacher(module=module))
    assert largest_difference(weights(attached), weights(by_hand(module))) < 1e-6
    torch.manual_seed(1)
    plain = Classifier()
    plain_trainer(max_epochs=2).fit(plain, rows())
    assert largest_difference(weights(attached), weights(plain)) > 1e-3


def test_it_runs_once_per_step_in_evaluation_mode_without_gradient(plain_trainer):
    module = wide()
    added = [
        aux.FrozenTeacher(module=module),
        aux.SelfDistillation("frozen", name="a"),
        aux.SelfDistillation("frozen", name="b", divergence="js"),
    ]
    plain_trainer(callbacks=added).fit(Classifier(), rows())
    assert module.calls == [(False, False)] * 6


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_it_is_left_and_nothing_in_it_has_changed(training, plain_trainer):
    """Modes, buffers, metrics, hooks; the student's keys, optimizer and random numbers."""

    def run(added: list[Any]) -> tuple[dict[str, Tensor], Tensor, int, list[str]]:
        torch.manual_seed(1)
        student = Classifier(dropout=0.3)
        trainer = plain_trainer(max_epochs=2, callbacks=added)
        trainer.fit(student, rows(shuffle=True))
        held = sum(
            len(group["params"]) for each in trainer.optimizers for group in each.param_groups
        )
        return weights(student), torch.get_rng_state(), held, list(student.state_dict())

    module = wide(Restless).train(training)
    before, metric = weights(module), module.seen.compute()
    probe = Blind(lambda step: step.teacher("frozen").features("body"))
    probe.check = lambda engine: probe.learn_from("frozen", engine, reads=("body",))
    attached, plain = run([aux.FrozenTeacher(module=module), probe]), run([])
    assert len(module.calls) == len(probe.seen) == 12
    assert equal(attached[0], plain[0])
    assert torch.equal(attached[1], plain[1])
    assert attached[2:] == plain[2:]
    assert equal(weights(module), before)
    assert module.seen.compute() == metric
    assert all(each.training is training for each in module.modules())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())
    assert all(p.grad is None and p.requires_grad for p in module.parameters())


def test_features_are_read_at_the_teachers_own_paths(plain_trainer):
    module = wide()
    reference = copy.deepcopy(module).eval()

    class Same(aux.Objective):
        def check(self, engine: Any) -> None:
            super().check(engine)
            self.learn_from("frozen", engine, reads=("body", "body.*"))

        def loss(self, step: aux.Step) -> Tensor:
            taught, x = step.teacher("frozen"), step.batch[0]
            with torch.no_grad():
                expected = reference.body(x)
                assert torch.equal(taught.logits, reference.out(expected))
            assert torch.equal(taught.features("body"), expected)
            assert list(taught.features("body.*")) == ["body.0", "body.1", "body.2"]
            assert torch.equal(taught.input("body"), x)
            assert torch.equal(taught.input(), x)
            assert torch.equal(taught.target, step.batch[1])
            return step.loss * 0

    added = [aux.FrozenTeacher(module=module), Same()]
    plain_trainer(callbacks=added).fit(Classifier(), rows())


@pytest.mark.parametrize(
    ("reads", "message"),
    [
        (("bdy",), "same, teacher 'frozen': no module of Wide has the path 'bdy'.*'body'"),
        (("encoder",), "no module of Wide has the path 'encoder'"),
        ((), "'body' exists but was not declared.*learn_from"),
    ],
)
def test_a_path_that_the_teacher_has_not_is_an_error(reads, message, plain_trainer):
    class Same(aux.Objective):
        def check(self, engine: Any) -> None:
            super().check(engine)
            self.learn_from("frozen", engine, reads=reads)

        def loss(self, step: aux.Step) -> Tensor:
            assert not reads, "trained"
            return step.teacher("frozen").features("body").mean()

    added = [aux.FrozenTeacher(module=wide()), Same()]
    with pytest.raises(aux.AuxiliaryError, match=message):
        plain_trainer(callbacks=added).fit(Classifier(), rows())


def test_an_objective_on_features_wants_a_path_that_both_have(plain_trainer):
    added = [
        aux.FrozenTeacher(module=wide()),
        aux.SelfDistillation("frozen", on="encoder", divergence="mse"),
    ]
    message = "self_distillation, teacher 'frozen': no module of Wide has the path 'encoder'"
    with pytest.raises(aux.AuxiliaryError, match=message):
        plain_trainer(callbacks=added).fit(Classifier(), rows())


def test_taps_speak_of_the_student_alone(plain_trainer):
    module = wide()
    probe = Blind(lambda step: (step.teacher("frozen").logits, step.batch[0]))
    added = [
        aux.FrozenTeacher(module=module),
        aux.Taps(logits="classifier", input="encoder"),
        probe,
    ]
    plain_trainer(callbacks=added).fit(Classifier(), rows())
    module.eval()
    assert all(torch.equal(taught, module(x)["logits"]) for taught, x in probe.seen)


def test_forward_says_how_it_takes_the_batch(plain_trainer):
    def run(module: nn.Module, batch: Any) -> Tensor:
        return module(2 * batch[0])["logits"][:, :2]

    module = wide()
    probe = Blind(lambda step: (step.teacher("frozen").logits, step.batch[0]))
    plain_trainer(callbacks=[aux.FrozenTeacher(module=module, forward=run), probe]).fit(
        Classifier(), rows()
    )
    module.eval()
    assert all(torch.equal(taught, module(2 * x)["logits"][:, :2]) for taught, x in probe.seen)


class Nameless(Wide):
    def forward(self, x: Tensor) -> Any:
        return {"scores": super().forward(x)["logits"]}


class Unfinished(L.LightningModule):
    """Its forward is that of LightningModule, which is none."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda student: aux.FrozenTeacher(module=Nameless()),
            r"no logits in what Nameless\.forward.*'scores'.*FrozenTeacher\(forward=",
        ),
        (
            lambda student: aux.FrozenTeacher(module=student.encoder),
            "'0.weight' of the teacher is a parameter of the student",
        ),
        (lambda student: aux.FrozenTeacher(module=Unfinished()), "Unfinished defines no forward"),
        (lambda student: aux.FrozenTeacher(forward=max), "forward= says how another module runs"),
    ],
)
def test_what_cannot_teach_is_a_named_error(make, message, plain_trainer):
    student = Classifier()
    with pytest.raises(aux.AuxiliaryError, match=message):
        plain_trainer(callbacks=[make(student), aux.SelfDistillation("frozen")]).fit(
            student, rows()
        )


def test_its_weights_are_no_place_to_be_near_to(plain_trainer):
    added = [aux.FrozenTeacher(module=wide()), aux.EMAAnchor("weight", teacher="frozen")]
    with pytest.raises(aux.AuxiliaryError, match="is another model, or its logits"):
        plain_trainer(callbacks=added).fit(Classifier(), rows())


# -------------------------------------------------------------------------- files and resumed runs
def file_of(module: nn.Module, path: Path, form: str) -> Path:
    state = module.state_dict()
    if form == "of a whole":
        state = {f"model.net.{name}": value for name, value in state.items()}
        state["model.loss.weight"], form = torch.ones(2), "lightning"
    torch.save({"state_dict": state, "epoch": 3} if form == "lightning" else state, path)
    return path


@pytest.mark.parametrize("form", ["lightning", "state_dict", "of a whole"])
def test_a_file_gives_it_its_weights(form, plain_trainer, tmp_path):
    trained, path = wide(), tmp_path / "wide.ckpt"
    file_of(trained, path, form)
    torch.manual_seed(6)
    attached = distilled(plain_trainer, aux.FrozenTeacher(checkpoint=path, module=Wide()))
    assert largest_difference(weights(attached), weights(by_hand(trained))) < 1e-6


def test_a_file_of_another_module_is_refused_before_training(plain_trainer, tmp_path):
    path = file_of(Classifier(), tmp_path / "student.ckpt", "lightning")
    teacher, student = aux.FrozenTeacher(checkpoint=path, module=Wide()), Classifier()
    before = weights(student)
    message = (
        r"does not hold the weights of the Wide.* lacks 'body\.0\.weight', .*; it has, beyond it, "
        r"'encoder\.0\.weight', .* and more"
    )
    with pytest.raises(aux.AuxiliaryError, match=message):
        plain_trainer(callbacks=[teacher]).fit(student, rows())
    assert equal(weights(student), before)


def test_checkpoints_hold_nothing_of_it_and_a_resumed_run_uses_the_module_again(
    plain_trainer, tmp_path
):
    module = wide()
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_weights_only=False)
    through = distilled(
        plain_trainer,
        aux.FrozenTeacher(module=module),
        callbacks=[saving],
        enable_checkpointing=True,
    )
    path = tmp_path / "epoch=0.ckpt"
    saved = torch.load(path, weights_only=True)
    noted = saved["lightning_aux"]["members"]["frozen"]
    assert noted == {"module": "Wide", "fingerprint": fingerprint_of(module)}
    assert saved["state_dict"].keys() == Classifier().state_dict().keys()
    student = Classifier()
    added = [
        aux.FrozenTeacher(module=module),
        aux.SelfDistillation("frozen", temperature=2.0, weight=0.5),
    ]
    plain_trainer(max_epochs=2, callbacks=added).fit(student, rows(), ckpt_path=path)
    assert equal(weights(student), weights(through))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("module", "plain", "had Wide as this teacher"),
        ("plain", "module", "had the student's own architecture as this teacher"),
        ("file", "module", r"stored no second copy. Give FrozenTeacher\(checkpoint="),
        ("module", "other weights", "has other weights than that of the run"),
        ("file", "other file", "is not the file that the run which is resumed"),
    ],
)
def test_a_run_resumed_with_another_teacher_is_refused(
    first, second, message, plain_trainer, tmp_path
):
    files = {
        name: file_of(wide() if name == "file" else Wide(), tmp_path / f"{name}.ckpt", "lightning")
        for name in ("file", "other file")
    }

    def make(kind: str) -> aux.FrozenTeacher:
        module = None if kind == "plain" else wide()
        if kind == "other weights":
            torch.nn.init.ones_(next(module.parameters()))
        return aux.FrozenTeacher(checkpoint=files.get(kind), module=module)

    trainer = plain_trainer(max_epochs=1, callbacks=[make(first)])
    trainer.fit(Classifier(), rows())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(aux.AuxiliaryError, match=message):
        plain_trainer(max_epochs=2, callbacks=[make(second)]).fit(
            Classifier(), rows(), ckpt_path=tmp_path / "run.ckpt"
        )


# -------------------------------------------------------------------------------------- everywhere
def test_a_float32_teacher_of_a_student_in_half_precision_computes_in_float32(plain_trainer):
    module = wide()
    probe = Blind(lambda step: (step.teacher("frozen").logits, step.batch[0]))
    added = [aux.FrozenTeacher(module=module), probe]
    plain_trainer(callbacks=added, precision="bf16-true").fit(Classifier(), rows())
    module.eval()
    assert {x.dtype for _, x in probe.seen} == {torch.bfloat16}
    assert all(torch.equal(taught, module(x.float())["logits"]) for taught, x in probe.seen)


def test_parameters_sharded_by_fsdp1_are_no_obstacle_where_none_are_exchanged(plain_trainer):
    """What FSDP1 marks its flat parameters with; it needs a GPU to run."""
    student = Classifier()
    student.classifier.weight._fsdp_flattened = True
    added = [aux.FrozenTeacher(module=wide()), aux.SelfDistillation("frozen")]
    trainer = plain_trainer(callbacks=added, max_steps=2)
    trainer.fit(student, rows())
    assert trainer.global_step == 2


class Data(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return rows()


def make_wide(seed: int = 5) -> nn.Module:
    """A function that a config can name in place of a class."""
    torch.manual_seed(seed)
    return Wide()


@pytest.mark.parametrize(
    "module",
    [
        {"class_path": "tests.teachers.test_another_module.Wide"},
        {"class_path": "tests.teachers.test_another_module.make_wide", "init_args": {"seed": 7}},
    ],
    ids=["class", "function"],
)
def test_a_recipe_names_the_module_its_arguments_and_its_file(module, tmp_path, monkeypatch):
    seen: list[Any] = []
    run: Callable[..., Any] = aux.FrozenTeacher.run

    def noted(self: aux.FrozenTeacher, step: aux.Step) -> Any:
        seen.append(weights(self.module))
        return run(self, step)

    monkeypatch.setattr(aux.FrozenTeacher, "run", noted)
    source = wide()
    path = file_of(source, tmp_path / "wide.ckpt", "lightning")
    config = {
        "model": {"class_path": "tests.engine.small_models.Classifier"},
        "data": {"class_path": "tests.teachers.test_another_module.Data"},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "default_root_dir": str(tmp_path),
            "callbacks": [
                {
                    "class_path": "FrozenTeacher",
                    "init_args": {"checkpoint": str(path), "module": module},
                },
                {"class_path": "SelfDistillation", "init_args": {"teacher": "frozen"}},
            ],
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "config.yaml")]) == 0
    (held,) = seen
    assert equal(held, weights(source))


class Regressor(Classifier):
    """Predicts a number; its error is the mean square."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, width), nn.Tanh())
        self.head = nn.Linear(width, 1)
        del self.classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)).squeeze(-1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.mse_loss(self(batch[0]), batch[1].float())


def test_a_regressor_learns_from_the_predictions_of_a_wider_one(plain_trainer):
    torch.manual_seed(5)
    teacher = Regressor(32)
    added = [
        aux.FrozenTeacher(module=teacher),
        aux.SelfDistillation("frozen", on="head", divergence="mse", weight=0.5),
    ]
    torch.manual_seed(1)
    attached = Regressor()
    plain_trainer(callbacks=added).fit(attached, rows())

    torch.manual_seed(1)
    student = Regressor()
    optimizer = student.configure_optimizers()
    for x, y in rows():
        predicted = student(x)
        loss = (predicted - y).square().mean()
        optimizer.zero_grad()
        (loss + 0.5 * (predicted - teacher(x).detach()).square().mean()).backward()
        optimizer.step()
    assert largest_difference(weights(attached), weights(student)) < 1e-6
