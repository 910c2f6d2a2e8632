"""C6: accumulating 4 batches of B trains like one batch of 4·B, and teachers move once per step."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise
from typing import Any

import lightning as L
import pytest
import torch

from lightning_aux import EMATeacher
from lightning_aux.engine import Attached
from lightning_aux.registry import ENTRIES
from tests.contract.models import Classifier
from tests.contract.references import HandWritten, reference
from tests.contract.training import (
    callbacks,
    every_entry,
    every_per_sample_term,
    every_term,
    fit,
    identical,
    largest_difference,
    loader,
    seeded,
    weights,
)

pytestmark = pytest.mark.vouches("accumulation")

B, WINDOW = 4, 4


@every_per_sample_term
def test_f41_four_batches_accumulated_equal_one_of_four_times_the_size(entry: str) -> None:
    whole = seeded(Classifier)
    fit(whole, callbacks(entry), loader(48, B * WINDOW), max_epochs=3)
    parts = seeded(Classifier)
    trainer = fit(
        parts, callbacks(entry), loader(48, B), max_epochs=3, accumulate_grad_batches=WINDOW
    )
    assert trainer.global_step == 9
    assert largest_difference(weights(parts), weights(whole)) < 1e-6


@every_per_sample_term
def test_an_uneven_last_window_counts_for_its_share(entry: str) -> None:
    """10 batches in windows of 4, 4 and 2: Lightning divides the last two by 4 as well.

    By hand that is one batch of 8 whose loss, term included, counts 8/16.
    """
    hand = seeded(HandWritten, reference(entry), 0.5, window=B * WINDOW)
    fit(hand, data=loader(40, B * WINDOW, indexed=True), max_epochs=3)
    parts = seeded(Classifier)
    trainer = fit(
        parts, callbacks(entry), loader(40, B), max_epochs=3, accumulate_grad_batches=WINDOW
    )
    assert trainer.global_step == 9
    assert largest_difference(weights(parts), weights(hand)) < 1e-6


@every_term
def test_windows_of_changing_size_equal_the_hand_written_term(entry: str) -> None:
    """With `GradientAccumulationScheduler`: single batches in the first epoch, then pairs."""

    def run(module: Classifier, added: list[Any], indexed: bool) -> dict[str, torch.Tensor]:
        windows = L.pytorch.callbacks.GradientAccumulationScheduler({0: 1, 1: 2})
        trainer = fit(module, [*added, windows], loader(40, 8, indexed), max_epochs=3)
        assert trainer.global_step == 5 + 3 + 3
        return weights(module)

    hand = run(seeded(HandWritten, reference(entry), 0.5), [], indexed=True)
    attached = run(seeded(Classifier), callbacks(entry), indexed=False)
    # A running deviation near zero, which it divides by, makes more of a rounding.
    tolerance = 1e-5 if entry == "multi_teacher_distillation" else 1e-6
    assert largest_difference(attached, hand) < tolerance


class Trail(L.Callback):
    """The parameters in float64 after every optimizer step, what we keep after every batch."""

    def __init__(self, members: list[Attached]) -> None:
        self.members = members
        self.parameters: list[dict[str, torch.Tensor]] = []
        self.states: list[tuple[int, Any]] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._note(module)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == len(self.parameters):
            self._note(module)
        states = deepcopy({each.name: each.state() for each in self.members})
        self.states.append((trainer.global_step, states))

    def _note(self, module: L.LightningModule) -> None:
        self.parameters.append(
            {name: value.detach().double() for name, value in module.named_parameters()}
        )


def trained_with_trail(added: list[Attached], **arguments: Any) -> tuple[Trail, L.Trainer]:
    """7 batches an epoch in windows of 4 and 3, two epochs."""
    members = [*added, *(companion for each in added for companion in each.companions())]
    trail = Trail(members)
    module = seeded(Classifier)
    options: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": WINDOW}
    trainer = fit(module, [*added, trail], loader(28, B), **(options | arguments))
    return trail, trainer


def closed_form(teacher: EMATeacher, parameters: list[dict[str, torch.Tensor]]) -> Any:
    """Σ of all weights so far, each by its coefficient, in float64."""
    given = teacher.hyperparameters
    decays = [
        min(given["decay"], (1 + n) / (10 + n)) if given["warmup"] else given["decay"]
        for n in range(len(parameters) - 1)
    ]
    decays = [decay ** given["every"] for decay in decays]
    coefficients = []
    for position in range(len(parameters)):
        factor = 1.0 if position == 0 else 1 - decays[position - 1]
        for decay in decays[position:]:
            factor *= decay
        coefficients.append(factor)
    assert sum(coefficients) == pytest.approx(1)
    return {
        name: sum(c * each[name] for c, each in zip(coefficients, parameters, strict=True))
        for name in parameters[0]
    }


# The optimizer steps, of four, after which each teacher that is not an average has other weights.
MOVES = {
    "frozen_teacher": [],
    "ema_weights": [1, 2, 3, 4],
    "swa_teacher": [3],
    "snapshot_distillation": [2, 4],
    "voted_distillation": [2, 4],
    "random_distillation": [],
    "generations": [4],
    "self_distillation_js_correct": [],
    "another_module": [],
    "knowledge_distillation": [],
    "dual_head_distillation": [],
    "parameter_anchor_l2": [],
}
AVERAGED = [
    "ema_teacher",
    "ema_anchor_output",
    "ema_anchor_weight",
    "self_distillation_kl",
    "self_distillation_features",
    "multi_teacher_distillation",
]


def test_every_entry_with_a_teacher_is_one_of_these() -> None:
    taught = {
        name
        for name in ENTRIES
        for each in callbacks(name)
        for one in [each, *each.companions()]
        if hasattr(one, "weights_in_place")
    }
    assert taught == {*MOVES, *AVERAGED}


@pytest.mark.parametrize("entry", AVERAGED)
def test_f14_an_average_is_updated_once_per_optimizer_step(entry: str) -> None:
    trail, trainer = trained_with_trail(callbacks(entry))
    (teacher,) = [each for each in trail.members if isinstance(each, EMATeacher)]
    assert trainer.global_step == 4
    state = teacher.state()
    assert state["updates"] == trainer.global_step
    expected = closed_form(teacher, trail.parameters)
    actual = {name: state["weights"][name] for name in expected}
    assert largest_difference(actual, expected) < 1e-6


@pytest.mark.parametrize("entry", MOVES)
def test_f14_every_other_teacher_moves_when_it_says(entry: str) -> None:
    trail, _ = trained_with_trail(callbacks(entry))
    name = next(each.name for each in trail.members if hasattr(each, "weights_in_place"))

    def held(state: Any) -> Any:
        """Its tensors: weights, or the snapshots that there are."""
        return {key: value for key, value in state[name].items() if key in ("weights", "snapshots")}

    moved = [
        step
        for (_, before), (step, after) in pairwise([(0, trail.states[0][1]), *trail.states])
        if not identical(held(before), held(after))
    ]
    assert moved == MOVES[entry]


@every_entry
def test_f28_teachers_and_memories_stand_still_within_a_window(entry: str) -> None:
    trail, _ = trained_with_trail(callbacks(entry))
    still, moved = [], []
    for (step, before), (later, after) in pairwise(trail.states):
        (still if step == later else moved).append(identical(before, after))
    assert (len(still), len(moved)) == (9, 4)
    # Which note their numbers, and what they measured, when the next window begins.
    if entry not in ("attribute_schedule", "gradient_monitor", "phases"):
        assert all(still)
    if entry == "early_learning_regularization" or any(
        isinstance(each, EMATeacher) for each in trail.members
    ):
        assert not any(moved)


@pytest.mark.parametrize(
    ("every", "start", "updates"), [(1, 0, 4), (2, 0, 2), (1, 2, 2), (2, 1, 1), (3, 50, 0)]
)
def test_every_and_start_of_an_average_count_optimizer_steps(
    every: int, start: int, updates: int
) -> None:
    """The average begins at step `start` from the weights of then, and moves `every` steps."""
    teacher = EMATeacher(decay=0.5, every=every, start=start)
    trail, _ = trained_with_trail([teacher])
    assert teacher.state()["updates"] == updates
    if start > 4:
        assert "weights" not in teacher.state()
        return
    taken = trail.parameters[start::every]
    expected = closed_form(teacher, taken)
    actual = {name: teacher.state()["weights"][name] for name in expected}
    assert largest_difference(actual, expected) < 1e-6


def test_manual_optimisation_moves_teachers_once_per_step_of_the_first_optimizer() -> None:
    class EverySecondBatch(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            self.manual_backward(self.total_loss(batch) / 2)
            if batch_idx % 2:
                optimizer.step()
                optimizer.zero_grad()

    teacher = EMATeacher(decay=0.5)
    trail = Trail([teacher])
    module = seeded(EverySecondBatch, manual=True)
    trainer = fit(module, [teacher, trail], loader(48, B), max_epochs=1)
    assert trainer.global_step == teacher.state()["updates"] == 6
    expected = closed_form(teacher, trail.parameters)
    actual = {name: teacher.state()["weights"][name] for name in expected}
    assert largest_difference(actual, expected) < 1e-6
