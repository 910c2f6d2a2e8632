"""A captured output is the tapped module's own, also where the next layer overwrites it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_aux as aux
from tests.engine.small_models import CLASSES, WIDTH, Blind, Classifier, equal, rows, weights


class Doubled(nn.Module):
    """Writes into its input, like many an in-place activation of users."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2) if self.inplace else x * 2


AFTER = {
    "relu": lambda inplace: nn.ReLU(inplace=inplace),
    "dropout": lambda inplace: nn.Dropout(0.5, inplace=inplace),
    "dropout then relu": lambda inplace: nn.Sequential(
        nn.Dropout(0.3, inplace=inplace), nn.ReLU(inplace=inplace)
    ),
    "mul_": Doubled,
}


class Network(Classifier):
    def __init__(self, after: str, inplace: bool) -> None:
        super().__init__(lr=0.02)
        # BatchNorm: its backward needs its input, not its output, so overwriting is allowed.
        self.encoder = nn.Sequential(
            nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), AFTER[after](inplace), nn.Linear(8, CLASSES)
        )
        self.classifier = nn.Identity()


class FeatureNorm(aux.Objective):
    """A term with a gradient through the captured value itself."""

    def loss(self, step: aux.Step) -> Tensor:
        return step.features("encoder.1").square().mean()


class ByHand(Network):
    """The same term in the module itself, the features being read before they are overwritten."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        normed = self.encoder[1](self.encoder[0](x * x.new_tensor([1.0, 1.0, 1.0, 0.01])))
        term = normed.square().mean()
        return F.cross_entropy(self.encoder[3](self.encoder[2](normed)), y) + 0.5 * term


@pytest.mark.parametrize("after", AFTER)
def test_the_value_is_the_modules_own_from_the_first_step_on(after, plain_trainer):
    model = Network(after, inplace=True)
    truth: list[Tensor] = []
    model.encoder[1].register_forward_hook(lambda *seen: truth.append(seen[2].detach().clone()))
    probe = Blind(
        lambda step: step.features("encoder.1").detach().clone(), reads=("encoder.1", "encoder.*")
    )
    plain_trainer(callbacks=[probe]).fit(model, rows())
    assert len(probe.seen) == len(truth) == 6
    for seen, expected in zip(probe.seen, truth, strict=True):
        assert torch.equal(seen, expected)


@pytest.mark.parametrize("after", AFTER)
def test_the_teachers_value_is_its_own_too(after, plain_trainer):
    model = Network(after, inplace=True)
    truth: list[Tensor] = []

    def note(module: nn.Module, arguments: Any, returned: Tensor) -> None:
        if not module.training:
            truth.append(returned.clone())

    model.encoder[1].register_forward_hook(note)
    probe = Blind(
        lambda step: step.teacher("frozen").features("encoder.1").clone(), reads=("encoder.1",)
    )
    plain_trainer(callbacks=[probe, aux.FrozenTeacher()]).fit(model, rows())
    assert len(probe.seen) == len(truth) == 6
    for seen, expected in zip(probe.seen, truth, strict=True):
        assert torch.equal(seen, expected)


@pytest.mark.parametrize("after", AFTER)
def test_training_is_that_of_the_model_that_writes_nothing_in_place(after, plain_trainer):
    results = []
    for kind, inplace, callbacks in (
        (Network, True, [FeatureNorm(0.5, reads=("encoder.1",))]),
        (Network, False, [FeatureNorm(0.5, reads=("encoder.1",))]),
        (ByHand, False, []),
    ):
        torch.manual_seed(3)
        model = kind(after, inplace)
        plain_trainer(max_epochs=2, callbacks=callbacks).fit(model, rows())
        results.append(weights(model))
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])


def test_the_input_of_a_module_that_writes_in_place_is_what_it_was_given(plain_trainer):
    model = Network("relu", inplace=True)
    truth: list[Tensor] = []
    model.encoder[1].register_forward_hook(lambda *seen: truth.append(seen[2].detach().clone()))
    probe = Blind(lambda step: step.input("encoder.2").detach().clone(), reads=("encoder.2",))
    plain_trainer(callbacks=[probe]).fit(model, rows())
    assert all(torch.equal(seen, given) for seen, given in zip(probe.seen, truth, strict=True))


class Greedy(Classifier):
    """Normalises its input in place before anything else."""

    def forward(self, x: Tensor) -> Tensor:
        x -= 1
        return super().forward(x)


def test_a_teacher_is_not_silently_given_a_batch_that_the_model_has_overwritten(plain_trainer):
    callbacks = [aux.FrozenTeacher(), aux.SelfDistillation("frozen")]
    with pytest.raises(aux.AuxiliaryError, match=r"Greedy\.forward\(\.\.\.\) writes into its own"):
        plain_trainer(callbacks=callbacks).fit(Greedy(), rows())


def test_without_a_teacher_a_model_may_overwrite_its_batch(plain_trainer):
    probe = Blind(lambda step: step.logits)
    plain_trainer(callbacks=[probe]).fit(Greedy(), rows())
    assert len(probe.seen) == 6


class Graph:
    """A batch as an object, which can be called like PyTorch Geometric's."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __call__(self) -> None: ...


