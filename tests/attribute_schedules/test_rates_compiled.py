"""Rates that change in every step of a compiled model: followed, and never compiled anew.

What is compiled is traced by torch's own compiler and run without a backend of C++; how often it
traces is what `CompileCounterWithBackend` counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import lightning_aux as aux
from lightning_aux.engine import AuxiliaryError
from tests.engine.small_models import Classifier, equal, rows, weights

STEPS = 12
USERS_RATE = 0.123


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class DropPath(nn.Module):
    """As timm writes it."""

    def __init__(self, drop_prob: float = USERS_RATE, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        random_tensor = x.new_empty(shape).bernoulli_(keep_prob)
        if keep_prob > 0.0 and self.scale_by_keep:
            random_tensor.div_(keep_prob)
        return x * random_tensor


class AsFunction(nn.Module):
    """Dropout as a function, with a rate that only ``attribute=`` can find."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = USERS_RATE

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.rate, self.training)


class Attention(nn.Module):
    """Attends to itself with weights 1/n each; with values of one-hot rows they can be read off."""

    def __init__(self, length: int = 16) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(length, 1, USERS_RATE, bias=False, batch_first=True)
        with torch.no_grad():
            self.attention.in_proj_weight[: 2 * length].zero_()
            self.attention.in_proj_weight[2 * length :].copy_(torch.eye(length))
            self.attention.out_proj.weight.copy_(torch.eye(length))

    def forward(self, x: Tensor) -> Tensor:
        value = torch.eye(x.shape[1]).expand(len(x), -1, -1)
        return self.attention(x, x, value, need_weights=False)[0]


class Holder(L.LightningModule):
    """Calls one layer on the same input in every step; notes output, rate and graphs so far."""

    def __init__(self, layer: nn.Module, given: Tensor, backend: str = "eager") -> None:
        super().__init__()
        self.layer = layer
        self.given = given
        self.scale = nn.Parameter(torch.ones(()))
        self.compiler = CompileCounterWithBackend(backend)
        self.outputs: list[Tensor] = []
        self.graphs: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.scale)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = self(self.given)
        return {"loss": output.mean(), "output": output.detach()}

    def on_train_batch_end(self, outputs: Any, *args: Any) -> None:
        # Not in the step, which may itself be compiled.
        self.outputs.append(outputs["output"])
        self.graphs.append(self.compiler.frame_count)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def shares(self) -> list[float]:
        return [float((output == 0).float().mean()) for output in self.outputs]


def by_method(model: Holder) -> Any:
    model.compile(backend=model.compiler)
    return model


def whole(model: Holder) -> Any:
    return torch.compile(model, backend=model.compiler)


def submodule(model: Holder) -> Any:
    model.layer = torch.compile(model.layer, backend=model.compiler)
    return model


def submodule_by_method(model: Holder) -> Any:
    model.layer.compile(backend=model.compiler)
    return model


def eager(model: Holder) -> Any:
    return model


WAYS = {each.__name__: each for each in (by_method, whole, submodule, submodule_by_method)}
every_way = pytest.mark.parametrize("way", WAYS)


def falling(p: float) -> list[float]:
    """The published linspace over all steps, in closed form."""
    return [p * (1 - step / (STEPS - 1)) for step in range(STEPS)]


def fit(
    plain_trainer: Any, model: Holder, way: Callable[[Holder], Any] = by_method, **schedule: Any
) -> Holder:
    arguments = {"p": 0.6, "until": "100%", "shape": "linear", **schedule}
    plain_trainer(max_epochs=2, callbacks=[aux.DropoutSchedule(**arguments)]).fit(
        way(model), rows()
    )
    assert len(model.outputs) == STEPS
    return model


def settled(model: Holder) -> bool:
    """At most two recompilations, and none after the third step."""
    return model.graphs[-1] == model.graphs[2] <= model.graphs[0] + 2


