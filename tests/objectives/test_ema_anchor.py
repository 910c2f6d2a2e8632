"""``EMAAnchor``: the term that its formula gives, from its own teacher or a shared one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_aux as aux
from tests.engine.small_models import Classifier, equal, rows, weights


class Logged(aux.EMAAnchor):
    """Keeps its terms and what they should be by hand."""

    def __init__(self, by_hand: Any, **arguments: Any) -> None:
        super().__init__(name="ema_anchor", **arguments)
        self.by_hand = by_hand
        self.pairs_seen: list[tuple[float, float]] = []

    def loss(self, step: aux.Step) -> Tensor:
        term = super().loss(step)
        self.pairs_seen.append((term.item(), self.by_hand(self, step)))
        return term


def output_by_hand(anchor: Logged, step: aux.Step) -> float:
    """T² Σ_i KL(p_i ‖ q_i)/n − entropy · Σ_i H(p_i)/n, class by class in Python floats."""
    t, total = anchor.temperature, 0.0
    student = step.logits.detach().double().flatten(0, -2).tolist()
    taught = step.teacher(anchor.teacher).logits.double().flatten(0, -2).tolist()

    def softmax(row: list[float], temperature: float) -> list[float]:
        exponentials = [math.exp(each / temperature) for each in row]
        return [each / sum(exponentials) for each in exponentials]

    for one, other in zip(student, taught, strict=True):
        p, q, plain = softmax(one, t), softmax(other, t), softmax(one, 1.0)
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        entropy = -sum(a * math.log(a) for a in plain)
        total += t * t * divergence - anchor.entropy * entropy
    return total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("entropy", [0.0, 0.2])
def test_the_output_term_is_the_formula(temperature, entropy, plain_trainer):
    anchor = Logged(output_by_hand, temperature=temperature, entropy=entropy, decay=0.5)
    plain_trainer(max_epochs=2, callbacks=[anchor]).fit(Classifier(lr=0.3), rows())
    assert len(anchor.pairs_seen) == 12
    for term, expected in anchor.pairs_seen:
        assert term == pytest.approx(expected, abs=2e-6)
    assert anchor.pairs_seen[-1][0] != pytest.approx(anchor.pairs_seen[0][0], abs=1e-4)


def test_sequences_are_averaged_over_every_position(plain_trainer):
    class Tagger(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.stack([x, x * 0.5], 1))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0])[:, 0], batch[1])

    anchor = Logged(output_by_hand, decay=0.5)
    plain_trainer(callbacks=[anchor]).fit(Tagger(lr=0.3), rows())
    assert all(term == pytest.approx(hand, abs=2e-6) for term, hand in anchor.pairs_seen)


def test_the_class_dimension_of_dense_predictions_is_an_argument(plain_trainer):
    """Classes in dim 1, as in segmentation: the formula on ``(pixels, classes)``."""

    class Dense(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            pixels = super().forward(torch.stack([x, x * 0.5, -x, x * 2], 1))
            return pixels.transpose(1, 2).unflatten(2, (2, 2))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0])[:, :, 0, 1], batch[1])

    def by_hand(anchor: Logged, step: aux.Step) -> float:
        class Last:
            """The same logits with the classes in the last dimension."""

            logits = step.logits.movedim(1, -1)

            def teacher(self, name: str) -> Any:
                self = Last()
                self.logits = step.teacher(name).logits.movedim(1, -1)
                return self

        return output_by_hand(anchor, Last())  # type: ignore[arg-type]

    anchor = Logged(by_hand, dim=1, temperature=2.0, entropy=0.1, decay=0.5)
    plain_trainer(max_epochs=2, callbacks=[anchor]).fit(Dense(lr=0.3), rows())
    assert len(anchor.pairs_seen) == 12
    assert all(term == pytest.approx(hand, abs=2e-6) for term, hand in anchor.pairs_seen)


def test_the_weight_term_is_the_squared_distance_to_the_average(plain_trainer):
    """The average is kept by hand, in float64; frozen parameters do not count."""
    average: dict[str, Tensor] = {}

    class Half(Classifier):
        def __init__(self) -> None:
            super().__init__(lr=0.3)
            self.encoder[0].bias.requires_grad_(False)

    def by_hand(anchor: Logged, step: aux.Step) -> float:
        now = {n: p.detach().double() for n, p in step.module.named_parameters() if p.requires_grad}
        for name, value in now.items():
            average[name] = 0.6 * average[name] + 0.4 * value if name in average else value
        return sum(float((now[name] - average[name]).square().sum()) for name in now)

    anchor = Logged(by_hand, space="weight", decay=0.6)
    plain_trainer(max_epochs=2, callbacks=[anchor]).fit(Half(), rows())
    assert anchor.pairs_seen[0] == (0.0, 0.0)
    assert anchor.pairs_seen[5][0] > 1e-4
    for term, expected in anchor.pairs_seen:
        assert term == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_the_weight_term_needs_no_forward_of_the_teacher(plain_trainer):
    model, passes = Classifier(), []
    model.classifier.register_forward_hook(lambda module, *_: passes.append(module.training))
    plain_trainer(callbacks=[aux.EMAAnchor("weight")]).fit(model, rows())
    assert passes == [True] * 6


@pytest.mark.parametrize("space", ["output", "weight"])
def test_its_own_teacher_is_an_ema_teacher_of_the_same_arguments(space, plain_trainer):
    results = []
    settings = {"decay": 0.7, "warmup": True, "every": 2, "start": 3, "buffers": "average"}
    for callbacks in (
        [aux.EMAAnchor(space, weight=2.0, **settings)],
        [aux.EMAAnchor(space, weight=2.0, teacher="mean"), aux.EMATeacher(name="mean", **settings)],
    ):
        torch.manual_seed(1)
        model = Classifier(dropout=0.3)
        model.encoder.append(nn.BatchNorm1d(8))
        plain_trainer(max_epochs=2, callbacks=callbacks).fit(model, rows())
        results.append(weights(model))
    assert equal(*results)


def test_until_start_the_anchor_is_the_model_and_the_term_has_no_gradient(plain_trainer):
    results = []
    for callbacks in ([], [aux.EMAAnchor(weight=5.0, start=12)]):
        torch.manual_seed(1)
        model = Classifier()
        plain_trainer(max_epochs=2, callbacks=callbacks).fit(model, rows())
        results.append(weights(model))
    # KL(p ‖ p) has the gradient 0 up to rounding.
    assert all(torch.allclose(results[0][n], results[1][n], atol=1e-6) for n in results[0])


def test_two_anchors_have_a_teacher_each(plain_trainer):
    one = aux.EMAAnchor(name="fast", decay=0.1)
    other = aux.EMAAnchor("weight", name="slow", decay=0.99)
    plain_trainer(callbacks=[one, other]).fit(Classifier(lr=0.3), rows())
    assert one.own_teacher.name == "fast.teacher"
    assert other.own_teacher.name == "slow.teacher"
    assert not equal(one.own_teacher.store.state_dict(), other.own_teacher.store.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"space": "hidden"}, r"ema_anchor: space='hidden' is unknown\. Choose 'output' or"),
        ({"space": "weight", "entropy": 0.1}, r"entropy=0\.1 needs outputs"),
        (
            {"space": "weight", "temperature": 2.0, "dim": 1},
            r"temperature=2\.0, dim=1 needs outputs",
        ),
        ({"temperature": 0.0}, r"temperature=0\.0 must be positive"),
        ({"decay": 2.0}, r"ema_anchor\.teacher: decay=2\.0 must lie in \[0, 1\]"),
        ({"nonfinite": "ignore"}, "nonfinite='ignore' is unknown. Choose 'raise' or 'skip'"),
        ({"backward": -1}, "backward=-1 counts calls of manual_backward from 0"),
    ],
)
def test_bad_arguments_are_refused_when_it_is_made(arguments, message):
    with pytest.raises(aux.AuxiliaryError, match=message):
        aux.EMAAnchor(**arguments)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("decay", 0.1), ("warmup", True), ("every", 2), ("start", 50), ("buffers", "average")],
)
def test_arguments_of_its_own_average_beside_a_named_teacher_are_refused(argument, value):
    """They would be ignored: the named teacher has its own."""
    message = rf"^ema_anchor: {argument}={value!r} beside .*EMATeacher\(name='ema', {argument}="
    with pytest.raises(aux.AuxiliaryError, match=message):
        aux.EMAAnchor(teacher="ema", **{argument: value})
    assert aux.EMAAnchor(**{argument: value}).own_teacher is not None


def test_a_weight_that_does_not_parse_is_refused_with_the_place(plain_trainer):
    with pytest.raises(ValueError, match=r"(?s)linaer.*\^"):
        aux.EMAAnchor(weight="linaer(0, 1, until=30%)")


def test_a_teacher_that_is_not_attached_is_named_before_training(plain_trainer):
    class Never(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError("trained")

    callbacks = [aux.EMAAnchor(teacher="meen"), aux.EMATeacher(name="mean")]
    with pytest.raises(aux.AuxiliaryError, match=r"no teacher is called 'meen'.*'mean'"):
        plain_trainer(callbacks=callbacks).fit(Never(), rows())


def test_logits_of_a_tap_are_anchored(plain_trainer):
    widths: list[int] = []

    def by_hand(anchor: Logged, step: aux.Step) -> float:
        widths.append(step.teacher(anchor.teacher).logits.shape[1])
        return output_by_hand(anchor, step)

    anchor = Logged(by_hand, taps=aux.Taps(logits="encoder.0"), decay=0.5)
    plain_trainer(callbacks=[anchor]).fit(Classifier(lr=0.3), rows())
    assert set(widths) == {8}
    assert all(term == pytest.approx(hand, abs=2e-6) for term, hand in anchor.pairs_seen)
    assert anchor.pairs_seen[-1][0] > 0
