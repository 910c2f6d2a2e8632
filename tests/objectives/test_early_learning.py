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
from tests.contract.strategies.watching import Rows as Logged
from tests.engine.small_models import CLASSES, Classifier, Rows, equal, rows, weights
from tests.objectives.remembering import stored


class ByHand(Classifier):
    """ELR written into the module, from the paper and sample by sample.

    ``t`` is a Python list per sample, found by the index that the data carries; it moves where the
    optimizer has stepped.
    """

    def __init__(
        self,
        weight: float = 0.0,
        momentum: float = 0.7,
        size: int = 24,
        storage: str | int = "float32",
    ) -> None:
        super().__init__(lr=0.2)
        self.weight, self.momentum, self.storage = weight, momentum, storage
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
                self.memory[sample] = stored(fresh, self.storage)
            self.pending.clear()

    stepped = 0


@pytest.mark.parametrize(
    ("momentum", "accumulate", "storage"),
    [
        (0.0, 1, "float32"),
        (0.7, 1, "float32"),
        (0.0, 4, "float32"),
        (0.7, 4, "float32"),
        (0.7, 4, "float16"),
        (0.7, 1, 1),
        (0.7, 4, 2),
    ],
)
def test_weights_and_memory_are_those_of_the_computation_by_hand(
    momentum, accumulate, storage, plain_trainer
):
    """Shuffled, four epochs; under accumulation with a short last window."""
    settings = {"max_epochs": 4, "accumulate_grad_batches": accumulate}
    results = []
    elr = aux.EarlyLearningRegularization(weight=1.5, momentum=momentum, storage=storage)
    for weight, callbacks in ((1.5, []), (0.0, [elr])):
        torch.manual_seed(2)
        model = ByHand(weight, momentum, storage=storage)
        loader = rows(24, 4, shuffle=True, generator=torch.Generator().manual_seed(1))
        plain_trainer(callbacks=callbacks, **settings).fit(model, loader)
        results.append(model)
    by_hand, attached = results
    assert torch.allclose(elr.memory.rows, torch.tensor(by_hand.memory), atol=1e-5)
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
    assert torch.allclose(elr.memory.rows, torch.tensor(results[0].memory), atol=1e-5)
    # Two windows an epoch and both hold samples 0 to 3: four updates in all.
    assert torch.allclose(elr.memory.rows[:4].sum(1), torch.full((4,), 1 - 0.7**4), atol=1e-5)
    assert (elr.memory.rows[4:] == 0).all()
    for name, value in weights(results[0]).items():
        torch.testing.assert_close(results[1].state_dict()[name], value, atol=1e-5, rtol=1e-5)


def test_after_n_visits_the_rows_sum_to_one_minus_momentum_to_the_n(plain_trainer):
    """Each p sums to 1, so Σ_c t_c = 1 − βⁿ: every sample was met once an epoch, none twice."""
    elr = aux.EarlyLearningRegularization(momentum=0.6)
    plain_trainer(max_epochs=3, callbacks=[elr]).fit(Classifier(), rows(22, 4, shuffle=True))
    assert torch.allclose(elr.memory.rows.sum(1), torch.full((22,), 1 - 0.6**3), atol=1e-5)


def test_the_memory_has_a_row_per_sample_of_the_dataset_and_zero_before_the_first_visit(
    plain_trainer,
):
    elr = aux.EarlyLearningRegularization()
    loader = DataLoader(Rows(50), batch_size=4)
    plain_trainer(limit_train_batches=3, callbacks=[elr]).fit(Classifier(), loader)
    memory = elr.memory.rows
    assert memory.shape == (50, CLASSES)
    assert memory.dtype == torch.float32
    assert (memory[:12] > 0).all()
    assert (memory[12:] == 0).all()


def test_the_memory_grows_while_the_weight_is_zero(plain_trainer):
    """A late start of the term finds the targets of the early epochs."""
    elr = aux.EarlyLearningRegularization(weight="late(3, start=50%)")
    plain_trainer(max_epochs=2, callbacks=[elr]).fit(Classifier(), rows())
    assert torch.allclose(elr.memory.rows.sum(1), torch.full((24,), 1 - 0.7**2), atol=1e-5)


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
    assert elr.memory.rows.dtype == torch.float32
    assert torch.allclose(elr.memory.rows.sum(1), torch.full((24,), 1 - 0.999**2), atol=1e-5)


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


