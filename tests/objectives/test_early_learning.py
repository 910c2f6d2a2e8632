"""``EarlyLearningRegularization``: its memory is that of an epoch-by-epoch computation by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_aux as aux
from tests.engine.small_models import CLASSES, Classifier, Rows, equal, rows, weights


class ByHand(Classifier):
    """ELR written into the module, from the paper and sample by sample.

    ``t`` is a Python list per sample, found by the index that the data carries; it moves where the
    optimizer has stepped.
    """

    def __init__(self, weight: float = 0.0, momentum: float = 0.7, size: int = 24) -> None:
        super().__init__(lr=0.2)
        self.weight, self.momentum = weight, momentum
        self.memory = [[0.0] * CLASSES for _ in range(size)]
        self.pending: dict[int, list[float]] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        if not self.weight:
            return loss
        terms = []
        for sample, row in zip(x[:, -1].long().tolist(), logits, strict=True):
            p = row.softmax(0).clamp(1e-4, 1 - 1e-4)
            norm = float(p.detach().sum())
            fresh = [
                self.momentum * before + (1 - self.momentum) * float(now) / norm
                for before, now in zip(self.memory[sample], p.detach(), strict=True)
            ]
            self.pending[sample] = fresh
            terms.append((1 - (p * p.new_tensor(fresh)).sum()).log())
        return loss + self.weight * sum(terms) / len(terms)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.weight and self.trainer.global_step > self.stepped:
            self.stepped = self.trainer.global_step
            for sample, fresh in self.pending.items():
                self.memory[sample] = fresh
            self.pending.clear()

    stepped = 0


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_weights_and_memory_are_those_of_the_computation_by_hand(
    momentum, accumulate, plain_trainer
):
    """Shuffled, four epochs; under accumulation with a short last window."""
    settings = {"max_epochs": 4, "accumulate_grad_batches": accumulate}
    results = []
    elr = aux.EarlyLearningRegularization(weight=1.5, momentum=momentum)
    for weight, callbacks in ((1.5, []), (0.0, [elr])):
        torch.manual_seed(2)
        model = ByHand(weight, momentum)
        loader = rows(24, 4, shuffle=True, generator=torch.Generator().manual_seed(1))
        plain_trainer(callbacks=callbacks, **settings).fit(model, loader)
        results.append(model)
    by_hand, attached = results
    assert torch.allclose(elr.targets.rows, torch.tensor(by_hand.memory), atol=1e-5)
    for name, value in weights(by_hand).items():
        torch.testing.assert_close(attached.state_dict()[name], value, atol=1e-5, rtol=1e-5)


def test_a_sample_that_comes_twice_in_an_accumulation_window_meets_one_memory(plain_trainer):
    """Both visits start from the memory at the window's beginning; the later one is kept."""
    order = [0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 2, 3, 3, 2, 1, 0]
    results = []
    elr = aux.EarlyLearningRegularization(weight=1.5, momentum=0.7)
    for weight, callbacks in ((1.5, []), (0.0, [elr])):
        torch.manual_seed(2)
        model = ByHand(weight, 0.7, size=6)
        loader = DataLoader(Rows(6), batch_size=2, sampler=order)
        plain_trainer(max_epochs=2, accumulate_grad_batches=4, callbacks=callbacks).fit(
            model, loader
        )
        results.append(model)
    assert torch.allclose(elr.targets.rows, torch.tensor(results[0].memory), atol=1e-5)
    # Two windows an epoch and both hold samples 0 to 3: four updates in all.
    assert torch.allclose(elr.targets.rows[:4].sum(1), torch.full((4,), 1 - 0.7**4), atol=1e-5)
    assert (elr.targets.rows[4:] == 0).all()
    for name, value in weights(results[0]).items():
        torch.testing.assert_close(results[1].state_dict()[name], value, atol=1e-5, rtol=1e-5)


def test_after_n_visits_the_rows_sum_to_one_minus_momentum_to_the_n(plain_trainer):
    """Each p sums to 1, so Σ_c t_c = 1 − βⁿ: every sample was met once an epoch, none twice."""
    elr = aux.EarlyLearningRegularization(momentum=0.6)
    plain_trainer(max_epochs=3, callbacks=[elr]).fit(Classifier(), rows(22, 4, shuffle=True))
    assert torch.allclose(elr.targets.rows.sum(1), torch.full((22,), 1 - 0.6**3), atol=1e-5)


