"""What ``Step`` gives: the right values, whatever the batch, the output and the taps look like."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_aux as aux
from tests.engine.small_models import WIDTH, Blind, Classifier, Probe, Rows, rows


class Witness(Classifier):
    """Notes in its own ``training_step`` what an objective should see of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[SimpleNamespace] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        features = self.encoder(x * x.new_tensor([1.0, 1.0, 1.0, 0.01]))
        with torch.no_grad():
            note = SimpleNamespace(x=x.clone(), y=y.clone(), logits=logits.clone())
            note.loss, note.features, note.batch_idx = loss.clone(), features.clone(), batch_idx
        self.notes.append(note)
        return {"loss": loss, "extra": 7}


def test_every_accessor_gives_the_value_of_the_users_own_step(plain_trainer):
    def look(step: aux.Step) -> SimpleNamespace:
        return SimpleNamespace(
            x=step.batch[0].clone(),
            batch_idx=step.batch_idx,
            output=step.output,
            loss=step.loss.detach().clone(),
            logits=step.logits.detach().clone(),
            returned=step.returned.detach().clone(),
            target=step.target.clone(),
            features=step.features("encoder").detach().clone(),
            under_glob={k: v.detach().clone() for k, v in step.features("encoder.*").items()},
            input=step.input().clone(),
            input_of=step.input("classifier").detach().clone(),
            index=step.index.clone(),
            size=step.dataset_size,
            progress=step.progress,
            module=step.module,
        )

    probe = Probe(look, reads=("encoder", "encoder.*", "classifier"))
    model = Witness()
    trainer = plain_trainer(max_epochs=2, callbacks=[probe], accumulate_grad_batches=2)
    trainer.fit(model, rows(20, 4, shuffle=True))

    assert len(probe.seen) == len(model.notes) == 10
    for place, (seen, truth) in enumerate(zip(probe.seen, model.notes, strict=True)):
        assert torch.equal(seen.x, truth.x)
        assert seen.batch_idx == truth.batch_idx == place % 5
        assert seen.output["extra"] == 7
        assert torch.equal(seen.output["loss"], truth.loss)
        assert torch.equal(seen.loss, truth.loss)
        assert torch.equal(seen.logits, truth.logits)
        assert torch.equal(seen.returned, truth.logits)
        assert torch.equal(seen.target, truth.y)
        assert torch.equal(seen.features, truth.features)
        assert set(seen.under_glob) == {"encoder.0", "encoder.1", "encoder.2"}
        assert torch.equal(seen.under_glob["encoder.0"].tanh(), truth.features)
        assert torch.equal(seen.input, truth.x)
        assert torch.equal(seen.input_of, truth.features)
        assert seen.index.dtype == torch.int64
        assert torch.equal(seen.index, truth.x[:, -1].long())
        assert seen.size == 20
        assert seen.module is model
    # 5 batches an epoch in windows of 2: an optimizer step after batches 2, 4 and 5.
    assert [each.progress.steps for each in probe.seen] == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]
    assert [each.progress.epoch for each in probe.seen] == [0] * 5 + [1] * 5
    assert [each.progress.fraction for each in probe.seen] == [
        each.progress.steps / 6 for each in probe.seen
    ]


def test_values_carry_the_students_gradient_and_the_teachers_do_not(plain_trainer):
    def look(step: aux.Step) -> tuple[bool, ...]:
        teacher = step.teacher("frozen")
        student = (step.logits, step.features("encoder"), step.input("classifier"), step.loss)
        taught = (teacher.logits, teacher.features("encoder"), teacher.input("classifier"))
        return *(each.requires_grad for each in student), *(each.requires_grad for each in taught)

    probe = Blind(look, reads=("encoder", "classifier"))
    plain_trainer(max_steps=1, callbacks=[probe, aux.FrozenTeacher()]).fit(Classifier(), rows())
    assert probe.seen == [(True, True, True, True, False, False, False)]


