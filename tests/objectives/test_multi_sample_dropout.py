"""``MultiSampleDropout``: the mean of explicit passes with the same masks, the trunk run once."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import lightning_aux as aux
from tests.contract.models import CLASSES, FEATURES, Samples
from tests.contract.training import fit, identical, optimizer_state, random_state, seeded, weights

WIDTH = 8


class Masked(nn.Module):
    """Dropout that keeps its masks, or uses given ones."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor] = []
        self.given: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        mask = self.given.pop(0) if self.given else (torch.rand_like(x) < 0.5).to(x)
        self.masks.append(mask)
        return x * mask * 2


class Counted(nn.Linear):
    """Counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Net(L.LightningModule):
    """A trunk of a list and a branch, in-place work between modules, and a tail with BatchNorm."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.trunk = nn.ModuleList([Counted(FEATURES, WIDTH), Counted(WIDTH, WIDTH)])
        self.shared = Counted(WIDTH, WIDTH)
        self.masked = Masked()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = Counted(WIDTH, CLASSES)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(CLASSES)
        self.logged = 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.trunk[0](x)
        h.relu_()  # overwrites what the module returned
        h = self.shared(self.trunk[1](h)).tanh()
        return self.head(self.norm(self.shared(self.masked(h))))  # the second call is of the tail

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y) + 0.01 * logits.square().mean()
        self.accuracy(logits, y)
        self.log("loss", loss)
        if self.automatic_optimization:
            return {"loss": loss, "logits": logits}
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(logits, y))
        optimizer.step()
        return None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.gradients = {
            name: each.grad.clone()
            for name, each in self.named_parameters()
            if each.grad is not None
        }

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def one_step(model: L.LightningModule, added: list[Any], **options: Any) -> L.LightningModule:
    fit(model, added, DataLoader(Samples(8), 8), max_epochs=1, **options)
    return model


def mean_of_passes(masks: list[Tensor], own_loss: bool) -> dict[str, Tensor]:
    """The gradient of the mean over whole passes with these masks, one after the other."""
    model = seeded(Net)
    x, y = next(iter(DataLoader(Samples(8), 8)))
    model.masked.given = list(masks)
    total = 0.0
    for _ in masks:
        logits = model(x)
        total = total + F.cross_entropy(logits, y)
        if own_loss:
            total = total + 0.01 * logits.square().mean()
    (total / len(masks)).backward()
    return {name: each.grad for name, each in model.named_parameters()}


@pytest.mark.parametrize("samples", [2, 5])
def test_the_gradient_is_that_of_the_mean_over_explicit_passes_with_the_same_masks(samples):
    model = one_step(seeded(Net), [aux.MultiSampleDropout("masked", samples)])
    assert len(model.masked.masks) == samples
    assert len({tuple(each.flatten().tolist()) for each in model.masked.masks}) == samples
    expected = mean_of_passes(model.masked.masks, own_loss=True)
    for name, gradient in model.gradients.items():
        assert torch.allclose(gradient, expected[name], atol=1e-6), name


@pytest.mark.parametrize("manual", [False, True])
def test_with_a_loss_given_the_mean_is_of_that_loss(manual):
    callback = aux.MultiSampleDropout("masked", 4, loss=F.cross_entropy)
    model = one_step(seeded(Net, manual), [callback])
    expected = mean_of_passes(model.masked.masks, own_loss=False)
    if not manual:  # what else is in the user's loss stays as it is
        other = seeded(Net)
        other.masked.given = [model.masked.masks[0]]
        (0.01 * other(next(iter(DataLoader(Samples(8), 8)))[0]).square().mean()).backward()
        for name, each in other.named_parameters():
            expected[name] = expected[name] + each.grad
    for name, gradient in model.gradients.items():
        assert torch.allclose(gradient, expected[name], atol=1e-6), name


def test_only_the_tail_is_repeated():
    model = one_step(seeded(Net), [aux.MultiSampleDropout("masked", 5)])
    assert [each.calls for each in (*model.trunk, model.shared, model.head)] == [1, 1, 1 + 5, 5]


