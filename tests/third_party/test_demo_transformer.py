"""Lightning's own demo Transformer, unmodified: two inputs, and log-probabilities come out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.demos.transformer import LightningTransformer
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_aux as aux

WORDS = 12


def loader() -> DataLoader[Any]:
    """Sequences to be repeated with a shift, in memory: the demo's own data set is a download."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(WORDS, (16, 7), generator=generator)
    return DataLoader(TensorDataset(text[:, :-1], text[:, 1:]), batch_size=4)


@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo downloads its own data set in ``prepare_data``, whatever loader it is given."""
    monkeypatch.setattr("lightning.pytorch.demos.transformer.WikiText2", lambda **_: None)


class Recorded(aux.SelfDistillation):
    """Keeps its term and the same number computed from the words of the model, by hand."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(name="self_distillation", **arguments)
        self.pairs_seen: list[tuple[float, float]] = []

    def loss(self, step: aux.Step) -> torch.Tensor:
        term = super().loss(step)
        student, taught = step.logits.detach().double(), step.teacher(self.teacher).logits.double()
        # The demo returns log-probabilities, and softmax undoes the logarithm.
        by_hand = (taught.exp() * (taught - student)).sum(-1).mean()
        self.pairs_seen.append((term.item(), by_hand.item()))
        return term


def trained(plain_trainer: Any, callbacks: list[Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = LightningTransformer(vocab_size=WORDS)
    plain_trainer(max_epochs=2, callbacks=callbacks).fit(model, loader())
    return model.state_dict()


def test_it_distils_its_own_average(plain_trainer):
    objective = Recorded(weight=2.0)
    attached = trained(plain_trainer, [aux.EMATeacher(decay=0.5), objective])
    plain = trained(plain_trainer, [])
    assert list(attached) == list(plain)
    assert len(objective.pairs_seen) == 8
    # In the first step teacher and student differ by the student's dropout alone.
    for term, by_hand in objective.pairs_seen:
        assert term == pytest.approx(by_hand, rel=1e-3, abs=1e-6)
    assert not all(torch.equal(attached[name], plain[name]) for name in plain)


def test_it_is_pulled_towards_its_own_average(plain_trainer):
    """A strong pull in weight space keeps it closer to its average than no pull does."""

    def distance(weight: float) -> float:
        anchor = aux.EMAAnchor("weight", weight=weight, decay=0.9)
        trained(plain_trainer, [anchor])
        live, average = anchor.own_teacher.pairs()
        return sum(
            F.mse_loss(a, b, reduction="sum").item() for a, b in zip(live, average, strict=True)
        )

    assert distance(1.0) < 0.8 * distance(0.0)


def test_a_layer_inside_it_is_distilled_by_its_path(plain_trainer):
    """Also where torch has a fast path for evaluation, which calls none of the inner layers."""
    terms: list[tuple[int, float]] = []

    class Kept(aux.SelfDistillation):
        def loss(self, step: aux.Step) -> torch.Tensor:
            term = super().loss(step)
            terms.append((len(step.features(self.on)), term.item()))
            return term

    objective = Kept(on="model.transformer.encoder.layers.?.linear1", divergence="mse")
    trained(plain_trainer, [aux.EMATeacher(decay=0.5), objective])
    assert len(terms) == 8
    assert {count for count, _ in terms} == {2}
    assert min(term for _, term in terms) > 0


def test_its_dropout_is_driven(plain_trainer):
    driven = trained(plain_trainer, [aux.DropoutSchedule(0.4, until="50%")])
    plain = trained(plain_trainer, [])
    assert not all(torch.equal(driven[name], plain[name]) for name in plain)
    with pytest.raises(aux.AuxiliaryError, match="no module matching 'decoder'"):
        trained(plain_trainer, [aux.DropoutSchedule(0.4, until="50%", modules="decoder")])
