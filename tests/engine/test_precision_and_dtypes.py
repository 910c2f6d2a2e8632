"""Autocast and batches of integers: the teacher's pass uses the teacher's weights, in any dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_aux as aux
from tests.engine.small_models import Blind, Classifier, Probe, equal, rows, weights


class Fast(Classifier):
    """Learns in large steps, so that a teacher's weights are soon far from the student's."""

    def __init__(self) -> None:
        super().__init__(lr=0.5)


def test_under_autocast_the_teacher_runs_with_its_own_weights(plain_trainer):
    """Autocast keeps the casts of parameters; the student's must not serve the teacher."""
    model = Fast()
    initial = Fast()
    initial.load_state_dict(model.state_dict())

    def look(step: aux.Step) -> float:
        student = step.logits.detach()  # the student's casts are in the cache by now
        taught = step.teacher("frozen").logits
        assert taught.dtype == torch.bfloat16  # autocast was on in the teacher's pass
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), torch.no_grad():
            assert torch.equal(taught, initial(step.batch[0]))
        return float((student - taught).abs().max())

    probe = Blind(look)
    trainer = plain_trainer(precision="bf16-mixed", callbacks=[probe, aux.FrozenTeacher()])
    trainer.fit(model, rows())
    assert probe.seen[0] == 0.0
    assert min(probe.seen[1:]) > 0.1


def test_under_autocast_the_students_backward_is_untouched_by_the_teachers_pass(plain_trainer):
    results = []
    for callbacks in ([], [Blind(lambda step: step.teacher("frozen").logits), aux.FrozenTeacher()]):
        torch.manual_seed(2)
        model = Fast()
        plain_trainer(max_epochs=2, precision="bf16-mixed", callbacks=callbacks).fit(model, rows())
        results.append(weights(model))
    assert equal(*results)


def test_the_steps_index_and_teacher_work_with_integer_inputs(plain_trainer):
    class Tokens(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Embedding(10, 8), nn.Flatten(), nn.Linear(40, 8))

        def forward(self, tokens: Tensor) -> Tensor:
            return self.classifier(self.encoder(tokens))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch["tokens"]), batch["labels"])

    tokens = torch.randint(10, (12, 5))
    labels = torch.arange(12) % 3

    def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        given, truth = zip(*samples, strict=True)
        return {"tokens": torch.stack(given), "labels": torch.stack(truth)}

    loader = DataLoader(
        TensorDataset(tokens, labels), batch_size=4, shuffle=True, collate_fn=collate
    )
    probe = Probe(
        lambda step: (
            torch.equal(tokens[step.index], step.input()),
            torch.equal(labels[step.index], step.target),
        )
    )
    callbacks = [
        probe,
        aux.EMATeacher(decay=0.5),
        aux.SelfDistillation(only_correct=True),
        aux.EarlyLearningRegularization(),
    ]
    plain_trainer(max_epochs=2, callbacks=callbacks).fit(Tokens(), loader)
    assert probe.seen == [(True, True)] * 6