@pytest.mark.parametrize("loss", [None, F.cross_entropy])
def test_one_sample_is_bit_identical_to_plain_training(loss):
    plain = seeded(Net)
    before = fit(plain, [], max_epochs=2)
    plain_random = random_state()
    model = seeded(Net)
    after = fit(model, [aux.MultiSampleDropout("masked", 1, loss=loss)], max_epochs=2)
    assert identical(weights(plain), weights(model))
    assert identical(optimizer_state(before), optimizer_state(after))
    assert identical(plain_random, random_state())


def test_statistics_metrics_logs_and_the_random_stream_are_those_of_the_first_run():
    """What is trained differs from the second step on: the first is looked at."""
    models, randoms, trainers = [], [], []
    for added in ([], [aux.MultiSampleDropout("masked", 6)]):
        model = seeded(Net)
        models.append(model)
        trainers.append(fit(model, added, DataLoader(Samples(8), 8), max_epochs=1))
        randoms.append(random_state())
    assert identical(*randoms)
    assert identical(*(dict(each.norm.named_buffers()) for each in models))
    assert [each.accuracy._update_count for each in models] == [1, 1]
    assert identical(*(each.accuracy.tp for each in models))
    assert trainers[0].logged_metrics["loss"] == trainers[1].logged_metrics["loss"]


def test_a_metric_that_is_updated_first_in_a_later_step_is_put_back():
    class Later(Net):
        def __init__(self) -> None:
            super().__init__()
            self.late = torchmetrics.MeanMetric()
            self.values = torchmetrics.CatMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx > 1:
                self.late.update(float(batch_idx))
                self.values(float(batch_idx))
            return super().training_step(batch, batch_idx)

    model = seeded(Later)
    fit(model, [aux.MultiSampleDropout("masked", 3)], DataLoader(Samples(32), 8), max_epochs=1)
    assert model.late._update_count == model.values._update_count == 2
    assert float(model.late.compute()) == 2.5
    assert model.values.compute().tolist() == [2.0, 3.0]


def test_a_resumed_run_draws_the_masks_of_an_uninterrupted_one(tmp_path):
    saving = L.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)

    class Reseeded(Net):
        def on_train_batch_start(self, *_: Any) -> None:
            torch.manual_seed(7 + self.global_step)

    whole, rest = seeded(Reseeded), seeded(Reseeded)
    fit(whole, [aux.MultiSampleDropout("masked", 3), saving], max_epochs=3)
    fit(
        rest,
        [aux.MultiSampleDropout("masked", 3)],
        max_epochs=3,
        ckpt_path=tmp_path / "epoch=1.ckpt",
    )
    assert identical(weights(whole), weights(rest))


class Plain(Net):
    """The same with torch's dropout, whose masks a compiled graph draws as eager code does."""

    def __init__(self) -> None:
        super().__init__()
        self.masked = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.shared(self.trunk[0](x)).tanh()
        return self.head(self.norm(self.masked(h)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])  # Lightning's log cannot be compiled


@pytest.mark.parametrize("way", ["method", "whole", "head"])
def test_a_compiled_model_trains_as_an_eager_one(way):
    torch._dynamo.reset()
    eager = one_step(seeded(Plain), [aux.MultiSampleDropout("masked", 3)])
    model = seeded(Plain)
    fitted: Any = model
    if way == "method":
        model.compile(backend="aot_eager")
    elif way == "head":
        model.head.compile(backend="aot_eager")
    else:
        fitted = torch.compile(model, backend="aot_eager")
    one_step(fitted, [aux.MultiSampleDropout("masked", 3)])
    for name, gradient in model.gradients.items():
        assert torch.allclose(gradient, eager.gradients[name], atol=1e-6), name