def test_a_teachers_pass_has_the_values_of_its_weights(plain_trainer):
    model = Classifier(dropout=0.5)
    initial = Classifier()
    initial.load_state_dict(model.state_dict())
    initial.eval()

    def look(step: aux.Step) -> None:
        x = step.batch[0]
        teacher = step.teacher("frozen")
        with torch.no_grad():
            expected = initial(x)
            features = initial.encoder(x * x.new_tensor([1.0, 1.0, 1.0, 0.01]))
        assert torch.equal(teacher.logits, expected)
        assert torch.equal(teacher.returned, expected)
        assert torch.equal(teacher.features("encoder"), features)
        assert set(teacher.features("enc*")) == {
            f"encoder{each}" for each in ("", ".0", ".1", ".2")
        }
        assert torch.equal(teacher.input("classifier"), features)
        assert torch.equal(teacher.input(), x)
        assert torch.equal(teacher.target, step.target)
        assert teacher.batch is step.batch
        if step.progress.steps:
            assert not torch.equal(step.logits, expected)

    probe = Blind(look, reads=("encoder", "classifier", "enc*"))
    plain_trainer(callbacks=[probe, aux.FrozenTeacher()]).fit(model, rows())
    assert len(probe.seen) == 6


# ------------------------------------------------------------------------- defaults and key paths
Pair = namedtuple("Pair", ["inputs", "labels"])


