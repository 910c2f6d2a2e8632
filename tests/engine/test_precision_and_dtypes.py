"""Autocast and batches of integers: the teacher's pass uses the teacher's weights, in any dtype."""

from __future__ import annotations

from typing import Any

import pytest
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


class OwnAutocast(Fast):
    """Opens an autocast region of its own, with the cache that autocast has by default."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_an_autocast_region_in_the_users_forward_keeps_no_cast_for_the_teacher(
    precision, plain_trainer
):
    """Inside Lightning's region the user's cache outlives the user's region."""
    model = OwnAutocast()
    initial, average = OwnAutocast(), OwnAutocast()
    initial.load_state_dict(model.state_dict())
    ema = aux.EMATeacher(decay=0.5)

    def look(step: aux.Step) -> float:
        taught, averaged = step.teacher("frozen").logits, step.teacher("ema").logits
        torch.clear_autocast_cache()
        average.load_state_dict(ema.store.state_dict())
        with torch.no_grad():
            assert torch.equal(taught, initial(step.batch[0]))
            torch.clear_autocast_cache()
            assert torch.equal(averaged, average(step.batch[0]))
        return float((taught - step.logits.detach()).abs().max())

    probe = Blind(look)
    plain_trainer(precision=precision, callbacks=[probe, aux.FrozenTeacher(), ema]).fit(
        model, rows()
    )
    assert probe.seen[0] == 0.0
    assert min(probe.seen[1:]) > 0.1


@pytest.mark.parametrize("kind", [Fast, OwnAutocast])
def test_a_region_around_the_whole_manual_step_keeps_no_cast_for_the_teacher(kind, plain_trainer):
    """Here the student's casts are cached while the teacher runs."""

    class Manual(kind):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                after.append(self(batch[0]).requires_grad)
            optimizer.step()

    after: list[bool] = []
    model, initial = Manual(), kind()
    initial.load_state_dict(model.state_dict())

    def look(step: aux.Step) -> bool:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return torch.equal(step.teacher("frozen").logits, initial(step.batch[0]))

    probe = Blind(look)
    plain_trainer(callbacks=[probe, aux.FrozenTeacher()]).fit(model, rows())
    assert probe.seen == [True] * 6
    assert after == [True] * 6


def test_what_the_student_computes_after_a_teachers_pass_has_the_students_gradient(plain_trainer):
    """A second forward in the same step must find none of the teacher's casts, which have none."""

    class Twice(OwnAutocast):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(x), y))
            self.manual_backward(F.cross_entropy(self(x.flip(0)), y.flip(0)))
            gradients.append(self.classifier.weight.grad.clone())
            optimizer.step()

    results = []
    for callbacks in ([], [Blind(lambda step: step.teacher("frozen").logits), aux.FrozenTeacher()]):
        gradients: list[Tensor] = []
        torch.manual_seed(2)
        plain_trainer(precision="bf16-mixed", callbacks=callbacks).fit(Twice(), rows())
        results.append(gradients)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


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
