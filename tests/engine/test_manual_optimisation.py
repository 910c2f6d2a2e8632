"""Manual optimisation: which backward a term joins, what counts as a step, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lightning_aux as aux
from tests.engine.small_models import (
    Blind,
    Classifier,
    Shrink,
    equal,
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
    """A generator and a critic with an optimizer each, in this order; the critic steps first.

    Args:
        toggles: Whether the step says by `toggle_optimizer` whose turn it is.
        by_hand: For each of the two, the factor of a term in its own loss: the mean square of what
            the generator makes.
        rests: Whether the generator trains with every third batch only.
    """

    def __init__(
        self, toggles: bool = True, by_hand: tuple[float, float] = (0.0, 0.0), rests: bool = False
    ) -> None:
        super().__init__()
        self.critic = nn.Linear(3, 1)
        self.automatic_optimization = False
        self.toggles, self.by_hand, self.rests = toggles, by_hand, rests

    def turn(self, place: int, loss: Callable[[], Tensor]) -> None:
        optimizer = self.optimizers()[place]
        if self.toggles:
            self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss())
        optimizer.step()
        if self.toggles:
            self.untoggle_optimizer(optimizer)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.x = batch[0]
        self.turn(1, self.critic_loss)
        if not self.rests or batch_idx % 3 == 0:
            self.turn(0, self.generator_loss)

    def critic_loss(self) -> Tensor:
        fake = self(self.x)
        loss = F.softplus(-self.critic(torch.ones_like(fake))).mean()
        loss = loss + F.softplus(self.critic(fake)).mean()
        return loss + self.by_hand[1] * self.critic.weight.square().sum()

    def generator_loss(self) -> Tensor:
        fake = self(self.x)
        return F.softplus(-self.critic(fake)).mean() + self.by_hand[0] * fake.square().mean()

    def configure_optimizers(self) -> Any:
        body = [*self.encoder.parameters(), *self.classifier.parameters()]
        return [torch.optim.SGD(body, lr=0.05), torch.optim.SGD(self.critic.parameters(), lr=0.05)]


class Critical(aux.Objective):
    """A term for the critic: the square of its weights."""

    def loss(self, step: aux.Step) -> Tensor:
        return step.module.critic.weight.square().sum()


def adversaries(plain_trainer: Any, *callbacks: Any, **model: Any) -> Adversaries:
    torch.manual_seed(5)
    module = Adversaries(**model)
    plain_trainer(callbacks=list(callbacks)).fit(module, rows())
    return module


@pytest.mark.parametrize("rests", [False, True])
def test_with_two_optimizers_each_term_joins_the_backward_of_its_own(rests, plain_trainer):
    """As if both terms were written into the loss of the network that they belong to."""
    by_hand = adversaries(plain_trainer, by_hand=(0.3, 0.2), rests=rests)
    plain = adversaries(plain_trainer, rests=rests)
    terms = Shrink(0.3, optimizer=0), Critical(0.2, optimizer=1)
    attached = adversaries(plain_trainer, *terms, rests=rests)
    assert largest_difference(weights(attached), weights(by_hand)) < 1e-6
    assert largest_difference(weights(attached), weights(plain)) > 1e-3


def test_without_toggles_the_backward_is_named_by_its_number(plain_trainer):
    by_hand = adversaries(plain_trainer, by_hand=(0.3, 0.2), toggles=False)
    terms = Shrink(0.3, optimizer=0, backward=1), Critical(0.2, optimizer=1, backward=0)
    attached = adversaries(plain_trainer, *terms, toggles=False)
    assert largest_difference(weights(attached), weights(by_hand)) < 1e-6


def test_two_optimizers_that_are_not_told_apart_are_a_named_error(plain_trainer):
    with pytest.raises(aux.AuxiliaryError, match=r"shrink: Adversaries has 2 optimizers, .*toggle"):
        adversaries(plain_trainer, Shrink(), toggles=False)


def test_an_optimizer_that_does_not_exist_is_a_named_error_before_training(plain_trainer):
    class Never(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError("trained")

    for callback in (Shrink(optimizer=1), aux.EMATeacher(optimizer=1)):
        with pytest.raises(
            aux.AuxiliaryError, match=f"{callback.name}: optimizer=1 does not exist"
        ):
            plain_trainer(callbacks=[callback]).fit(Never(), rows())


def test_clocks_teachers_and_memories_count_the_steps_of_their_own_optimizer(plain_trainer):
    """The generator steps with batches 0 and 3, the critic with all six."""
    seen: dict[str, list[int]] = {"own": [], "other": []}
    acted: dict[str, list[int]] = {"own": [], "other": []}

    def look(name: str) -> Callable[[aux.Step], None]:
        def note(step: aux.Step) -> None:
            seen[name].append(step.progress.steps)
            step.after_optimizer_step(lambda: acted[name].append(step.batch_idx))

        return note

    own = Blind(look("own"), name="own", optimizer=0)
    other = Blind(look("other"), name="other", optimizer=1)
    anchor, slow = aux.EMAAnchor(weight=0.1, optimizer=1), aux.EMATeacher(name="slow")
    distils = aux.SelfDistillation("fast", optimizer=1)
    fast = aux.EMATeacher(name="fast")
    model = adversaries(plain_trainer, own, other, anchor, slow, fast, distils, rests=True)
    assert seen == {"own": [0, 1], "other": [0, 1, 2, 3, 4, 5]}
    assert acted == {"own": [0, 3], "other": [0, 1, 2, 3, 4, 5]}
    assert anchor.own_teacher.updates == 6
    assert (slow.updates, fast.updates) == (2, 6)
    assert model.trainer.global_step == 8


def test_objectives_of_two_optimizers_cannot_share_a_teacher_unless_it_says_whose_it_is(
    plain_trainer,
):
    one, other = aux.SelfDistillation(optimizer=0), aux.EMAAnchor(teacher="ema", optimizer=1)
    with pytest.raises(
        aux.AuxiliaryError, match=r"ema: .* belongs to optimizer .*optimizer=\.\.\."
    ):
        adversaries(plain_trainer, aux.EMATeacher(), one, other)
    teacher = aux.EMATeacher(optimizer=1)
    one, other = aux.SelfDistillation(optimizer=0), aux.EMAAnchor(teacher="ema", optimizer=1)
    adversaries(plain_trainer, teacher, one, other, rests=True)
    assert teacher.updates == 6


def test_a_head_trains_with_the_optimizer_of_its_objective(plain_trainer):
    class Headed(aux.Objective):
        def build_head(self, module: nn.Module) -> nn.Module:
            return nn.Linear(8, 3)

        def loss(self, step: aux.Step) -> Tensor:
            return self.head(step.features("encoder")).square().mean()

    held: list[list[int]] = []

    class Looking(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            held.append([len(each.param_groups[0]["params"]) for each in trainer.optimizers])

    objective = Headed(optimizer=1, reads="encoder")
    adversaries(plain_trainer, objective, Looking())
    assert held == [[4, 4]] * 6


def test_a_generator_resumes_exactly_with_its_clocks(plain_trainer, tmp_path):
    def run(epochs: int, **fit: Any) -> Any:
        torch.manual_seed(5)
        model = Adversaries(rests=True)
        terms = [
            aux.EMAAnchor(weight=0.3, decay=0.5),
            Critical("linear(0, 1, until=9)", optimizer=1),
        ]
        trainer = plain_trainer(callbacks=terms, max_epochs=epochs)
        trainer.fit(model, rows(), **fit)
        return trainer, weights(model)

    _, whole = run(2)
    trainer, _ = run(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    entry = torch.load(tmp_path / "one.ckpt", weights_only=True)["lightning_aux"]
    assert entry["steps"] == [2, 6]
    _, resumed = run(2, ckpt_path=tmp_path / "one.ckpt")
    assert equal(whole, resumed)


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
    assert len(snapshots) == 6
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


class Checkpointed(Classifier):
    """Two backwards; the second forward may be checkpointed, and is then run in backward again."""

    def __init__(self, checkpointed: bool, by_hand: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.checkpointed, self.by_hand = checkpointed, by_hand

    def forward(self, x: Tensor) -> Any:
        h = self.encoder[0](x)
        if self.checkpointed:
            h = checkpoint(self.encoder[1], h, use_reentrant=False)
        else:
            h = self.encoder[1](h)
        return self.classifier(h)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(x[::2]), y[::2]))
        loss = F.cross_entropy(self(x[1::2]), y[1::2])
        if self.by_hand:
            loss = loss + self.encoder[:2](x[1::2]).square().mean()
        self.manual_backward(loss)
        optimizer.step()


class Feature(aux.Objective):
    def loss(self, step: aux.Step) -> Tensor:
        return step.features("encoder.1").square().mean()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_forward_that_backward_runs_again_is_no_call_of_the_step(checkpointed, plain_trainer):
    results = []
    for model, added in (
        (Checkpointed(checkpointed, by_hand=True), []),
        (Checkpointed(checkpointed), [Feature(reads="encoder.1", backward=1)]),
    ):
        torch.manual_seed(0)
        for each in (model.encoder[0], model.classifier):
            each.reset_parameters()
        plain_trainer(callbacks=added).fit(model, rows())
        results.append(weights(model))
    assert largest_difference(*results) < 1e-6


class Wrapping(torch.optim.SGD):
    """Has an optimizer of its own, as wrappers that look ahead have."""

    def __init__(self, params: Any, **arguments: Any) -> None:
        super().__init__(params, **arguments)
        self.optimizer = torch.optim.SGD(self.param_groups[0]["params"], **arguments)


def test_an_optimizer_that_holds_another_one_is_itself_the_users(plain_trainer):
    """Virtual steps are taken with it, and what waits for a step waits for its."""
    held = []
    for kind in (torch.optim.SGD, Wrapping):

        class Model(Classifier):
            make = kind

            def configure_optimizers(self) -> Any:
                return self.make(self.parameters(), lr=0.1)

        torch.manual_seed(0)
        teacher = aux.EMATeacher(0.5, lookahead=2)
        plain_trainer(callbacks=[teacher, aux.SelfDistillation()]).fit(Model(), rows())
        held.append(teacher.state()["weights"])
    assert equal(*held)