# What is made, its input, and DropoutSchedule's attribute=. Of each output the share of zeros is
# the rate, because the inputs are ones; 20,000 decisions have a standard deviation of 0.35 %.
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str | None]] = {
    "Dropout": (lambda: nn.Dropout(USERS_RATE), (200, 100), None),
    "Dropout in place": (lambda: nn.Dropout(USERS_RATE, inplace=True), (200, 100), None),
    "Dropout1d": (lambda: nn.Dropout1d(USERS_RATE), (200, 100, 2), None),
    "Dropout2d": (lambda: nn.Dropout2d(USERS_RATE), (200, 100, 2, 2), None),
    "Dropout3d": (lambda: nn.Dropout3d(USERS_RATE), (200, 100, 2, 2, 2), None),
    "DropPath": (DropPath, (20_000, 2), None),
    "function": (AsFunction, (200, 100), "rate"),
    "MultiheadAttention": (Attention, (80, 16, 16), None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_share_that_is_dropped_follows_the_schedule_in_one_set_of_graphs(kind, plain_trainer):
    make, shape, attribute = KINDS[kind]
    model = fit(plain_trainer, Holder(make(), torch.ones(shape)), attribute=attribute)
    assert model.shares() == pytest.approx(falling(0.6), abs=0.02)
    assert settled(model)
    if kind != "function":  # all of it is one call that has no fixed shape in a graph
        assert model.graphs[-1] > 0


@every_way
@pytest.mark.parametrize("kind", ["Dropout", "DropPath"])
def test_it_does_so_whichever_part_is_compiled(kind, way, plain_trainer):
    make, shape, _ = KINDS[kind]
    model = fit(plain_trainer, Holder(make(), torch.ones(shape)), WAYS[way])
    assert model.shares() == pytest.approx(falling(0.6), abs=0.02)
    assert settled(model)
    assert model.graphs[-1] > 0


@pytest.mark.parametrize("kind", ["Dropout", "DropPath"])
def test_it_does_so_through_autograds_compiler(kind, plain_trainer):
    make, shape, _ = KINDS[kind]
    model = fit(plain_trainer, Holder(make(), torch.ones(shape), "aot_eager"))
    assert model.shares() == pytest.approx(falling(0.6), abs=0.02)
    assert settled(model)


@pytest.mark.parametrize(
    ("make", "shape", "whole_over"),
    [
        (lambda: nn.Dropout1d(0.1), (300, 100, 3), (2,)),
        (lambda: nn.Dropout1d(0.1), (20_000, 3), (1,)),  # one sample without a batch
        (lambda: nn.Dropout2d(0.1), (300, 100, 2, 3), (2, 3)),
        (lambda: nn.Dropout2d(0.1), (300, 100, 3), (2,)),  # a batch for torch
        (lambda: nn.Dropout2d(0.1), (300, 100), ()),
        (lambda: nn.Dropout3d(0.1), (300, 100, 2, 1, 3), (2, 3, 4)),
        (lambda: nn.Dropout3d(0.1), (20_000, 2, 1, 3), (1, 2, 3)),
    ],
)
@pytest.mark.filterwarnings("ignore:dropout2d")
def test_channels_are_dropped_whole_where_torch_drops_them_whole(
    make, shape, whole_over, plain_trainer
):
    def decisions(output: Tensor) -> Tensor:
        kept = (output != 0).float()
        assert not whole_over or torch.equal(kept.amin(whole_over), kept.amax(whole_over))
        return kept.amin(whole_over) if whole_over else kept

    model = Holder(make(), torch.ones(shape))
    torchs = decisions(model.layer(model.given))
    fit(plain_trainer, model)
    for rate, output in zip(falling(0.6), model.outputs, strict=True):
        ours = decisions(output)
        assert ours.shape == torchs.shape
        assert float(1 - ours.mean()) == pytest.approx(rate, abs=0.02)
        kept = output[output != 0]
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))


@pytest.mark.parametrize(
    ("make", "shape", "groups"),
    [
        (lambda: nn.AlphaDropout(0.1), (400, 500), (400, 500)),
        (lambda: nn.FeatureAlphaDropout(0.1), (400, 500, 4), (400, 500)),
    ],
)
def test_alpha_dropout_keeps_mean_and_variance_and_drops_at_the_rate(
    make, shape, groups, plain_trainer
):
    model = fit(plain_trainer, Holder(make(), torch.randn(shape)))
    for rate, output in zip(falling(0.6), model.outputs, strict=True):
        assert float(output.mean()) == pytest.approx(0.0, abs=0.02)
        assert float(output.var()) == pytest.approx(1.0, abs=0.02)
        # What is dropped is all one value, a·α′ + b (Klambauer et al. 2017).
        dropped = -1.7580993408473766
        a = ((1 - rate) * (1 + rate * dropped**2)) ** -0.5
        b = -a * rate * dropped
        is_dropped = (output - (a * dropped + b)).abs() < 1e-6
        assert float(is_dropped.float().mean()) == pytest.approx(rate, abs=0.02)
        if is_dropped.ndim == 3:
            assert torch.equal(is_dropped.all(-1), is_dropped.any(-1))
        kept = ~is_dropped
        torch.testing.assert_close(output[kept], (a * model.given + b)[kept])
    assert settled(model)


