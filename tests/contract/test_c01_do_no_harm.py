"""C1, do no harm: at weight 0, and with what only watches, training is bit-identical."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_aux import DropoutSchedule, EMATeacher, FrozenTeacher, Objective, Step
from tests.contract.models import Classifier
from tests.contract.probe import Probe
from tests.contract.training import (
    INERT,
    callbacks,
    every_term,
    fit,
    identical,
    loader,
    optimizer_state,
    random_state,
    seeded,
    weights,
)


class Watching(Objective):
    """Looks at everything that a step offers, in every step, at weight 0."""

    needs: ClassVar[tuple[str, ...]] = ("index",)
    observes: ClassVar[bool] = True

    def __init__(self, teacher: str) -> None:
        super().__init__(weight=0.0, reads=("encoder", "head"))
        self.teacher = teacher
        self.seen = 0

    def loss(self, step: Step) -> Tensor:
        taught = step.teacher(self.teacher)
        self.seen += len(step.index)
        distance = (step.logits - taught.logits).square().mean()
        features = (step.features("encoder") - taught.features("encoder")).square().mean()
        return distance + features + step.input("head").mean() + step.target.float().mean()


def state_after(added: list[Any], kind: type[Classifier] = Classifier) -> dict[str, Any]:
    """Train 20 steps with dropout, BatchNorm, Adam, shuffling and validation."""
    module = seeded(kind, dropout=0.2, norm=True, optimizer="adam")
    data = loader(shuffle=True)
    trainer = fit(module, added, data, loader(16), max_epochs=4)
    assert trainer.global_step == 20
    return {
        "weights": weights(module),
        "optimizer": optimizer_state(trainer),
        "random": random_state(),
    }


def differing(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    return [part for part in right if not identical(left[part], right[part])]


@pytest.fixture(scope="module")
def untouched() -> dict[str, Any]:
    """The same training with no callback of ours."""
    return state_after([])


@pytest.mark.parametrize("entry", INERT)
@pytest.mark.parametrize("weight", [0.0, "constant(0)", "late(0.5, start=20)"])
def test_weight_zero_leaves_training_bit_identical(
    untouched: dict[str, Any], entry: str, weight: float | str
) -> None:
    assert differing(state_after(callbacks(entry, weight)), untouched) == []


@pytest.mark.parametrize(
    "teacher",
    [EMATeacher(decay=0.5), EMATeacher(start=50), FrozenTeacher()],
    ids=["average", "the live weights", "frozen"],
)
def test_watching_leaves_training_bit_identical(
    untouched: dict[str, Any], teacher: EMATeacher | FrozenTeacher
) -> None:
    """Teacher forwards draw no random numbers and leave BatchNorm statistics alone."""
    watching = Watching(teacher.name)
    assert differing(state_after([teacher, watching]), untouched) == []
    assert watching.seen == 4 * 40


class Noisy(Classifier):
    """Draws random numbers in evaluation too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randn_like(x))


def test_watching_a_model_that_is_random_in_evaluation_leaves_training_bit_identical() -> None:
    without = state_after([], Noisy)
    assert differing(state_after([EMATeacher(), Watching("ema")], Noisy), without) == []


def test_a_dropout_schedule_at_the_users_own_rate_leaves_training_bit_identical(
    untouched: dict[str, Any],
) -> None:
    schedule = DropoutSchedule(p=0.2, mode="standard")
    assert differing(state_after([schedule]), untouched) == []


@every_term
def test_a_weight_that_is_not_zero_does_change_training(
    untouched: dict[str, Any], entry: str
) -> None:
    """What the tests above compare can differ."""
    after = state_after(callbacks(entry, 0.5))
    assert differing(after, untouched) == ["weights", "optimizer"]


def test_a_head_whose_term_has_weight_zero_leaves_the_users_training_bit_identical(
    untouched: dict[str, Any],
) -> None:
    """Making a head draws no random numbers of theirs; the optimizer holds the head besides."""
    assert differing(state_after([Probe(0.0)]), untouched) in ([], ["optimizer"])


def test_a_second_fit_with_the_same_trainer_and_weight_zero_is_bit_identical() -> None:
    def twice(added: list[L.Callback]) -> dict[str, Tensor]:
        module = seeded(Classifier, dropout=0.2, norm=True)
        trainer = fit(module, added, loader(), max_epochs=1)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, loader())
        assert trainer.global_step == 10
        return weights(module)

    assert identical(twice([EMATeacher(), Watching("ema")]), twice([]))
