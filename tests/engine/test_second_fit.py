"""Fitting again: the same Trainer and module go on, another module or Trainer starts fresh."""

from __future__ import annotations

import torch

import lightning_aux as aux
from tests.engine.small_models import Blind, Classifier, equal, rows, weights


def teacher_state(teacher: aux.EMATeacher) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in teacher.store.state_dict().items()}


def test_a_second_fit_of_the_same_trainer_and_module_goes_on(plain_trainer):
    """Two epochs and two more are four. Lightning makes a new optimizer: this one has no state."""

    class Plain(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    torch.manual_seed(4)
    whole, kept = Plain(), aux.EMATeacher(decay=0.8, warmup=True)
    plain_trainer(max_epochs=4, callbacks=[kept, aux.SelfDistillation()]).fit(whole, rows())

    torch.manual_seed(4)
    model, teacher = Plain(), aux.EMATeacher(decay=0.8, warmup=True)
    steps = Blind(lambda step: step.progress.steps, name="steps")
    trainer = plain_trainer(max_epochs=2, callbacks=[teacher, aux.SelfDistillation(), steps])
    trainer.fit(model, rows())
    assert teacher.updates == 12
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, rows())
    assert teacher.updates == kept.updates == 24
    assert steps.seen == list(range(24))
    assert equal(teacher_state(teacher), teacher_state(kept))
    assert equal(weights(model), weights(whole))


def test_a_memory_per_sample_goes_on_too(plain_trainer):
    elr = aux.EarlyLearningRegularization()
    trainer, model = plain_trainer(callbacks=[elr]), Classifier()
    trainer.fit(model, rows())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, rows())
    # Two visits: t sums to (1 − β)(1 + β) = 1 − β².
    assert torch.allclose(elr.memory.rows.sum(1), torch.full((24,), 1 - 0.7**2), atol=1e-5)


def test_the_same_callbacks_start_fresh_for_another_module(plain_trainer):
    teacher, elr = aux.EMATeacher(decay=0.8), aux.EarlyLearningRegularization()
    trainer = plain_trainer(max_epochs=1, callbacks=[teacher, elr])
    trainer.fit(Classifier(), rows())
    other = Classifier()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(other, rows(20))  # another dataset size: an old memory would not fit it
    assert teacher.updates == 5
    assert elr.memory.rows.shape == (20, 3)
    assert torch.allclose(elr.memory.rows.sum(1), torch.full((20,), 0.3), atol=1e-5)


def test_the_same_callbacks_start_fresh_in_another_trainer(plain_trainer):
    model, teacher = Classifier(), aux.EMATeacher(decay=0.8)
    plain_trainer(callbacks=[teacher]).fit(model, rows())
    first = weights(model)
    plain_trainer(max_steps=1, callbacks=[teacher]).fit(model, rows())
    assert teacher.updates == 1
    expected = {name: 0.8 * first[name] + 0.2 * value for name, value in weights(model).items()}
    for name, value in teacher_state(teacher).items():
        assert torch.allclose(value, expected[name], atol=1e-6)


def test_validating_between_two_fits_leaves_the_teacher_alone(plain_trainer):
    class Validated(Classifier):
        def validation_step(self, batch, batch_idx):
            self(batch[0])

    teacher = aux.EMATeacher(decay=0.8)
    trainer, model = plain_trainer(callbacks=[teacher]), Validated()
    trainer.fit(model, rows())
    before = teacher_state(teacher)
    trainer.validate(model, rows(), verbose=False)
    assert equal(before, teacher_state(teacher))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, rows())
    assert teacher.updates == 12
