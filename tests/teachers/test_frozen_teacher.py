"""``FrozenTeacher``: the weights at the start, or of a file that is read without running it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_aux as aux
from tests.engine.small_models import Blind, Classifier, equal, rows, weights


def held(teacher: aux.FrozenTeacher) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in teacher.store.state_dict().items()}


def test_without_a_file_it_keeps_the_weights_at_the_start_of_training(plain_trainer):
    model, teacher = Classifier(), aux.FrozenTeacher()
    initial = weights(model)
    plain_trainer(max_epochs=3, callbacks=[teacher]).fit(model, rows())
    assert equal(held(teacher), initial)
    assert not equal(weights(model), initial)


def test_a_resumed_run_keeps_the_weights_of_the_first_start(plain_trainer, tmp_path):
    model = Classifier()
    initial = weights(model)
    saving = ModelCheckpoint(tmp_path, "first", enable_version_counter=False)
    trainer = plain_trainer(
        max_epochs=2, callbacks=[aux.FrozenTeacher(), saving], enable_checkpointing=True
    )
    trainer.fit(model, rows())
    teacher = aux.FrozenTeacher()
    resumed = plain_trainer(max_epochs=3, callbacks=[teacher])
    resumed.fit(Classifier(), rows(), ckpt_path=tmp_path / "first.ckpt")
    assert resumed.global_step == 18
    assert equal(held(teacher), initial)


@pytest.mark.parametrize("form", ["lightning", "state_dict"])
def test_a_checkpoint_gives_it_its_weights(form, plain_trainer, tmp_path):
    path = tmp_path / "teacher.ckpt"
    torch.manual_seed(77)
    source = Classifier()
    if form == "lightning":
        trainer = plain_trainer(max_epochs=1)
        trainer.fit(source, rows())
        trainer.save_checkpoint(path)
    else:
        torch.save(source.state_dict(), path)
    teacher, student = aux.FrozenTeacher(checkpoint=str(path)), Classifier()
    expected = Classifier()
    expected.load_state_dict(source.state_dict())
    expected.eval()

    def look(step: aux.Step) -> bool:
        with torch.no_grad():
            return torch.equal(step.teacher("frozen").logits, expected(step.batch[0]))

    probe = Blind(look)
    plain_trainer(max_epochs=2, callbacks=[teacher, probe]).fit(student, rows())
    assert equal(held(teacher), weights(source))
    assert probe.seen == [True] * 12


def test_the_file_of_a_run_with_our_callbacks_serves_as_well(plain_trainer, tmp_path):
    """A checkpoint is the user's: it holds the raw weights under the user's names."""
    source = Classifier()
    trainer = plain_trainer(callbacks=[aux.EMATeacher(), aux.EarlyLearningRegularization()])
    trainer.fit(source, rows())
    trainer.save_checkpoint(tmp_path / "source.ckpt")
    teacher = aux.FrozenTeacher(checkpoint=tmp_path / "source.ckpt")
    plain_trainer(max_steps=1, callbacks=[teacher]).fit(Classifier(), rows())
    assert equal(held(teacher), weights(source))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["torch", "pickle", "nested"])
def test_f78_a_file_that_would_run_something_is_refused_and_runs_nothing(
    form, plain_trainer, tmp_path
):
    path, proof = tmp_path / "bad.ckpt", tmp_path / "it_ran"
    bomb = Bomb(proof)
    if form == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": bomb}))
    elif form == "torch":
        torch.save(bomb, path)
    else:
        good = Classifier().state_dict()
        torch.save({"state_dict": good, "callbacks": {"x": bomb}}, path)
    model = Classifier()
    before = weights(model)
    with pytest.raises(aux.AuxiliaryError, match="cannot be read with weights_only=True"):
        plain_trainer(callbacks=[aux.FrozenTeacher(checkpoint=path)]).fit(model, rows())
    assert not proof.exists()
    assert equal(weights(model), before)


def test_f78_names_of_classes_and_functions_in_a_file_are_not_followed(plain_trainer, tmp_path):
    """``_instantiator`` in the hyperparameters ran any function before Lightning 2.6.6 (F78)."""
    path, proof = tmp_path / "named.ckpt", tmp_path / "it_ran"
    torch.save(
        {
            "state_dict": Classifier().state_dict(),
            "hyper_parameters": {"_instantiator": "os.system", "command": f"touch {proof}"},
            "lightning_aux": {"members": {"frozen": {"class_path": "os.system"}}},
        },
        path,
    )
    plain_trainer(max_steps=1, callbacks=[aux.FrozenTeacher(checkpoint=path)]).fit(
        Classifier(), rows()
    )
    assert not proof.exists()


class Never(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("trained")

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("validated")


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (None, "is not a file"),
        (lambda: nn.Linear(2, 2).state_dict(), "lack 'encoder.0.weight'.* another model"),
        (lambda: {"state_dict": {}}, "saved weights lack"),
        (lambda: [torch.zeros(1)], "holds no state_dict"),
        (
            lambda: {n: torch.zeros(1, 1) for n in Classifier().state_dict()},
            r"'encoder\.0\.weight' has shape \(1, 1\) in the saved weights and \(8, 4\)",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_anything_runs(
    saved, message, plain_trainer, tmp_path
):
    path = tmp_path / "file.ckpt"
    if saved is not None:
        torch.save(saved(), path)
    with pytest.raises(aux.AuxiliaryError, match=message):
        plain_trainer(callbacks=[aux.FrozenTeacher(checkpoint=path)]).fit(Never(), rows(), rows())


def test_the_file_is_read_once_in_each_fit(plain_trainer, tmp_path, monkeypatch):
    path = tmp_path / "teacher.ckpt"
    source = Classifier()
    torch.save(source.state_dict(), path)
    reads, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kw: reads.append(args) or load(*args, **kw))
    teacher = aux.FrozenTeacher(checkpoint=path)
    for fits in (1, 2):
        plain_trainer(max_steps=2, callbacks=[teacher]).fit(Classifier(), rows())
        assert len(reads) == fits
        assert equal(held(teacher), weights(source))


def test_a_module_with_compiled_parts_reads_its_own_file_and_a_plain_one(plain_trainer, tmp_path):
    class Compiled(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = torch.compile(self.encoder, backend="eager")

    torch.manual_seed(77)
    plain, path = Classifier(), tmp_path / "teacher.ckpt"
    own = Compiled()
    own.load_state_dict(
        {k.replace("encoder.", "encoder._orig_mod."): v for k, v in plain.state_dict().items()}
    )
    for source in (own, plain):
        torch.save(source.state_dict(), path)
        for model in (Compiled(), Classifier()):
            teacher = aux.FrozenTeacher(checkpoint=path)
            plain_trainer(max_steps=1, callbacks=[teacher]).fit(model, rows())
            assert equal(held(teacher), weights(plain))