def test_the_memory_has_a_row_per_sample_of_the_dataset_and_zero_before_the_first_visit(
    plain_trainer,
):
    elr = aux.EarlyLearningRegularization()
    loader = DataLoader(Rows(50), batch_size=4)
    plain_trainer(limit_train_batches=3, callbacks=[elr]).fit(Classifier(), loader)
    memory = elr.targets.rows
    assert memory.shape == (50, CLASSES)
    assert memory.dtype == torch.float32
    assert (memory[:12] > 0).all()
    assert (memory[12:] == 0).all()


def test_the_memory_grows_while_the_weight_is_zero(plain_trainer):
    """A late start of the term finds the targets of the early epochs."""
    elr = aux.EarlyLearningRegularization(weight="late(3, start=50%)")
    plain_trainer(max_epochs=2, callbacks=[elr]).fit(Classifier(), rows())
    assert torch.allclose(elr.targets.rows.sum(1), torch.full((24,), 1 - 0.7**2), atol=1e-5)


def test_at_weight_zero_training_is_as_without(plain_trainer):
    results = []
    for callbacks in ([], [aux.EarlyLearningRegularization(weight=0.0)]):
        torch.manual_seed(2)
        model = Classifier(dropout=0.2)
        plain_trainer(callbacks=callbacks).fit(model, rows())
        results.append(weights(model))
    assert equal(*results)


def test_the_memory_stays_in_float32_under_bf16(plain_trainer):
    elr = aux.EarlyLearningRegularization(momentum=0.999)
    plain_trainer(max_epochs=2, precision="bf16-mixed", callbacks=[elr]).fit(Classifier(), rows())
    assert elr.targets.rows.dtype == torch.float32
    assert torch.allclose(elr.targets.rows.sum(1), torch.full((24,), 1 - 0.999**2), atol=1e-5)


def test_the_term_of_a_first_batch_is_the_closed_form(plain_trainer):
    """t = (1 − β) p, so the term is the mean of log(1 − (1 − β) Σ p²)."""
    terms: list[tuple[float, float]] = []

    class Kept(aux.EarlyLearningRegularization):
        def loss(self, step: aux.Step) -> Tensor:
            term = super().loss(step)
            p = step.logits.detach().double().softmax(1)
            by_hand = [math.log(1 - 0.3 * sum(c * c for c in row)) for row in p.tolist()]
            terms.append((term.item(), sum(by_hand) / len(by_hand)))
            return term

    plain_trainer(callbacks=[Kept(momentum=0.7)]).fit(Classifier(), rows())
    assert len(terms) == 6
    assert all(term == pytest.approx(hand, abs=1e-6) for term, hand in terms)


@pytest.mark.parametrize("momentum", [1.0, -0.1, 3])
def test_a_momentum_that_is_none_is_refused(momentum):
    with pytest.raises(aux.AuxiliaryError, match=rf"momentum={momentum} must lie in \[0, 1\)"):
        aux.EarlyLearningRegularization(momentum=momentum)


def test_logits_that_are_not_one_row_per_sample_are_a_named_error(plain_trainer):
    class Sequences(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, None, :]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0])[:, 0], batch[1])

    message = r"logits of shape \(4, 1, 3\) do not fit a batch of 4 samples"
    with pytest.raises(aux.AuxiliaryError, match=message):
        plain_trainer(callbacks=[aux.EarlyLearningRegularization()]).fit(Sequences(), rows())


def test_a_memory_of_another_dataset_is_a_named_error(plain_trainer, tmp_path):
    trainer = plain_trainer(callbacks=[aux.EarlyLearningRegularization()])
    trainer.fit(Classifier(), rows(24))
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    resumed = plain_trainer(max_epochs=2, callbacks=[aux.EarlyLearningRegularization()])
    with pytest.raises(aux.AuxiliaryError, match=r"has \(24, 3\) rows and columns.*\(20, 3\)"):
        resumed.fit(Classifier(), rows(20), ckpt_path=tmp_path / "first.ckpt")
