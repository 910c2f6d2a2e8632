"""The user's module may be copied while it trains, and a teacher's pass is not seen by the user."""

from __future__ import annotations

import copy
import io
import random
from typing import Any

import lightning as L
import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

import lightning_aux as aux
from tests.engine.small_models import (
    CLASSES,
    WIDTH,
    Blind,
    Classifier,
    equal,
    rows,
    weights,
)


def distilled(**arguments: Any) -> list[Any]:
    return [aux.EMATeacher(decay=0.5), aux.SelfDistillation(weight=2.0, **arguments)]


# --------------------------------------------------------------------------- copies of the module
class Snapshot(L.Callback):
    """The user's own average, as people write it: a deep copy of the module in training."""

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.copy = copy.deepcopy(module)


@pytest.mark.parametrize("first", [True, False], ids=["ours-last", "ours-first"])
def test_a_deep_copy_made_in_training_computes_with_its_own_weights(first, plain_trainer):
    snapshot = Snapshot()
    callbacks = [snapshot, *distilled()] if first else [*distilled(), snapshot]
    plain_trainer(callbacks=callbacks).fit(Classifier(), rows())
    with torch.no_grad():
        for parameter in snapshot.copy.parameters():
            parameter.zero_()
    assert torch.equal(snapshot.copy(torch.ones(2, WIDTH)), torch.zeros(2, CLASSES))


def test_a_deep_copy_made_in_training_can_be_trained_by_itself(plain_trainer):
    snapshot = Snapshot()
    model = Classifier()
    plain_trainer(callbacks=[*distilled(), snapshot]).fit(model, rows())
    before, original = weights(snapshot.copy), weights(model)
    plain_trainer(callbacks=distilled()).fit(snapshot.copy, rows())
    assert not equal(before, weights(snapshot.copy))
    assert equal(original, weights(model))


class Saving(L.Callback):
    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        buffer = io.BytesIO()
        torch.save(module, buffer)
        self.saved = buffer.getvalue()


def test_the_module_can_be_pickled_in_training(plain_trainer):
    saving, model = Saving(), Classifier()
    plain_trainer(callbacks=[*distilled(), saving]).fit(model, rows())
    loaded = torch.load(io.BytesIO(saving.saved), weights_only=False)
    x = torch.randn(2, WIDTH)
    assert torch.equal(loaded(x), model(x))
    with torch.no_grad():
        loaded.classifier.bias += 1
    assert torch.allclose(loaded(x), model(x) + 1)


# ------------------------------------------------------------------------------ the teacher's pass
class Counting(Classifier):
    """Logs and updates a metric in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def forward(self, x: Tensor) -> Tensor:
        mode = 1.0 if self.training else 100.0
        self.mean.update(mode)
        self.log("mode", mode, on_step=False, on_epoch=True)
        self.log_dict({"again": mode}, on_step=False, on_epoch=True)
        return super().forward(x)


def test_a_teacher_logs_nothing_and_updates_no_metric(plain_trainer):
    model = Counting()
    trainer = plain_trainer(callbacks=distilled())
    trainer.fit(model, rows())
    assert trainer.callback_metrics["mode"] == 1.0
    assert trainer.callback_metrics["again"] == 1.0
    assert model.mean.compute() == 1.0
    assert model.mean._update_count == len(rows())


class Drawing(Classifier):
    """Draws with NumPy and Python, in evaluation too, as masked autoencoders do."""

    def forward(self, x: Tensor) -> Tensor:
        kept = x[:, [0]] * float(numpy.random.rand() + random.random())
        return super().forward(torch.cat([kept, x[:, 1:]], dim=1))


class Again(aux.Objective):
    def loss(self, step: aux.Step) -> Tensor:
        return step.again().logits.square().mean()


@pytest.mark.parametrize("added", [distilled, lambda: [Again()]], ids=["teacher", "again"])
def test_what_a_second_pass_draws_with_numpy_and_python_is_put_back(added, plain_trainer):
    streams = []
    for callbacks in ([], added()):
        numpy.random.seed(3)
        random.seed(3)
        plain_trainer(callbacks=callbacks).fit(Drawing(), rows())
        streams.append((numpy.random.rand(), random.random()))
    assert streams[0] == streams[1]


class PseudoLabelled(Classifier):
    """Runs itself without gradient first."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        with torch.no_grad():
            labels = self(x).argmax(-1)
        return F.cross_entropy(self(x), labels)