@pytest.mark.parametrize("kind", [nn.Dropout, nn.AlphaDropout])
def test_at_rate_one_nothing_passes_and_nothing_is_infinite(kind, plain_trainer):
    model = fit(plain_trainer, Holder(kind(0.1), torch.randn(6, 4)), p=1.0)
    assert not model.outputs[0].any()
    assert all(output.isfinite().all() for output in model.outputs)
    assert torch.equal(model.outputs[-1], model.given)


def test_the_gradient_is_that_of_what_was_kept(plain_trainer):
    class Noting(Holder):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.gradients.append(self.scale.grad.item())

    model = Noting(nn.Dropout(0.1), torch.rand(40, 5), "aot_eager")
    model.gradients = []
    fit(plain_trainer, model)
    by_hand = [
        float((model.given * (output != 0)).mean()) / (1 - rate)
        for rate, output in zip(falling(0.6), model.outputs, strict=True)
    ]
    assert model.gradients == pytest.approx(by_hand, rel=1e-5)


def test_half_precision_is_kept_and_the_rate_is_not_rounded_to_it(plain_trainer):
    model = Holder(nn.Dropout(0.1), torch.ones(200, 1000, dtype=torch.bfloat16))
    model.scale.data = model.scale.data.bfloat16()
    fit(plain_trainer, model, p=0.011)
    assert {output.dtype for output in model.outputs} == {torch.bfloat16}
    # bfloat16 knows 0.0078125 and 0.0117 below and above, not 0.010; five standard deviations.
    assert model.shares() == pytest.approx(falling(0.011), abs=0.0012)


def test_a_layer_that_is_called_by_keyword_is_the_same(plain_trainer):
    class ByKeyword(Holder):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x * self.scale)

    for way in (eager, by_method):
        model = fit(plain_trainer, ByKeyword(nn.Dropout(0.1), torch.ones(200, 100)), way)
        assert model.shares() == pytest.approx(falling(0.6), abs=0.02)


def test_a_model_in_evaluation_drops_nothing_while_the_rate_is_high(plain_trainer):
    class Evaluated(Holder):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                self.eval()
                assert torch.equal(self(self.given), self.given)
                self.train()
            return super().training_step(batch, batch_idx)

    model = fit(plain_trainer, Evaluated(nn.Dropout(0.1), torch.ones(200, 100)))
    assert model.shares() == pytest.approx(falling(0.6), abs=0.02)


# --------------------------------------------------------------------------- eager, and afterwards
class Driven(Classifier):
    """Every kind of torch's own dropout in a row; by hand, the rate is set before each forward."""

    def __init__(self, by_hand: list[float] | None = None) -> None:
        super().__init__(dropout=USERS_RATE)
        self.more = nn.ModuleList(
            [nn.AlphaDropout(0.2), nn.Dropout1d(0.3), nn.FeatureAlphaDropout(0.4)]
        )
        self.by_hand = by_hand

    def forward(self, x: Tensor) -> Tensor:
        if self.by_hand is not None:
            for each in (self.encoder[2], *self.more):
                each.p = self.by_hand[self.trainer.global_step]
        hidden = self.encoder(x * x.new_tensor([1.0, 1.0, 1.0, 0.01]))
        for each in self.more:
            hidden = each(hidden[None])[0]
        return self.classifier(hidden)


def test_eager_training_is_bit_identical_to_setting_p_by_hand(plain_trainer):
    last = 0.5 / (STEPS - 1)
    rates = [step * -last + 0.5 for step in range(STEPS - 1)] + [0.0]
    results, streams = [], []
    for by_hand, callbacks in (
        (rates, []),
        (None, [aux.DropoutSchedule(0.5, until="100%", shape="linear")]),
        (None, []),
    ):
        torch.manual_seed(5)
        model = Driven(by_hand)
        plain_trainer(max_epochs=2, callbacks=callbacks).fit(model, rows())
        results.append(weights(model))
        streams.append(torch.get_rng_state())
    assert equal(results[0], results[1])
    assert torch.equal(streams[0], streams[1])
    assert not equal(results[0], results[2])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_modules_are_as_they_were(compiled, fails, plain_trainer):
    class Several(Holder):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if fails and self.global_step == 4:
                raise RuntimeError("failed")
            return super().training_step(batch, batch_idx)

    layers = nn.Sequential(nn.Dropout(0.3), DropPath(0.2), nn.AlphaDropout(0.1))
    model = Several(layers, torch.ones(6, 4))
    before = [dict(vars(each)) for each in layers]
    schedule = aux.DropoutSchedule(0.5, until="100%", shape="linear")
    way = submodule_by_method if compiled else eager
    with pytest.raises(RuntimeError, match="failed") if fails else nullcontext():
        plain_trainer(max_epochs=2, callbacks=[schedule]).fit(way(model), rows())
    assert [dict(vars(each)) for each in layers] == before
    assert [type(rate) for rate in (layers[0].p, layers[1].drop_prob, layers[2].p)] == [float] * 3


