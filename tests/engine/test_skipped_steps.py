"""Steps that are not one forward, one backward, one update: ``None``, and LBFGS."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import lightning_aux as aux
from tests.engine.small_models import (
    Blind,
    Classifier,
    Probe,
    Shrink,
    largest_difference,
    rows,
    weights,
)


class Picky(Classifier):
    """Skips every third batch, the first included; ``by_hand`` is the term written in."""

    def __init__(self, by_hand: float = 0.0) -> None:
        super().__init__()
        self.by_hand = by_hand

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        if batch_idx % 3 == 0:
            return None
        return F.cross_entropy(logits, y) + self.by_hand * logits.square().mean()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.*")
def test_a_step_that_returns_none_gets_no_term(accumulate, plain_trainer):
    results = []
    probe = Blind(lambda step: step.batch_idx)
    for by_hand, callbacks in ((0.3, []), (0.0, [Shrink(0.3), probe])):
        torch.manual_seed(5)
        model = Picky(by_hand)
        plain_trainer(max_epochs=2, callbacks=callbacks, accumulate_grad_batches=accumulate).fit(
            model, rows()
        )
        results.append(weights(model))
    assert largest_difference(*results) < 1e-6
    assert probe.seen == [1, 2, 4, 5] * 2


class Curved(Classifier):
    """Trained by LBFGS, which runs the step as often as it likes before it moves on."""

    def __init__(self, by_hand: float = 0.0) -> None:
        super().__init__()
        self.by_hand = by_hand
        self.evaluations = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.evaluations += 1
        x, y = batch
        logits = self(x)
        return F.cross_entropy(logits, y) + self.by_hand * logits.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4)


def test_every_closure_of_lbfgs_has_the_term_and_the_clock_counts_its_steps(plain_trainer):
    results, evaluations = [], []
    teacher, probe = aux.EMATeacher(decay=0.5), Blind(lambda step: step.progress.steps)
    for by_hand, callbacks in ((0.3, []), (0.0, [Shrink(0.3), teacher, probe])):
        torch.manual_seed(5)
        model = Curved(by_hand)
        plain_trainer(callbacks=callbacks).fit(model, rows())
        results.append(weights(model))
        evaluations.append(model.evaluations)
    assert largest_difference(*results) < 1e-6
    assert evaluations[0] == evaluations[1] > 6
    assert teacher.updates == 6
    assert sorted(set(probe.seen)) == [0, 1, 2, 3, 4, 5]


def test_every_closure_of_lbfgs_sees_the_indices_of_its_batch(plain_trainer):
    probe = Probe(lambda step: (step.index.tolist(), step.batch[0][:, -1].long().tolist()))
    plain_trainer(callbacks=[probe]).fit(Curved(), rows(24, 4, shuffle=True))
    assert len(probe.seen) > 6
    assert all(claimed == true for claimed, true in probe.seen)


def test_a_memory_per_sample_moves_once_per_step_of_lbfgs(plain_trainer):
    elr = aux.EarlyLearningRegularization(momentum=0.7)
    plain_trainer(callbacks=[elr]).fit(Curved(), rows(24, 4))
    # One visit: t = (1 − β) p with p summing to 1.
    assert torch.allclose(elr.targets.rows.sum(1), torch.full((24,), 0.3), atol=1e-5)


class Inherited(torch.optim.SGD):
    """Its ``step`` calls that of its base class: torch fires the hooks of a step for each of them,
    once a plain SGD has been made anywhere in the process."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Heir(Classifier):
    def configure_optimizers(self) -> Any:
        torch.optim.SGD(self.parameters(), lr=0.1)
        return Inherited(self.parameters(), lr=0.1)


def test_an_optimizer_that_calls_the_step_of_its_base_class_steps_once(plain_trainer):
    teacher, probe = aux.EMATeacher(), Blind(lambda step: step.progress.steps)
    plain_trainer(callbacks=[teacher, probe]).fit(Heir(), rows())
    assert teacher.updates == 6
    assert probe.seen == [0, 1, 2, 3, 4, 5]