def test_the_call_that_counts_is_the_one_with_a_gradient(plain_trainer, caplog):
    probe = Blind(lambda step: step.logits.requires_grad)
    plain_trainer(callbacks=[probe]).fit(PseudoLabelled(), rows())
    assert all(probe.seen)
    assert "the first with a gradient of 2 calls" in caplog.text


class Detached(aux.Objective):
    def loss(self, step: aux.Step) -> Tensor:
        return step.logits.detach().square().mean()


def test_a_term_without_a_gradient_is_said(plain_trainer):
    with pytest.warns(UserWarning, match="the term of detached has no gradient"):
        plain_trainer(callbacks=[Detached()]).fit(Classifier(), rows())


# ---------------------------------------------------------------------------------- other promises
def test_callable_taps_are_called_once_for_all_objectives(plain_trainer):
    calls: list[int] = []

    def tap(step: Any) -> Tensor:
        calls.append(1)
        return step.returned

    taps = aux.Taps(features=tap)
    probes = [Blind(lambda step: step.features(), name=name, taps=taps) for name in "abc"]
    plain_trainer(callbacks=probes).fit(Classifier(), rows())
    assert len(calls) == len(rows())
    assert all(seen is other for seen, other in zip(probes[0].seen, probes[1].seen, strict=True))


class Spread(Classifier):
    def training_step(self, *args: Any) -> Tensor:
        return super().training_step(args[0], 0)


def test_the_batch_index_does_not_depend_on_the_signature(plain_trainer):
    probe = Blind(lambda step: step.batch_idx)
    plain_trainer(callbacks=[probe]).fit(Spread(), rows())
    assert probe.seen == list(range(len(rows())))


class Fetching(Classifier):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


def test_a_step_that_fetches_its_own_batches_is_refused(plain_trainer):
    with pytest.raises(aux.AuxiliaryError, match=r"takes its batches itself.*batch, batch_idx"):
        plain_trainer(callbacks=distilled()).fit(Fetching(), rows())
    plain_trainer(callbacks=[aux.EMATeacher()]).fit(Fetching(), rows())


class Poisoned(Classifier):
    """The logits of sample 0 are NaN in the first epoch; the loss is not."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.now = self.current_epoch == 0 and batch_idx == 0
        return loss


class PoisonedLogits(aux.EarlyLearningRegularization):
    def loss(self, step: aux.Step) -> Tensor:
        term = super().loss(step)
        return term * torch.nan if step.module.now else term


def test_a_refused_term_leaves_no_memory(plain_trainer):
    objective = PoisonedLogits(nonfinite="skip", name="elr")
    plain_trainer(max_epochs=1, callbacks=[objective]).fit(Poisoned(), rows())
    assert objective.state()["skipped"] == 1
    remembered = objective.memory.rows
    assert torch.equal(remembered[:4], torch.zeros(4, CLASSES))  # the refused batch
    assert (remembered[4:].sum(-1) > 0).all()


class TwoBackwards(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for _ in range(2):
            self.manual_backward(F.cross_entropy(self(x), y))
        optimizer.step()


class Constant(aux.Objective):
    def loss(self, step: aux.Step) -> Tensor:
        return step.logits.sum() * 0.0 + 3.0


def test_logged_losses_add_up_over_several_backwards(plain_trainer):
    terms = [Constant(0.5, "first"), Constant(2.0, "second", backward=1)]
    trainer = plain_trainer(callbacks=terms, log_every_n_steps=1)
    trainer.fit(TwoBackwards(), rows())
    logged = trainer.logged_metrics
    difference = logged["aux/total"] - logged["aux/main"]
    assert float(difference) == pytest.approx(0.5 * 3.0 + 2.0 * 3.0, rel=1e-6)


@pytest.mark.parametrize("name", ["main", "total"])
def test_names_of_the_logged_losses_are_reserved(name):
    with pytest.raises(aux.AuxiliaryError, match=f"aux/{name} is where the losses are logged"):
        Constant(name=name)


class Toggled(Classifier):
    """Two optimizers in turns, as a GAN has them; the second is toggled on alone."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(WIDTH, 1)

    def configure_optimizers(self) -> Any:
        own = [*self.encoder.parameters(), *self.classifier.parameters()]
        return torch.optim.SGD(own, 0.05), torch.optim.SGD(self.other.parameters(), 0.05)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        first, second = self.optimizers()
        for optimizer, loss in (
            (second, lambda: self.other(x).square().mean()),
            (first, lambda: F.cross_entropy(self(x), y)),
        ):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()
            self.untoggle_optimizer(optimizer)


