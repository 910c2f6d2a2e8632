"""A Hugging Face classifier made from a config, in a ten-line module, with batches of dicts."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_aux as aux
from tests.engine.small_models import Probe, equal, weights

transformers = pytest.importorskip("transformers")


class Bert(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        config = transformers.BertConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=12, num_labels=3,
        )  # fmt: skip
        self.net = transformers.BertForSequenceClassification(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.net(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(30, (16, 8), generator=generator)
    mask = (torch.arange(8) < torch.randint(3, 9, (16, 1), generator=generator)).long()
    labels = torch.randint(3, (16,), generator=generator)
    return [
        {"input_ids": t, "attention_mask": m, "labels": y}
        for t, m, y in zip(tokens, mask, labels, strict=True)
    ]


def trained(plain_trainer: Any, callbacks: list[Any], epochs: int = 2) -> Bert:
    torch.manual_seed(4)
    model = Bert()
    loader = DataLoader(samples(), batch_size=4, shuffle=True)
    plain_trainer(max_epochs=epochs, callbacks=callbacks).fit(model, loader)
    return model


def test_all_objectives_together_find_their_way_without_a_tap(plain_trainer):
    truth = samples()

    def look(step: aux.Step) -> None:
        own = [truth[i] for i in step.index.tolist()]
        assert torch.equal(step.target, torch.stack([each["labels"] for each in own]))
        assert torch.equal(
            step.batch["input_ids"], torch.stack([each["input_ids"] for each in own])
        )
        assert step.logits.shape == (4, 3)
        assert torch.equal(step.logits, step.returned.logits)
        hidden = step.features("net.bert.encoder.layer.?")
        assert list(hidden) == ["net.bert.encoder.layer.0", "net.bert.encoder.layer.1"]

    probe = Probe(look, reads=("net.bert.encoder.layer.?",))
    elr = aux.EarlyLearningRegularization(weight=1.0)
    callbacks = [
        probe,
        aux.EMATeacher(decay=0.9),
        aux.SelfDistillation(only_correct=True),
        aux.SelfDistillation(on="net.bert.pooler", divergence="cosine", name="pooled"),
        aux.SelfDistillation(on="net.bert.encoder.layer.?", divergence="mse", name="hidden"),
        aux.EMAAnchor(weight=0.5),
        aux.EMAAnchor("weight", weight=0.1, name="weights"),
        elr,
        aux.DropoutSchedule(0.3, until="50%"),
    ]
    attached = trained(plain_trainer, callbacks)
    plain = trained(plain_trainer, [])
    assert len(probe.seen) == 8
    assert torch.allclose(elr.memory.rows.sum(1), torch.full((16,), 1 - 0.7**2), atol=1e-5)
    assert list(attached.state_dict()) == list(plain.state_dict())
    assert not equal(weights(attached), weights(plain))


def test_the_teachers_logits_are_those_of_a_copy_with_its_weights(plain_trainer):
    torch.manual_seed(4)
    reference = Bert().eval()

    def look(step: aux.Step) -> None:
        with torch.no_grad():
            expected = reference.net(**step.batch).logits
        torch.testing.assert_close(step.teacher("frozen").logits, expected)

    probe = Probe(look)
    model = trained(plain_trainer, [aux.FrozenTeacher(), probe])
    assert len(probe.seen) == 8
    assert not equal(weights(model), weights(reference))


def test_the_binding_is_said_in_the_log(plain_trainer, caplog):
    with caplog.at_level("INFO"):
        trained(
            plain_trainer, [aux.EMATeacher(), aux.SelfDistillation(only_correct=True)], epochs=1
        )
    said = {each.message for each in caplog.records}
    assert "lightning_aux: logits = Bert.net(...)['logits']" in said
    assert "lightning_aux: target = batch['labels']" in said