def test_a_few_rates_leave_the_modules_and_their_random_numbers_alone(plain_trainer):
    """Three rates are within what may be compiled again: torch's own dropout runs, to the bit."""
    results = []
    for way in (eager, by_method):
        torch.manual_seed(3)
        model = Holder(nn.Dropout(0.1), torch.ones(6, 4))
        fit(
            plain_trainer,
            model,
            way,
            p="step(0.5, 0.3, 0, at=[4, 8])",
            until=None,
            shape="constant",
        )
        results.append(torch.stack(model.outputs))
        assert "forward" not in vars(model.layer)
    assert torch.equal(*results)


# --------------------------------------------------------------------------------------- arguments
class Deep(Classifier):
    """Blocks with two rates each, a stem and a rate that only an attribute names."""

    def __init__(self, blocks: int = 5) -> None:
        super().__init__(dropout=0.01)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"mlp": nn.ModuleDict({"drop": nn.Dropout(0.02)}), "path": DropPath(0.03)}
            )
            for _ in range(blocks)
        )
        self.function = AsFunction()
        self.noted: list[dict[str, float]] = []

    def rates(self) -> dict[str, float]:
        found = {"encoder.2": self.encoder[2].p, "function": self.function.rate}
        for place, block in enumerate(self.blocks):
            found[f"blocks.{place}.mlp.drop"] = block["mlp"]["drop"].p
            found[f"blocks.{place}.path"] = block["path"].drop_prob
        return found

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.noted.append(self.rates())
        return super().training_step(batch, batch_idx)


def test_the_linear_profile_rises_from_zero_in_the_first_layer_to_the_rate_in_the_last(
    plain_trainer,
):
    model = Deep()
    schedule = aux.DropoutSchedule(0.4, mode="standard", modules="blocks.*", profile="linear")
    plain_trainer(callbacks=[schedule]).fit(model, rows())
    by_hand = {"encoder.2": 0.01, "function": USERS_RATE}
    for place, rate in enumerate([0.0, 0.1, 0.2, 0.3, 0.4]):
        by_hand |= {f"blocks.{place}.mlp.drop": rate, f"blocks.{place}.path": rate}
    assert len(model.noted) == 6
    for noted in model.noted:
        assert noted == pytest.approx(by_hand, abs=1e-15)


def test_the_linear_profile_multiplies_a_schedule_and_counts_what_is_driven(plain_trainer):
    """Of the five layers three are driven, and one more outside of the blocks comes first."""
    model = Deep()
    schedule = aux.DropoutSchedule(
        "linear(0, 0.6, until=6)", profile="linear", modules=["blocks.[024].path", "encoder.*"]
    )
    plain_trainer(callbacks=[schedule]).fit(model, rows())
    for step, noted in enumerate(model.noted):
        driven = [noted[f"blocks.{place}.path"] for place in (0, 2, 4)]
        assert driven == pytest.approx([0.1 * step * share for share in (1 / 3, 2 / 3, 1)])
        assert noted["encoder.2"] == 0.0
        assert noted["blocks.1.path"] == noted["blocks.3.path"] == 0.03


def test_one_layer_alone_has_the_full_rate_of_a_linear_profile(plain_trainer):
    model = Deep(blocks=1)
    schedule = aux.DropoutSchedule(0.4, "standard", modules="blocks.*", profile="linear")
    plain_trainer(callbacks=[schedule]).fit(model, rows())
    assert model.noted[0]["blocks.0.path"] == model.noted[0]["blocks.0.mlp.drop"] == 0.4


