"""C2: attached, a term trains the model exactly as the same term written into `training_step`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_aux import EMATeacher, SelfDistillation
from lightning_aux.engine import Attached
from lightning_aux.registry import ENTRIES
from tests.contract.models import Classifier
from tests.contract.references import HandWritten, Reference, reference
from tests.contract.training import (
    callbacks,
    fit,
    largest_difference,
    loader,
    seeded,
    weights,
)

TRAINED = [name for name, entry in ENTRIES.items() if entry.objective or not entry.inert]
MODEL: dict[str, Any] = {"dropout": 0.2, "norm": True}

every_changing_entry = pytest.mark.parametrize("entry", TRAINED)


def by_hand(
    term: Reference, weight: float | Callable[[int, int], float], **model: Any
) -> dict[str, torch.Tensor]:
    module = seeded(HandWritten, term, weight, **(MODEL | model))
    fit(module, data=loader(indexed=True))
    return weights(module)


def attached(added: list[Attached], **model: Any) -> dict[str, torch.Tensor]:
    module = seeded(Classifier, **(MODEL | model))
    trainer = fit(module, added, loader())
    assert trainer.global_step == 10
    return weights(module)


@pytest.mark.parametrize("returns", ["tensor", "dict"])
@pytest.mark.parametrize(
    "manual",
    [False, pytest.param(True, marks=pytest.mark.vouches("manual"))],
    ids=["automatic", "manual"],
)
@every_changing_entry
def test_training_equals_the_hand_written_term(entry: str, manual: bool, returns: str) -> None:
    expected = by_hand(reference(entry), 0.7, manual=manual, returns=returns)
    actual = attached(callbacks(entry, 0.7), manual=manual, returns=returns)
    assert largest_difference(actual, expected) < 1e-6


@every_changing_entry
def test_a_scheduled_weight_is_that_of_the_steps_already_taken(entry: str) -> None:
    expected = by_hand(
        reference(entry),
        lambda steps, total: 0.2 + 0.8 * steps / (0.5 * total) if steps < 0.5 * total else 1.0,
    )
    actual = attached(callbacks(entry, "linear(0.2, 1, until=50%)"))
    assert largest_difference(actual, expected) < 1e-6


def test_an_entry_without_a_hand_written_reference_fails_and_says_where_to_write_it() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"tests/contract/references\.py"):
        reference("an_entry_that_was_just_added")


@every_changing_entry
def test_what_is_compared_moves_the_weights(entry: str) -> None:
    """The hand-written run differs from training without the term by far more than 1e-6."""
    assert largest_difference(by_hand(reference(entry), 0.7), by_hand(Reference(), 0.0)) > 1e-3


def test_every_objective_adds_its_own_weighted_term() -> None:
    """Several at once train like all of them written by hand, summed."""
    named = ["ema_anchor_output", "early_learning_regularization", "self_distillation_features"]

    class Sum(Reference):
        def __init__(self) -> None:
            self.parts = [reference(entry) for entry in named]

        def begin(self, module: Classifier) -> None:
            for part in self.parts:
                part.begin(module)

        def term(self, module: Classifier, batch: Any, logits: torch.Tensor) -> torch.Tensor:
            return torch.stack([part.term(module, batch, logits) for part in self.parts]).sum()

        def stepped(self, module: Classifier) -> None:
            for part in self.parts:
                part.stepped(module)

    added = [each for entry in named for each in callbacks(entry, 0.7)]
    assert largest_difference(attached(added), by_hand(Sum(), 0.7)) < 1e-6


class TwoBackwards(Classifier):
    """Manual optimisation with two calls of `manual_backward`, the second one halved."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.total_loss(batch))
        self.manual_backward(self.first_and_second(batch))
        optimizer.step()

    def first_and_second(self, batch: Any) -> torch.Tensor:
        return 0.5 * self.total_loss(batch)


class TwoBackwardsByHand(HandWritten, TwoBackwards):
    """The same with the term in one of the two."""

    joins = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        plain = Classifier.total_loss
        x, _, _ = batch
        for call, factor in enumerate((1.0, 0.5)):
            loss = factor * plain(self, batch)
            if call == self.joins:
                loss = loss + 0.7 * self.reference.term(self, batch, self(x))
            self.manual_backward(loss)
        optimizer.step()


@pytest.mark.parametrize("joins", [0, 1])
def test_in_manual_optimisation_the_term_joins_the_backward_that_is_named(joins: int) -> None:
    # Written by hand, the gradient is the same whichever of the two calls the term joins: what
    # differs is that it arrives once, and neither doubled nor halved.
    hand = seeded(TwoBackwardsByHand, reference("self_distillation_kl"), manual=True)
    hand.joins = joins
    fit(hand, data=loader(indexed=True))
    module = seeded(TwoBackwards, manual=True)
    objective = SelfDistillation(weight=0.7, temperature=2.0, backward=joins)
    fit(module, [EMATeacher(decay=0.9), objective], loader())
    assert largest_difference(weights(module), weights(hand)) < 1e-6


def test_a_step_that_returns_none_is_skipped_as_without_terms() -> None:
    class Skipping(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    class SkippingByHand(HandWritten):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    hand = seeded(SkippingByHand, reference("ema_anchor_output"), 0.7)
    fit(hand, data=loader(indexed=True))
    module = seeded(Skipping)
    fit(module, callbacks("ema_anchor_output", 0.7), loader())
    assert largest_difference(weights(module), weights(hand)) < 1e-6