class Replacing(Classifier):
    """Its forward replaces what is in the container that it is given."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, given: Any) -> Any:
        if self.kind == "object":
            given.x = self.encoder(given.x)
            return self.classifier(given.x)
        given[0] = self.encoder(given[0])
        return self.classifier(given[0])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        if self.kind == "object":
            return F.cross_entropy(self(Graph(x)), y)
        return F.cross_entropy(self([x] if self.kind == "list" else {0: x}), y)


@pytest.mark.parametrize("kind", ["object", "list", "dict"])
def test_a_teacher_is_given_what_the_model_was_given_and_not_what_it_left(kind, plain_trainer):
    """Two teachers with the student's weights see what it saw, one after the other."""

    def look(step: aux.Step) -> Any:
        passes = [step.teacher("one"), step.teacher("two"), step.again()]
        return [torch.equal(step.logits, each.logits) for each in passes]

    probe = Blind(look)
    teachers = [aux.FrozenTeacher("one"), aux.FrozenTeacher("two")]
    plain_trainer(callbacks=[*teachers, probe], max_steps=1).fit(Replacing(kind), rows())
    assert probe.seen == [[True, True, True]]


@pytest.mark.parametrize("how", ["nested", "keyword"])
def test_an_input_that_is_overwritten_in_a_container_or_by_keyword_is_a_named_error(
    how, plain_trainer
):
    class Greedy(Classifier):
        def forward(self, given: Any = None, x: Any = None) -> Any:
            x = given["x"] if x is None else x
            return super().forward(x.mul_(2))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return F.cross_entropy(self({"x": x}) if how == "nested" else self(x=x), y)

    probe = Blind(lambda step: step.teacher("frozen").logits)
    with pytest.raises(aux.AuxiliaryError, match=r"Greedy\.forward\(\.\.\.\) writes into its own"):
        plain_trainer(callbacks=[aux.FrozenTeacher(), probe]).fit(Greedy(), rows())


def test_a_teacher_of_a_model_that_switches_gradients_on_has_none(plain_trainer):
    """As models do whose output is a derivative: forces of an energy."""

    class Forceful(Classifier):
        def forward(self, x: Tensor) -> Any:
            with torch.enable_grad():
                return super().forward(x)

    def look(step: aux.Step) -> Any:
        teacher = step.teacher("frozen")
        seen = (teacher.logits, teacher.features("encoder"), teacher.input("classifier"))
        return [step.logits.requires_grad, *(each.requires_grad for each in seen)]

    probe = Blind(look, reads=("encoder", "classifier"))
    plain_trainer(callbacks=[aux.FrozenTeacher(), probe], max_steps=1).fit(Forceful(), rows())
    assert probe.seen == [[True, False, False, False]]