@pytest.mark.parametrize(
    ("arguments", "by_hand"),
    [
        (
            {"p": 0.3, "mode": "both", "until": 4, "start": 9},
            [0.3] * 4 + [0.0] * 5 + [0.3] * 3,
        ),
        (
            {"p": 0.3, "mode": "both", "until": 4, "start": 8, "shape": "linear"},
            [0.3, 0.2, 0.1, 0.0] + [0.0] * 4 + [0.0, 0.075, 0.15, 0.225],
        ),
        (
            {"p": 0.4, "mode": "early", "until": "50%", "shape": "cosine"},
            [0.2 * (1 + math.cos(math.pi * step / 5)) for step in range(6)] + [0.0] * 6,
        ),
        (
            {"p": 0.4, "mode": "late", "start": "1ep", "shape": "cosine"},
            [0.0] * 6 + [0.2 * (1 - math.cos(math.pi * step / 6)) for step in range(6)],
        ),
        ({"p": "step(0.1, 0, 0.2, at=[1ep, 9])"}, [0.1] * 6 + [0.0] * 3 + [0.2] * 3),
        ({"p": "linear(0, 0.6)"}, [0.05 * step for step in range(12)]),
        ({"p": "0.25", "mode": "standard"}, [0.25] * 12),
        ({"p": 0.3, "mode": "standard", "start": 2}, [0.0] * 2 + [0.3] * 10),
        ({"p": 0.3, "mode": "standard", "until": 2}, [0.3] * 2 + [0.0] * 10),
    ],
)
def test_the_rate_of_every_step_is_the_one_by_hand(arguments, by_hand, plain_trainer):
    model = Deep()
    schedule = aux.DropoutSchedule(**arguments)
    plain_trainer(max_epochs=2, callbacks=[schedule]).fit(model, rows())
    assert [noted["encoder.2"] for noted in model.noted] == pytest.approx(by_hand, abs=1e-12)
    assert [noted["blocks.3.path"] for noted in model.noted] == pytest.approx(by_hand, abs=1e-12)
    assert {noted["function"] for noted in model.noted} == {USERS_RATE}
    assert model.rates()["encoder.2"] == 0.01


def test_several_globs_drive_what_any_of_them_names(plain_trainer):
    model = Deep()
    schedule = aux.DropoutSchedule(0.9, "standard", modules=["blocks.0.*", "*.4.path"])
    before = model.rates()
    plain_trainer(callbacks=[schedule]).fit(model, rows())
    driven = {"blocks.0.mlp.drop", "blocks.0.path", "blocks.4.path"}
    expected = {path: 0.9 if path in driven else rate for path, rate in before.items()}
    assert model.noted == [expected] * 6
    assert model.rates() == before


def test_an_attribute_is_driven_wherever_it_is_a_number_and_nothing_else_is(plain_trainer):
    class Named(Deep):
        def __init__(self) -> None:
            super().__init__()
            self.rate = 0.07  # the model's own, which only attribute= reaches
            self.power = nn.Identity()
            self.power.rate = "high"

        def rates(self) -> dict[str, float]:
            return super().rates() | {"": self.rate}

    model = Named()
    before = model.rates()
    schedule = aux.DropoutSchedule(0.9, "standard", attribute="rate")
    plain_trainer(callbacks=[schedule]).fit(model, rows())
    assert model.noted == [before | {"function": 0.9, "": 0.9}] * 6
    assert model.rates() == before
    assert model.power.rate == "high"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 0.1, "mode": "standard", "attribute": "raet"}, "number called 'raet'"),
        ({"p": "linear(0, 1.5)"}, r"'linear\(0, 1\.5.*takes the value 1\.\d+, and a rate"),
        ({"p": 0.1, "mode": "standard", "modules": ["blokcs.*"]}, r"blokcs.*Near.*'blocks\.0\."),
    ],
)
def test_what_the_model_or_a_rate_cannot_be_is_refused_before_the_first_step(
    arguments, message, plain_trainer
):
    model = Deep()
    before = model.rates()
    with pytest.raises(AuxiliaryError, match=message):
        plain_trainer(callbacks=[aux.DropoutSchedule(**arguments)]).fit(model, rows())
    assert model.noted == []
    assert model.rates() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": "linear(0, 0.5)", "until": 4}, "is the whole schedule; leave out mode, until"),
        ({"p": "linear(0, 0.5)", "shape": "linear"}, "is the whole schedule"),
        ({"p": 0.1, "mode": "both", "until": 4}, "mode='both' takes until= and start="),
        ({"p": 0.1, "mode": "standard", "profile": "steep"}, "profile='steep' is neither"),
        ({"p": "1.5", "mode": "standard"}, r"p=1\.5 is not a rate"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments, message):
    with pytest.raises(AuxiliaryError, match=message):
        aux.DropoutSchedule(**arguments)