class ByMethod(nn.Module):
    """Called by another name than ``__call__``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Counted(FEATURES, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_what_a_method_calls_is_remembered_from_the_second_step_on():
    class Encoding(Net):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = ByMethod()  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.masked(self.shared(self.trunk.encode(x))))

    model = seeded(Encoding)
    fit(
        model,
        [aux.MultiSampleDropout("masked", 4)],
        DataLoader(Samples(24), 8),
        max_epochs=1,
    )
    assert model.shared.calls == 3
    assert model.trunk.inner.calls == 4 + 1 + 1


def test_nothing_stays_on_the_modules_after_an_interrupted_repetition():
    class Failing(Net):
        def forward(self, x: Tensor) -> Tensor:
            if len(self.masked.masks) == 2:
                raise RuntimeError("failed")
            return super().forward(x)

    model = seeded(Failing)
    own = {name: each.forward for name, each in model.named_modules()}
    with pytest.raises(RuntimeError, match="failed"):
        one_step(model, [aux.MultiSampleDropout("masked", 4)])
    assert {name: each.forward for name, each in model.named_modules()} == own


# ---------------------------------------------------------------- what is drawn before the layer
class Mixing(Net):
    """Draws with torch, NumPy and Python before the layer, between modules that draw themselves.

    The features are remembered, so their labels have to be mixed as in the step itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Dropout(0.3)
        self.drawn: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.noise(self.trunk[0](x))
        self.turned = torch.randperm(len(h))
        h = self.trunk[1](h[self.turned]).tanh()
        return self.head(self.norm(self.shared(self.masked(h))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        share, other = numpy.random.beta(0.4, 0.4), torch.randperm(len(x))
        flip = random.choice([-1.0, 1.0])
        logits = self(flip * (share * x + (1 - share) * x[other]))
        self.drawn.append((share, other.tolist(), flip, self.turned.tolist()))
        y, mixed = y[self.turned], y[other][self.turned]
        return share * F.cross_entropy(logits, y) + (1 - share) * F.cross_entropy(logits, mixed)


def drawn_in_all(model: Mixing, samples: int) -> bool:
    return len(model.drawn) == samples and all(each == model.drawn[0] for each in model.drawn)


def test_what_the_step_draws_before_the_layer_is_the_same_for_every_mask():
    """The mean of whole passes with these masks, all of which draw what the step drew."""
    model = one_step(seeded(Mixing), [aux.MultiSampleDropout("masked", 4)])
    assert drawn_in_all(model, 4)
    assert len({tuple(each.flatten().tolist()) for each in model.masked.masks}) == 4

    class ByHand(Mixing):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            began = random_streams()
            losses = []
            for _ in range(4):
                set_random_streams(began)
                losses.append(super().training_step(batch, batch_idx))
            return sum(losses) / 4

    by_hand = seeded(ByHand)
    by_hand.masked.given = list(model.masked.masks)
    one_step(by_hand, [])
    assert by_hand.drawn[0] == model.drawn[0]
    for name, gradient in model.gradients.items():
        assert torch.allclose(gradient, by_hand.gradients[name], atol=1e-6), name


def random_streams() -> Any:
    return torch.get_rng_state(), numpy.random.get_state(), random.getstate()


def set_random_streams(streams: Any) -> None:
    torch.set_rng_state(streams[0])
    numpy.random.set_state(streams[1])
    random.setstate(streams[2])


def test_the_users_streams_go_on_as_without_repetitions():
    streams = []
    for added in ([], [aux.MultiSampleDropout("masked", 4)]):
        one_step(seeded(Mixing), added)
        streams.append(random_state())
    assert identical(*streams)


def test_with_a_loss_given_what_the_model_draws_before_the_layer_is_the_same():
    callback = aux.MultiSampleDropout("masked", 3, loss=F.cross_entropy)
    turned = []

    class Noting(Mixing):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x + torch.randn(()))
            turned.append(self.turned.tolist())
            return logits

    one_step(seeded(Noting), [callback])
    assert len(turned) == 3
    assert turned[0] == turned[1] == turned[2]


# ------------------------------------------------------------------------ what is remembered
class Listing(nn.Module):
    """A backbone that returns its stages in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Counted(FEATURES, WIDTH), Counted(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        h = self.first(x).tanh()
        return {"stages": [h, self.second(h)]}


class Appending(Net):
    """Appends to the list that the backbone returned, as feature pyramids do."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Listing()

    def forward(self, x: Tensor) -> Tensor:
        stages = self.trunk(x)["stages"]
        stages.append(stages[-1].tanh())
        return self.head(self.masked(sum(stages)))


def test_what_the_step_appends_to_a_list_of_the_backbone_is_not_remembered():
    model = one_step(seeded(Appending), [aux.MultiSampleDropout("masked", 4)])
    by_hand = seeded(Appending)
    by_hand.masked.given = list(model.masked.masks)
    x, y = next(iter(DataLoader(Samples(8), 8)))
    total = 0.0
    for _ in range(4):
        logits = by_hand(x)
        total = total + F.cross_entropy(logits, y) + 0.01 * logits.square().mean()
    (total / 4).backward()
    assert model.trunk.first.calls == 1
    for name, each in by_hand.named_parameters():
        if each.grad is not None:
            assert torch.allclose(model.gradients[name], each.grad, atol=1e-6), name


# ------------------------------------------------------------------- activation checkpointing
class Checkpointed(Net):
    """The trunk is checkpointed, module by module or as a function that does more."""

    def __init__(self, reentrant: bool, way: str) -> None:
        super().__init__()
        self.trunk = nn.ModuleList(
            nn.Sequential(Counted(WIDTH, WIDTH), nn.Dropout(0.3)) for _ in range(2)
        )
        self.stem = nn.Linear(FEATURES, WIDTH)
        self.reentrant, self.way = reentrant, way

    def run(self, function: Any, h: Tensor) -> Tensor:
        if self.way == "not":
            return function(h)
        return checkpoint(function, h, use_reentrant=self.reentrant)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        if self.way == "function":
            h = self.run(lambda h: self.trunk[1](self.trunk[0](h).tanh()).tanh(), h)
        else:
            h = self.run(self.trunk[1], self.run(self.trunk[0], h).tanh()).tanh()
        if self.way == "layer":
            return self.run(lambda h: self.head(self.masked(h)), h)
        return self.head(self.masked(h))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("way", ["modules", "function"])
def test_a_checkpointed_trunk_has_the_gradient_of_a_plain_one(way, reentrant):
    plain = one_step(seeded(Checkpointed, reentrant, "not"), [aux.MultiSampleDropout("masked", 4)])
    model = seeded(Checkpointed, reentrant, way)
    one_step(model, [aux.MultiSampleDropout("masked", 4)])
    assert identical(plain.masked.masks, model.masked.masks)
    for name, gradient in plain.gradients.items():
        assert torch.allclose(gradient, model.gradients[name], atol=1e-6), name
    if way == "modules" and not reentrant:  # forward, and again in the one backward
        assert [each[0].calls for each in model.trunk] == [2, 2]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_layer_is_an_error_that_names_it(reentrant):
    """It would run again, in the backward pass, with other masks than those of the loss."""
    message = r"'masked' is called within torch\.utils\.checkpoint.*Name a module after"
    model = seeded(Checkpointed, reentrant, "layer")
    with pytest.raises(aux.AuxiliaryError, match=message):
        one_step(model, [aux.MultiSampleDropout("masked", 4)])


# ------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("model", "callback", "message"),
    [
        (Net, lambda: aux.MultiSampleDropout("maskd"), r"'maskd'.*'masked'"),
        (Net, lambda: aux.MultiSampleDropout("trunk.*"), r"names 2 modules"),
        (lambda: Net(manual=True), lambda: aux.MultiSampleDropout("masked"), "Give the loss"),
    ],
)
def test_what_cannot_work_is_an_error_before_the_first_step(model, callback, message):
    made = seeded(model)
    with pytest.raises(aux.AuxiliaryError, match=message):
        one_step(made, [callback()])
    assert made.masked.masks == []


def test_a_layer_that_is_not_called_is_an_error_that_says_so():
    model = seeded(Net)
    model.unused = nn.Dropout(0.1)
    with pytest.raises(aux.AuxiliaryError, match="'unused' was not called in this training step"):
        one_step(model, [aux.MultiSampleDropout("unused")])


def test_no_mask_at_all_is_refused():
    with pytest.raises(aux.AuxiliaryError, match="samples=0; there is at least one mask"):
        aux.MultiSampleDropout("masked", 0)


def test_a_trunk_that_runs_twice_has_the_statistics_of_one_step():
    """Its second call comes after the layer, and is repeated."""

    class Twice(Net):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.BatchNorm1d(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.masked(self.trunk(x)))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self(x), y) + F.cross_entropy(self(-x), y)

    model = one_step(seeded(Twice), [aux.MultiSampleDropout("masked", 4)])
    assert int(model.trunk[1].num_batches_tracked) == 2