class Sequences(Classifier):
    """Predictions in three places for each sample."""

    shape = "(batch, length, classes)"

    def forward(self, x: Tensor) -> Tensor:
        places = torch.stack([super(Sequences, self).forward(f * x) for f in (1.0, 0.5, -1.0)], 1)
        return places if self.shape == "(batch, length, classes)" else places.movedim(-1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        places = logits if self.shape == "(batch, length, classes)" else logits.movedim(1, -1)
        return F.cross_entropy(places[:, 0], batch[1])


@pytest.mark.parametrize("storage", ["float32", 2])
@pytest.mark.parametrize(
    ("shape", "dim"), [("(batch, length, classes)", -1), ("(batch, classes, length)", 1)]
)
def test_each_place_of_a_dense_prediction_has_its_memory(shape, dim, storage, plain_trainer):
    terms: list[tuple[float, float]] = []
    memory = [[[0.0] * CLASSES for _ in range(3)] for _ in range(24)]

    class Compared(aux.EarlyLearningRegularization):
        def loss(self, step: aux.Step) -> Tensor:
            inner = []
            logits = step.logits.detach().double().movedim(dim, -1)
            for sample, places in zip(step.index.tolist(), logits, strict=True):
                for place, p in enumerate(places.softmax(-1).tolist()):
                    before = memory[sample][place]
                    fresh = [0.7 * t + 0.3 * each for t, each in zip(before, p, strict=True)]
                    memory[sample][place] = stored(fresh, storage)
                    inner.append(math.log(1 - sum(a * b for a, b in zip(p, fresh, strict=True))))
            term = super().loss(step)
            terms.append((term.item(), sum(inner) / len(inner)))
            return term

    model = Sequences()
    model.shape = shape
    elr = Compared(storage=storage, dim=dim)
    plain_trainer(max_epochs=3, callbacks=[elr]).fit(model, rows(24, 4, shuffle=True))
    assert len(terms) == 18
    assert all(term == pytest.approx(hand, abs=1e-4) for term, hand in terms)
    assert torch.allclose(elr.memory.rows, torch.tensor(memory), atol=1e-3)


def test_agreement_is_logged_on_the_steps_that_log(plain_trainer):
    """After one visit t = 0.3 p; the labels are those that the targets point at, but for six."""
    logger = Logged()
    agreements: list[float] = []

    class Watched(aux.EarlyLearningRegularization):
        def loss(self, step: aux.Step) -> Tensor:
            term = super().loss(step)
            p = step.logits.detach().double().softmax(1)
            agreements.append(float(0.3 * (p * p).sum(1).mean()))
            return term

    torch.manual_seed(1)
    model, data = Classifier(), Rows(24)
    data.y = model(data.x).argmax(1)
    data.y[:6] = (data.y[:6] + 1) % CLASSES
    elr = Watched(weight=0.0, name="elr")
    trainer = plain_trainer(callbacks=[elr], logger=logger, log_every_n_steps=2)
    model.lr = 0.0
    trainer.fit(model, DataLoader(data, batch_size=4))
    logged = [each for each in logger.rows if "aux/elr/agreement" in each]
    assert [each["aux/elr/agreement"] for each in logged] == pytest.approx(agreements[1::2])
    assert [each["aux/elr/label_agreement"] for each in logged] == [0.5, 1.0, 1.0]


def test_without_labels_only_the_agreement_is_logged(plain_trainer):
    class Unlabelled(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch).square().mean()

    logger = Logged()
    data = DataLoader([each[0] for each in Rows(8)], batch_size=4)  # type: ignore[arg-type]
    elr = aux.EarlyLearningRegularization(name="elr")
    plain_trainer(callbacks=[elr], logger=logger, log_every_n_steps=1).fit(Unlabelled(), data)
    assert all("aux/elr/agreement" in each for each in logger.rows)
    assert not any("aux/elr/label_agreement" in each for each in logger.rows)


class Doubled(Classifier):
    """Two entries for each sample."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).repeat(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1].repeat(2))


@pytest.mark.parametrize(
    ("model", "dim", "message"),
    [
        (Doubled, -1, r"shape \(8, 3\) .* do not fit a batch of 4 samples"),
        (Classifier, 2, r"shape \(4, 3\) with the classes in dim=2 do not fit"),
    ],
)
def test_logits_that_do_not_fit_the_samples_are_a_named_error(model, dim, message, plain_trainer):
    elr = aux.EarlyLearningRegularization(dim=dim)
    with pytest.raises(aux.AuxiliaryError, match=message):
        plain_trainer(callbacks=[elr]).fit(model(), rows())


def test_classes_in_the_dimension_of_samples_are_refused():
    with pytest.raises(aux.AuxiliaryError, match="dim=0 counts samples"):
        aux.EarlyLearningRegularization(dim=0)


def test_a_memory_of_another_dataset_is_a_named_error(plain_trainer, tmp_path):
    trainer = plain_trainer(callbacks=[aux.EarlyLearningRegularization()])
    trainer.fit(Classifier(), rows(24))
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    resumed = plain_trainer(max_epochs=2, callbacks=[aux.EarlyLearningRegularization()])
    with pytest.raises(aux.AuxiliaryError, match=r"has \(24, 3\) rows and columns.*\(20, 3\)"):
        resumed.fit(Classifier(), rows(20), ckpt_path=tmp_path / "first.ckpt")
