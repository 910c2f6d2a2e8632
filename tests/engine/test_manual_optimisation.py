"""Manual optimisation: which backward a term joins, what counts as a step, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_aux as aux
from tests.engine.small_models import (
    Blind,
    Classifier,
    Shrink,
    largest_difference,
    rows,
    weights,
)


class TwoBackwards(Classifier):
    """Two losses in two backward calls, one optimizer step; ``extra`` is the term by hand."""

    def __init__(self, extra: tuple[float, float] = (0.0, 0.0)) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.extra = extra

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        logits = self(x)
        term = logits.square().mean()
        loss = F.cross_entropy(logits, y)
        self.manual_backward(loss + self.extra[0] * term, retain_graph=True)
        second = self.encoder(x).square().mean()
        self.manual_backward(second + self.extra[1] * term)
        optimizer.step()


@pytest.mark.parametrize("backward", [0, 1])
def test_the_term_joins_the_backward_that_is_named(backward, plain_trainer):
    results = []
    by_hand = (0.0, 0.3) if backward else (0.3, 0.0)
    for extra, callbacks in ((by_hand, []), ((0.0, 0.0), [Shrink(0.3, backward=backward)])):
        torch.manual_seed(5)
        model = TwoBackwards(extra)
        plain_trainer(callbacks=callbacks).fit(model, rows())
        results.append(weights(model))
    assert largest_difference(*results) < 1e-6


def test_each_term_sees_the_loss_of_the_backward_that_it_joins(plain_trainer):
    model = TwoBackwards()
    losses: list[float] = []
    original = model.manual_backward

    def noting(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        losses.append(loss.item())
        original(loss, *args, **kwargs)

    model.manual_backward = noting  # ours comes around the user's own wrapper
    probes = [
        Blind(lambda step: step.loss.item(), name="first"),
        Blind(lambda step: step.loss.item(), name="second", backward=1),
    ]
    plain_trainer(callbacks=probes).fit(model, rows())
    assert probes[0].seen == losses[0::2]
    assert probes[1].seen == losses[1::2]


def test_a_teacher_and_the_term_run_once_when_there_are_two_backwards(plain_trainer):
    model = TwoBackwards()
    calls = {True: 0, False: 0}
    model.classifier.register_forward_hook(
        lambda module, *_: calls.__setitem__(module.training, calls[module.training] + 1)
    )
    probe = Blind(lambda step: step.teacher("ema").logits)
    plain_trainer(callbacks=[aux.EMATeacher(), probe, aux.SelfDistillation()]).fit(model, rows())
    assert calls == {True: 6, False: 6}


class Adversaries(Classifier):
    """A generator and a discriminator with an optimizer each; the second steps twice as often."""

    def __init__(self, by_hand: float = 0.0) -> None:
        super().__init__()
        self.critic = nn.Linear(3, 1)
        self.automatic_optimization = False
        self.by_hand = by_hand

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, _ = batch
        generator, critic = self.optimizers()
        fake = self(x)
        generator.zero_grad()
        term = self.by_hand * fake.square().mean() if self.by_hand else 0.0
        self.manual_backward(F.softplus(-self.critic(fake)).mean() + term)
        generator.step()
        for _ in range(2):
            critic.zero_grad()
            real = self.critic(torch.ones_like(fake))
            loss = F.softplus(-real).mean() + F.softplus(self.critic(fake.detach())).mean()
            self.manual_backward(loss)
            critic.step()

    def configure_optimizers(self) -> Any:
        body = [*self.encoder.parameters(), *self.classifier.parameters()]
        return [torch.optim.SGD(body, lr=0.05), torch.optim.SGD(self.critic.parameters(), lr=0.05)]


def test_two_optimizers_train_as_by_hand(plain_trainer):
    results = []
    for by_hand, callbacks in ((0.3, []), (0.0, [Shrink(0.3)])):
        torch.manual_seed(5)
        model = Adversaries(by_hand)
        plain_trainer(callbacks=callbacks).fit(model, rows())
        results.append(weights(model))
    assert largest_difference(*results) < 1e-6


def test_the_clock_counts_the_steps_of_the_first_optimizer(plain_trainer):
    probe = Blind(lambda step: step.progress.steps)
    teacher = aux.EMATeacher(decay=0.5)
    plain_trainer(callbacks=[probe, teacher]).fit(Adversaries(), rows())
    assert probe.seen == [0, 1, 2, 3, 4, 5]
    assert teacher.updates == 6


def test_the_weights_of_the_second_optimizer_are_averaged_too(plain_trainer):
    """The teacher moves after the first optimizer's step and takes the critic as it is then."""
    snapshots: list[dict[str, Tensor]] = []

    class Noting(Adversaries):
        def configure_optimizers(self) -> Any:
            generator, critic = super().configure_optimizers()
            generator.register_step_post_hook(lambda *_: snapshots.append(weights(self)))
            return [generator, critic]

    model = Noting()
    average = {name: value.double() for name, value in weights(model).items()}
    teacher = aux.EMATeacher(decay=0.5)
    plain_trainer(callbacks=[teacher]).fit(model, rows())
    for snapshot in snapshots:
        average = {name: 0.5 * average[name] + 0.5 * snapshot[name] for name in average}
    assert largest_difference(teacher.store.state_dict(), average) < 1e-6


class Accumulating(Classifier):
    """Steps its optimizer after every third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]) / 3)
        if batch_idx % 3 == 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


def test_accumulation_by_hand_moves_teachers_with_the_optimizer(plain_trainer):
    probe = Blind(lambda step: step.progress.steps)
    teacher = aux.EMATeacher()
    plain_trainer(callbacks=[probe, teacher]).fit(Accumulating(), rows())
    assert probe.seen == [0, 0, 0, 1, 1, 1]
    assert teacher.updates == 2


class Bare(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        F.cross_entropy(self(batch[0]), batch[1]).backward()
        optimizer.step()


def test_a_bare_backward_is_a_named_error_and_not_a_missing_term(plain_trainer):
    with pytest.raises(aux.AuxiliaryError, match=r"self\.manual_backward\(loss\) instead of loss"):
        plain_trainer(callbacks=[Shrink()]).fit(Bare(), rows())


def test_a_bare_backward_is_no_concern_of_a_teacher_alone(plain_trainer):
    teacher = aux.EMATeacher()
    plain_trainer(callbacks=[teacher]).fit(Bare(), rows())
    assert teacher.updates == 6


def test_a_backward_that_the_step_never_reaches_is_a_named_error(plain_trainer):
    with pytest.raises(aux.AuxiliaryError, match=r"after 2 call\(s\).*shrink joins call number 2"):
        plain_trainer(callbacks=[Shrink(backward=2)]).fit(TwoBackwards(), rows())


def test_a_numbered_backward_in_automatic_optimisation_is_refused(plain_trainer):
    with pytest.raises(aux.AuxiliaryError, match="backward=1 needs manual optimisation"):
        plain_trainer(callbacks=[Shrink(backward=1)]).fit(Classifier(), rows())


def test_the_output_of_the_step_does_not_exist_yet(plain_trainer):
    with pytest.raises(aux.AuxiliaryError, match=r"step\.output does not exist yet"):
        plain_trainer(callbacks=[Blind(lambda step: step.output)]).fit(TwoBackwards(), rows())