class Output(dict):
    """Like a Hugging Face ``ModelOutput``: a mapping with attributes, loss first."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Shapeshifter(Classifier):
    """Takes its batch and gives its output in the form named by ``form``."""

    def __init__(self, form: str, inputs: Any, labels: Any) -> None:
        super().__init__()
        self.form, self.inputs, self.labels = form, inputs, labels

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        forms = {
            "tensor": lambda: logits,
            "model_output": lambda: Output(loss=logits.sum(), logits=logits),
            "attribute": lambda: SimpleNamespace(logits=logits),
            "tuple": lambda: (logits, logits.sum()),
            "dict": lambda: {"hidden": x, "logits": logits},
        }
        return forms[self.form]()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        found = self(self.inputs(batch))
        logits = {
            "tensor": lambda: found,
            "tuple": lambda: found[0],
            "dict": lambda: found["logits"],
        }.get(self.form, lambda: found.logits)()
        self.latest = logits.detach().clone()
        return F.cross_entropy(logits, self.labels(batch))


BATCHES = {
    "tuple": (lambda x, y: (x, y), lambda b: b[0], lambda b: b[1]),
    "list": (lambda x, y: [x, y, 3], lambda b: b[0], lambda b: b[1]),
    "namedtuple": (Pair, lambda b: b.inputs, lambda b: b.labels),
    "labels": (lambda x, y: {"x": x, "labels": y}, lambda b: b["x"], lambda b: b["labels"]),
    "target": (lambda x, y: {"target": y, "x": x}, lambda b: b["x"], lambda b: b["target"]),
    "y": (lambda x, y: {"x": x, "y": y}, lambda b: b["x"], lambda b: b["y"]),
    "attribute": (lambda x, y: SimpleNamespace(x=x, y=y), lambda b: b.x, lambda b: b.y),
}


def collated(make: Any, size: int = 8) -> DataLoader[Any]:
    def collate(samples: list[tuple[Tensor, Tensor]]) -> Any:
        x, y = zip(*samples, strict=True)
        return make(torch.stack(x), torch.stack(y))

    return DataLoader(Rows(size), batch_size=4, collate_fn=collate)


@pytest.mark.parametrize("form", ["tensor", "model_output", "attribute", "tuple", "dict"])
def test_logits_are_found_in_whatever_the_forward_returns(form, plain_trainer):
    make, inputs, labels = BATCHES["tuple"]
    model = Shapeshifter(form, inputs, labels)
    probe = Blind(lambda step: torch.equal(step.logits, model.latest))
    plain_trainer(callbacks=[probe]).fit(model, collated(make))
    assert probe.seen == [True, True]


@pytest.mark.parametrize("kind", BATCHES)
def test_the_target_is_found_in_the_usual_batches(kind, plain_trainer):
    make, inputs, labels = BATCHES[kind]
    truth = Rows(8).y
    probe = Blind(lambda step: step.target.clone())
    plain_trainer(callbacks=[probe]).fit(Shapeshifter("tensor", inputs, labels), collated(make))
    assert torch.equal(torch.cat(probe.seen), truth)


@pytest.mark.parametrize(
    ("path", "make"),
    [
        ("1", lambda x, y: (x, y)),
        ("-1", lambda x, y: (x, 0, y)),
        ("labels", lambda x, y: {"x": x, "labels": y}),
        ("graph.y", lambda x, y: {"x": x, "graph": SimpleNamespace(y=y)}),
        ("meta.0.truth", lambda x, y: {"x": x, "meta": [{"truth": y}, None]}),
        ("inner.1", lambda x, y: SimpleNamespace(x=x, inner=(x, y))),
    ],
)
def test_a_key_path_leads_through_keys_positions_and_attributes(path, make, plain_trainer):
    def inputs(batch: Any) -> Tensor:
        if isinstance(batch, dict):
            return batch["x"]
        return batch[0] if isinstance(batch, tuple) else batch.x

    truth = Rows(8).y
    model = Shapeshifter("tensor", inputs, lambda batch: torch.zeros(4, dtype=torch.long))
    probe = Blind(lambda step: step.target.clone(), taps=aux.Taps(target=path))
    plain_trainer(callbacks=[probe]).fit(model, collated(make))
    assert torch.equal(torch.cat(probe.seen), truth)


def test_a_key_path_that_ends_too_early_says_where(plain_trainer):
    probe = Blind(lambda step: step.target, taps=aux.Taps(target="1.deep"))
    with pytest.raises(aux.AuxiliaryError, match=r"'1\.deep' ends at 1, which is a tensor"):
        plain_trainer(callbacks=[probe]).fit(Classifier(), rows())


# ------------------------------------------------------------------------------------------ taps
def test_a_callable_is_accepted_wherever_a_path_is(plain_trainer):
    probe = Blind(
        lambda step: (
            torch.equal(step.logits, step.returned * 2),
            torch.equal(step.target, step.batch[1].flip(0)),
            torch.equal(step.features(), step.batch[0][:, :1]),
            torch.equal(step.features(lambda p: p.batch[0][:, 1:]), step.batch[0][:, 1:]),
            torch.equal(step.input(), step.batch[0] + 1),
            torch.equal(
                step.teacher("frozen").logits.detach(), step.teacher("frozen").returned * 2
            ),
        ),
        taps=aux.Taps(
            logits=lambda p: p.returned * 2,
            target=lambda p: p.batch[1].flip(0),
            features=lambda p: p.batch[0][:, :1],
            input=lambda p: p.batch[0] + 1,
        ),
    )
    plain_trainer(max_steps=2, callbacks=[probe, aux.FrozenTeacher()]).fit(Classifier(), rows())
    assert probe.seen == [(True,) * 6] * 2


def test_the_objectives_own_taps_come_before_those_of_the_trainer(plain_trainer):
    def look(step: aux.Step) -> tuple[int, int, int]:
        return step.logits.shape[1], step.features().shape[1], step.input().shape[1]

    follows = Blind(look, name="follows")
    overrides = Blind(look, name="overrides", taps=aux.Taps(logits="encoder"))
    shared = aux.Taps(logits="classifier", features="encoder.0", input="classifier")
    trainer = plain_trainer(max_steps=1, callbacks=[follows, overrides, shared])
    trainer.fit(Classifier(), rows())
    assert follows.seen == [(3, 8, 8)]
    assert overrides.seen == [(8, 8, 8)]


def test_a_module_that_runs_several_times_gives_its_first_output_and_input(plain_trainer):
    class Twice(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self(x), y) + self(x.flip(0) * 2).square().mean()

    truth: list[Tensor] = []
    model = Twice()
    model.encoder.register_forward_hook(lambda *seen: truth.append(seen[2].detach().clone()))
    probe = Blind(
        lambda step: (
            step.features("encoder").detach().clone(),
            torch.equal(step.input(), step.batch[0]),
            torch.equal(step.logits, model.classifier(step.features("encoder"))),
        ),
        reads=("encoder",),
    )
    plain_trainer(callbacks=[probe]).fit(model, rows())
    assert len(truth) == 12
    assert all(
        torch.equal(seen, first) for (seen, *_), first in zip(probe.seen, truth[::2], strict=True)
    )
    assert all(given and logits for _, given, logits in probe.seen)


def test_a_tapped_module_that_the_step_does_not_call_is_named(plain_trainer):
    class Lazybones(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(WIDTH, 2)

    probe = Blind(lambda step: step.features("idle"), reads=("idle",))
    with pytest.raises(aux.AuxiliaryError, match="'idle' was not called in this training step"):
        plain_trainer(callbacks=[probe]).fit(Lazybones(), rows())


def test_a_path_that_was_not_declared_is_refused_with_the_way_to_declare_it(plain_trainer):
    probe = Blind(lambda step: step.features("encoder.0"))
    with pytest.raises(aux.AuxiliaryError, match=r"reads=\('encoder\.0',\)"):
        plain_trainer(callbacks=[probe]).fit(Classifier(), rows())


# ---------------------------------------------------------------- which call is the model's output
class CallsForward(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.forward(batch[0]), batch[1])


class CallsNet(Classifier):
    """Has no forward of its own: all of it is in ``self.net``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(self.encoder, self.classifier)
        del self.encoder, self.classifier

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class CallsParts(Classifier):
    """No single call maps the batch to logits; the first child is called on data, alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.classifier(self.encoder(batch[0])), batch[1])


class CallsTwoTowers(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDTH, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.encoder(batch[0])[:, :3] + self.other(batch[0]), batch[1])


@pytest.mark.parametrize("kind", [Classifier, CallsForward, CallsNet])
def test_the_model_is_found_however_the_step_calls_it(kind, plain_trainer):
    model = kind()
    net = model.net if kind is CallsNet else model
    expected: list[Tensor] = []
    net.register_forward_hook(lambda *seen: expected.append(seen[2].detach().clone()))
    if kind is CallsForward:  # a direct call runs no hook, so the truth is the last layer's
        model.classifier.register_forward_hook(lambda *seen: expected.append(seen[2].detach()))
    probe = Blind(lambda step: (step.logits.detach().clone(), step.input().clone()))
    plain_trainer(callbacks=[probe]).fit(model, rows())
    assert len(probe.seen) == len(expected) == 6
    for (logits, given), truth in zip(probe.seen, expected, strict=True):
        assert torch.equal(logits, truth)
        assert torch.equal(given[:, -1] % 4, torch.arange(4.0))


def test_without_one_model_call_the_error_lists_what_was_called(plain_trainer):
    probe = Blind(lambda step: step.logits)
    with pytest.raises(aux.AuxiliaryError, match="called: encoder, other"):
        plain_trainer(callbacks=[probe]).fit(CallsTwoTowers(), rows())


def test_a_tap_serves_a_model_that_is_called_in_parts(plain_trainer):
    model = CallsParts()
    truth: list[Tensor] = []
    model.classifier.register_forward_hook(lambda *seen: truth.append(seen[2].detach().clone()))
    probe = Blind(lambda step: step.logits.detach().clone(), taps=aux.Taps(logits="classifier"))
    plain_trainer(callbacks=[probe]).fit(model, rows())
    assert torch.equal(torch.cat(probe.seen), torch.cat(truth))


def test_a_model_that_is_called_in_parts_is_not_silently_taken_for_its_first_part(plain_trainer):
    probe = Blind(lambda step: step.logits)
    with pytest.raises(aux.AuxiliaryError, match="after 'encoder' it calls 'classifier'"):
        plain_trainer(callbacks=[probe]).fit(CallsParts(), rows())
