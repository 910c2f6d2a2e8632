"""What `inspect` says is what a fit does, and it leaves nothing behind."""

from __future__ import annotations

import logging
import random
import signal
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

import lightning_aux as aux
from lightning_aux.engine.taps import key_path
from lightning_aux.inspection import Shape
from lightning_aux.inspection.batch import leaves
from tests.engine.small_models import (
    CLASSES,
    WIDTH,
    Blind,
    Classifier,
    Shrink,
    equal,
    rows,
    weights,
)

FLOAT = 4  # bytes


class Parts(Classifier):
    """Calls two parts one after the other, so that no call gives the logits for sure."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.classifier(self.encoder(batch[0])), batch[1])


class Keyed(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["x"]), batch["answer"]["class"])


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def keyed_batch() -> dict[str, Any]:
    x, y = next(iter(rows()))
    return {"x": x, "answer": {"class": y}}


def in_parts(module: L.LightningModule, batch: Any) -> Tensor:
    return module.classifier(module.encoder(batch[0]))


def test_a_model_that_taps_run_is_named_after_the_function() -> None:
    taps = aux.Taps(logits="classifier", forward=in_parts)
    model = aux.inspect(Classifier(), rows(), [taps], steps=0).binding("model")
    assert (model.where, model.error) == ("in_parts", None)


def test_the_tree_has_paths_types_shapes_and_counts() -> None:
    found = aux.inspect(Classifier(dropout=0.25), rows(), steps=0)
    assert [(each.path, each.type, each.parameters) for each in found.modules] == [
        ("", "Classifier", 67),
        ("encoder", "Layers", 40),
        ("encoder.0", "Linear", 40),
        ("encoder.1", "Tanh", 0),
        ("encoder.2", "Dropout", 0),
        ("classifier", "Linear", 27),
    ]
    assert found.module("encoder").output == Shape((4, 8), "float32")
    assert found.module("classifier").output == Shape((4, CLASSES), "float32")
    assert found.module("encoder.2").kinds == ("dropout",)
    assert found.module("encoder.2").rate == 0.25
    assert found.module("encoder").kinds == ("encoder",)
    assert found.module("classifier").kinds == ("classifier",)
    assert [each.calls for each in found.modules[1:]] == [1] * 5


def test_a_module_that_does_not_run_has_no_output() -> None:
    model = Classifier()
    model.unused = nn.Linear(2, 2)
    unused = aux.inspect(model, rows(), steps=0).module("unused")
    assert (unused.calls, unused.output) == (0, None)


@pytest.mark.parametrize("make", [Classifier, Manual])
def test_bindings_are_those_that_a_fit_says(make: Any, plain_trainer: Any, caplog: Any) -> None:
    found = aux.inspect(make(), rows(), steps=0)
    probe = Blind(lambda step: (step.logits, step.target))
    with caplog.at_level(logging.INFO):
        plain_trainer(max_steps=1, callbacks=[probe]).fit(make(), rows())
    said = [each.message for each in caplog.records]
    for what in ("logits", "target"):
        assert f"lightning_aux: {what} = {found.binding(what).where}" in said
        assert found.binding(what).error is None
    assert found.binding("logits").shape == Shape(tuple(probe.seen[0][0].shape), "float32")
    assert found.binding("target").shape == Shape(tuple(probe.seen[0][1].shape), "int64")
    assert {each.path: each.roles for each in found.batch} == {
        "0": ("input of the model",),
        "1": ("target",),
    }


def test_what_a_fit_does_not_find_is_the_same_message(plain_trainer: Any) -> None:
    for what in ("logits", "target"):
        batch = keyed_batch() if what == "target" else next(iter(rows()))
        make = Keyed if what == "target" else Parts
        loader: Any = DataLoader([0], collate_fn=lambda _, batch=batch: batch)  # type: ignore[arg-type]
        error = aux.inspect(make(), batch, steps=0).binding(what).error
        probe = Blind(lambda step, what=what: getattr(step, what), name="inspect")
        with pytest.raises(aux.AuxiliaryError) as raised:
            plain_trainer(max_steps=1, callbacks=[probe]).fit(make(), loader)
        assert error is not None
        # What to do is said for this batch, where inspect has looked through it.
        said, _, _ = str(raised.value).removeprefix("inspect: ").partition(" Name one by")
        assert error.startswith(said)


def test_labels_that_no_rule_finds_are_suggested_by_their_key_path() -> None:
    error = aux.inspect(Keyed(), keyed_batch(), steps=0).binding("target").error
    assert error is not None
    assert error.endswith("It may be Taps(target='answer.class').")
    taps = aux.Taps(target="answer.class")
    found = aux.inspect(Keyed(), keyed_batch(), [taps], steps=0)
    assert found.binding("target").where == "'answer.class'"
    assert [each.path for each in found.batch if "target" in each.roles] == ["answer.class"]


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Graph:
    nodes: Tensor
    labels: list[Tensor]


def test_every_path_of_a_nested_batch_leads_to_its_value() -> None:
    tensors = [torch.zeros(each) for each in range(1, 6)]
    batch = {"a": [tensors[0], (tensors[1], "text")], "g": Graph(tensors[2], tensors[3:])}
    pair = Pair(tensors[0], tensors[1])
    assert dict(leaves(pair)) == {"x": tensors[0], "y": tensors[1]}
    found = dict(leaves(batch))
    assert list(found) == ["a.0", "a.1.0", "a.1.1", "g.nodes", "g.labels.0", "g.labels.1"]
    assert all(key_path(batch, path, "test") is value for path, value in found.items())
    assert dict(leaves(tensors[0])) == {"": tensors[0]}
    assert "with.dot" not in dict(leaves({"with.dot": tensors[0], "x": tensors[1]}))


# --------------------------------------------------------------------------------- kinds of modules
class PreNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


class PostNorm(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x).relu() + x)


class NotResidual(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) + self.linear(2.0 * x)


class Blocks(Classifier):
    def __init__(self) -> None:
        super().__init__()
        blocks = [PreNorm(), PostNorm(), NotResidual(), nn.Sequential(PreNorm())]
        self.encoder.append(nn.Sequential(*blocks))


def test_residual_blocks_are_those_that_add_their_own_input() -> None:
    found = aux.inspect(Blocks(), rows(), steps=0)
    blocks = [each.path for each in found.modules if "residual block" in each.kinds]
    assert blocks == ["encoder.3.0", "encoder.3.1", "encoder.3.3.0"]
    norms = [each.path for each in found.modules if "norm" in each.kinds]
    assert norms == [
        "encoder.3.0.norm",
        "encoder.3.1.norm",
        "encoder.3.2.norm",
        "encoder.3.3.0.norm",
    ]


def test_the_classifier_is_found_behind_what_is_done_to_its_output() -> None:
    class Scaled(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * super().forward(x).clamp(-50, 50)

    found = aux.inspect(Scaled(), rows(), steps=0)
    assert found.binding("classifier").where == "classifier"
    assert found.binding("encoder").where == "encoder"


# ------------------------------------------------------------------------------------ the callbacks
def test_what_callbacks_bind_to_hold_and_compute() -> None:
    torch.manual_seed(2)
    model = Classifier()
    callbacks = [
        aux.EMATeacher(decay=0.9),
        aux.SelfDistillation(on="encoder.?", divergence="mse"),
        aux.DualHeadDistillation("classifier", teacher="ema"),
        aux.DropoutSchedule(0.1, until="50%"),
        Shrink(weight="late(2, start=50%)"),
        Shrink(weight=0.0, name="off"),
    ]
    found = aux.inspect(model, rows(), callbacks, steps=1, max_epochs=4)
    assert not found.fails
    assert found.seconds is not None
    assert all(each.seconds is not None for each in found.members)

    assert found.member("ema").bytes == 67 * FLOAT
    features = found.member("self_distillation")
    assert features.binds == ("teacher ema", "reads encoder.0, encoder.1, encoder.2")
    assert features.bytes == 0  # the teacher's weights are the teacher's
    head = found.member("dual_head_distillation")
    assert head.parameters == 8 * CLASSES + CLASSES
    assert head.bytes == 3 * 27 * FLOAT  # weights, gradients, momentum
    assert found.member("dropout_schedule").binds == ("encoder.2 (0 before)",)
    shrink = found.member("shrink")
    assert shrink.binds == ("logits = Classifier.forward(...)",)
    with torch.no_grad():
        assert shrink.term == pytest.approx(float(model(next(iter(rows()))[0]).square().mean()))
    assert found.member("off").term is None
    assert found.member("off").notes == ("its weight stayed 0, so its term was not computed",)


def test_failures_are_told_with_their_reason_and_the_others_are_looked_at() -> None:
    class Broken(aux.Objective):
        def loss(self, step: aux.Step) -> Tensor:
            return step.logits @ torch.zeros(99)

    callbacks = [
        aux.EMATeacher(decay=0.9),
        aux.SelfDistillation("emma"),
        aux.SelfDistillation(on="encodr", divergence="mse", name="path"),
        Broken(),
        aux.FrozenTeacher(checkpoint="nowhere.ckpt"),
        aux.SelfDistillation("frozen", name="pupil"),
        Shrink(),
    ]
    found = aux.inspect(Classifier(), rows(), callbacks, steps=0)
    assert found.fails
    errors = {each.name: each.error for each in found.members}
    assert errors["ema"] is None
    assert errors["shrink"] is None
    assert "no teacher is called 'emma'. Near matches: 'ema'" in str(errors["self_distillation"])
    assert "has the path 'encodr'. Near matches: 'encoder'" in str(errors["path"])
    assert "RuntimeError" in str(errors["broken"])
    assert "(test_inspect.py, line" in str(errors["broken"])
    assert "nowhere.ckpt" in str(errors["frozen"])
    assert errors["pupil"] == "it needs 'frozen', which fails itself"
    text = str(found)
    assert all(str(error)[-20:] in " ".join(text.split()) for error in errors.values() if error)


def test_what_fails_only_together_is_told_once() -> None:
    twice = [aux.DropoutSchedule(0.1, until="50%", name=name) for name in ("one", "other")]
    found = aux.inspect(Classifier(), rows(), twice, steps=0)
    assert [each.error for each in found.members] == [None, None]
    assert "encoder.2 is driven by one already" in str(found.together)
    assert found.fails


def test_taps_that_lead_nowhere_do_not_hide_the_rest() -> None:
    for taps in (aux.Taps(logits="clasifier"), aux.Taps(target="labels")):
        found = aux.inspect(Classifier(), rows(), [taps, aux.EMATeacher()], steps=0)
        assert found.member("taps").error is not None
        assert found.member("ema").error is None
        assert found.module("classifier").output == Shape((4, CLASSES), "float32")


def test_indices_and_lengths_are_those_of_the_dataloader() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([rows().dataset[i] for i in range(8)])

    remembering = aux.EarlyLearningRegularization()
    found = aux.inspect(Classifier(), rows(), [remembering], steps=0)
    assert not found.fails
    assert found.members[0].bytes >= 24 * CLASSES * FLOAT  # a row for each sample of the dataset
    stream = DataLoader(Stream(), batch_size=4)
    found = aux.inspect(Classifier(), stream, [remembering], steps=0)
    assert "the training dataset Stream is iterable" in str(found.members[0].error)
    late = [Shrink(weight="linear(0, 1, until=3ep)")]
    assert not aux.inspect(Classifier(), rows(), late, steps=0).fails
    assert aux.inspect(Classifier(), stream, late, steps=0).fails  # how long is an epoch?


def test_callbacks_of_a_mixin_are_looked_at_and_others_named() -> None:
    class Net(aux.SelfDistillationMixin, Classifier):
        pass

    found = aux.inspect(Net(), rows(), [L.pytorch.callbacks.LearningRateMonitor()], steps=0)
    assert {each.type for each in found.members} == {"EMATeacher", "SelfDistillation"}
    assert found.others == ("LearningRateMonitor",)
    assert not found.fails


def test_an_error_of_the_step_is_shown_as_the_users() -> None:
    wrong = [torch.randn(4, WIDTH + 1), torch.zeros(4, dtype=torch.long)]

    class Plain(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.encoder(x))

    found = aux.inspect(Plain(), wrong, [aux.EMATeacher()], steps=0)
    assert found.fails
    assert str(found.error).startswith(
        "a training step of Plain fails without any callback, in the module 'encoder.0': "
        "RuntimeError: mat1 and mat2"
    )
    assert [each.path for each in found.batch] == ["0", "1"]
    assert "Fails: a training step of Plain" in str(found)


def test_what_is_no_lightning_module_is_refused() -> None:
    with pytest.raises(aux.AuxiliaryError, match="a Linear is no LightningModule"):
        aux.inspect(nn.Linear(2, 2), torch.zeros(1, 2), steps=0)


# ------------------------------------------------------------------------------------ no trace left
def hooks_and_attributes(module: nn.Module) -> list[Any]:
    return [
        (sorted(each.__dict__), list(each._forward_hooks), list(each._forward_pre_hooks))
        for each in module.modules()
    ]


def test_a_model_that_writes_into_its_batch_has_a_new_one_in_every_step() -> None:
    class Writes(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert not batch["x"].any()
            batch["x"].add_(1.0)
            return F.cross_entropy(self(batch["x"]), batch["answer"]["class"])

    batch = keyed_batch()
    batch["x"].zero_()
    assert not aux.inspect(Writes(), batch, [aux.EMATeacher()], steps=0).fails
    assert not batch["x"].any()


def test_a_term_is_the_same_whoever_else_is_looked_at() -> None:
    torch.manual_seed(3)
    model = Classifier(dropout=0.5)
    alone = aux.inspect(model, rows(), [Shrink()], steps=0)
    others = [aux.EMATeacher(), aux.SelfDistillation(), Shrink()]
    assert aux.inspect(model, rows(), others, steps=0).member("shrink") == alone.member("shrink")


def test_nothing_is_left_of_it(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    model, batch = Classifier(dropout=0.5), next(iter(rows()))
    model.encoder[2].eval()
    callbacks = [
        aux.EMATeacher(decay=0.5),
        aux.SelfDistillation(),
        aux.DropoutSchedule(0.9, mode="standard"),
        aux.ModelSoup(kind="uniform"),
        aux.SelfDistillation("nobody", name="fails"),
    ]
    before = weights(model), hooks_and_attributes(model)
    modes = [each.training for each in model.modules()]
    own = [dict(each.__dict__) for each in callbacks]
    given = deepcopy(batch)
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    level = logging.getLogger("lightning.pytorch").level
    streams = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    aux.inspect(model, batch, callbacks, steps=1)
    aux.inspect(model, rows(shuffle=True), callbacks, steps=0)
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert random.getstate() == streams[1]
    assert all(
        numpy.array_equal(one, other)
        for one, other in zip(numpy.random.get_state(), streams[2], strict=True)
    )
    assert equal(weights(model), before[0])
    assert hooks_and_attributes(model) == before[1]
    assert [each.training for each in model.modules()] == modes
    assert model.encoder[2].p == 0.5
    assert all(each.grad is None for each in model.parameters())
    assert [dict(each.__dict__) for each in callbacks] == own
    assert all(torch.equal(one, other) for one, other in zip(batch, given, strict=True))
    assert {each: signal.getsignal(each) for each in handlers} == handlers
    assert logging.getLogger("lightning.pytorch").level == level
    assert list(tmp_path.iterdir()) == []


def test_a_fit_afterwards_is_the_fit_without(plain_trainer: Any) -> None:
    ends = []
    for inspects in (False, True):
        torch.manual_seed(7)
        model, callbacks = Classifier(0.3), [aux.EMATeacher(decay=0.9), aux.SelfDistillation()]
        if inspects:
            aux.inspect(model, rows(shuffle=True), callbacks, steps=0)
        plain_trainer(callbacks=callbacks).fit(model, rows(shuffle=True))
        ends.append(weights(model))
    assert equal(*ends)


# ----------------------------------------------------------------------------------------- the page
class Nesting(HTMLParser):
    """Elements that are open, and every address that an element names."""

    VOID = ("meta", "br", "img", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_needs_no_other_file_and_says_the_same() -> None:
    class Odd(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("<b>&", nn.Identity())

    callbacks = [aux.EMATeacher(), aux.SelfDistillation("emma")]
    found = aux.inspect(Odd(), rows(), callbacks, steps=0)
    page, read = found.html(), Nesting()
    read.feed(page)
    assert read.open == []
    assert read.addresses == []
    assert "://" not in page
    assert "@import" not in page
    assert "url(" not in page
    assert "<b>&" in read.texts  # escaped in the source, and read as it is
    assert {each.path for each in found.modules if each.path} <= set(read.texts)
    assert any("no teacher is called 'emma'" in each for each in read.texts)
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page
    assert found._repr_html_() in page


def test_equal_numbered_neighbours_are_shown_once() -> None:
    class Deep(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.encoder.append(nn.Sequential(*(PreNorm() for _ in range(5)), nn.Linear(8, 8)))

    text = str(aux.inspect(Deep(), rows(), steps=0))
    assert "encoder.3.0 … 4" in text
    assert "encoder.3.0.norm" in text
    assert "encoder.3.1" not in text
    assert "encoder.3.5" in text