class Headed(aux.Objective):
    def build_head(self, module: nn.Module) -> nn.Module:
        head = nn.Linear(8, 1)
        nn.init.ones_(head.weight)
        return head

    def loss(self, step: aux.Step) -> Tensor:
        return self.head(step.features("encoder")).square().mean()


def test_a_head_beside_toggled_optimizers(plain_trainer):
    objective = Headed(1.0, reads="encoder")
    plain_trainer(callbacks=[objective]).fit(Toggled(), rows())
    assert 0.9 < objective.head.weight.mean() < 0.96  # from 1 towards 0


def test_progress_with_two_optimizers_ends_at_the_end(plain_trainer):
    probe = Blind(lambda step: step.progress.fraction, backward=1)
    trainer = plain_trainer(callbacks=[probe], max_epochs=-1, max_steps=20)
    trainer.fit(Toggled(), rows(80))
    assert probe.seen == [step / 10 for step in range(10)]


class Freezing(L.pytorch.callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None: ...
    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None: ...


def test_heads_beside_a_finetuning_callback_are_refused_by_name(plain_trainer):
    callbacks = [Freezing(), Headed(1.0, reads="encoder")]
    with pytest.raises(aux.AuxiliaryError, match=r"Freezing .*heads of headed"):
        plain_trainer(callbacks=callbacks).fit(Classifier(), rows())


class Forgetful(aux.Objective):
    def __init__(self) -> None:
        pass


def test_a_subclass_that_forgets_super_is_told(plain_trainer):
    with pytest.raises(aux.AuxiliaryError, match=r"Forgetful.__init__ does not call super"):
        plain_trainer(callbacks=[Forgetful()]).fit(Classifier(), rows())


class InParts(Classifier):
    """Calls its parts one after the other instead of ``self(x)``."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.classifier(self.encoder(x)), y)


class Whole(InParts):
    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.encoder(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)


def run_in_parts(module: Any, batch: Any) -> Tensor:
    return module.classifier(module.encoder(batch[0]))


def test_a_model_that_is_called_in_parts_is_run_as_the_user_says(plain_trainer):
    def trained(model: Classifier, *taps: Any) -> dict[str, Tensor]:
        plain_trainer(callbacks=[*taps, *distilled()]).fit(model, rows())
        return weights(model)

    model = InParts()
    whole = Whole()
    whole.load_state_dict(model.state_dict())
    taps = aux.Taps(logits="classifier", forward=run_in_parts)
    assert equal(trained(model, taps), trained(whole))


def test_how_the_model_runs_is_said_once_for_all_objectives():
    taps = aux.Taps(logits="classifier", forward=run_in_parts)
    with pytest.raises(aux.AuxiliaryError, match="Trainer's callbacks instead"):
        aux.SelfDistillation(taps=taps)


# ------------------------------------------------------------- buffers that evaluation writes to
class Numbering(Classifier):
    """Counts the calls of its forward, in every mode, and computes with the count."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()), persistent=persistent)
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        self.cache = torch.cat([self.cache, self.calls[None]])[-3:]
        return super().forward(x) * (1 + 0.1 * self.calls)


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("start", [0, 100], ids=["moving", "not yet there"])
def test_a_teachers_pass_leaves_the_buffers_that_its_forward_writes_to(
    persistent, start, plain_trainer
):
    models = []
    for added in ([], [aux.EMATeacher(0.5, start=start), Blind(lambda s: s.teacher("ema").logits)]):
        torch.manual_seed(0)
        model = Numbering(persistent)
        plain_trainer(callbacks=added).fit(model, rows())
        models.append(model)
    without, with_teacher = models
    assert equal(weights(without), weights(with_teacher))
    assert float(with_teacher.calls) == 6
    assert torch.equal(without.cache, with_teacher.cache)


def test_an_input_that_a_submodule_overwrites_later_is_a_named_error(plain_trainer):
    """In the first step it leaves its input alone, so no copy was made of it."""

    class Inner(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            return super().forward(x.mul_(3.0) if self.calls > 1 and self.training else x)

    class Outer(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Inner(WIDTH, CLASSES)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    look = Blind(lambda step: step.teacher("frozen").logits)
    with pytest.raises(aux.AuxiliaryError, match=r"Outer\.net\(\.\.\.\) writes into its own input"):
        plain_trainer(callbacks=[aux.FrozenTeacher(), look]).fit(Outer(), rows())
    assert len(look.seen) == 1
