"""``DropoutSchedule``: the rate that it sets is the one that acts, where the glob says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_aux as aux
from lightning_aux.engine import AuxiliaryError
from tests.engine.small_models import Classifier, rows


class DropPath(nn.Module):
    """As in timm: whole samples are dropped with probability ``drop_prob``."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return _whole_samples(x, self.drop_prob) if self.training else x


class StochasticDepth(nn.Module):
    """As in torchvision: the rate is ``p``, and the class is known by its name."""

    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        self.p, self.mode = p, mode

    def forward(self, x: Tensor) -> Tensor:
        return _whole_samples(x, self.p) if self.training else x


def _whole_samples(x: Tensor, rate: float) -> Tensor:
    kept = torch.empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - rate)
    return x * (kept / (1 - rate) if rate < 1 else kept)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.11, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], layers: int = 2) -> None:
        super().__init__()
        self.recurrent = kind(4, 3, layers, dropout=0.11 if layers > 1 else 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x)[0]


# What to make, the path and the name of its rate, and the shape of an input.
KINDS: dict[str, tuple[Callable[[], nn.Module], str, str, tuple[int, ...]]] = {
    "Dropout": (lambda: nn.Dropout(0.11), "layer", "p", (6, 4)),
    "Dropout1d": (lambda: nn.Dropout1d(0.11), "layer", "p", (6, 4, 5)),
    "Dropout2d": (lambda: nn.Dropout2d(0.11), "layer", "p", (6, 4, 3, 3)),
    "Dropout3d": (lambda: nn.Dropout3d(0.11), "layer", "p", (6, 4, 2, 2, 2)),
    "AlphaDropout": (lambda: nn.AlphaDropout(0.11), "layer", "p", (6, 4)),
    "FeatureAlphaDropout": (lambda: nn.FeatureAlphaDropout(0.11), "layer", "p", (6, 4, 5)),
    "MultiheadAttention": (Attention, "layer.attention", "dropout", (6, 5, 4)),
    "LSTM": (lambda: Recurrent(nn.LSTM), "layer.recurrent", "dropout", (6, 5, 4)),
    "GRU": (lambda: Recurrent(nn.GRU), "layer.recurrent", "dropout", (6, 5, 4)),
    "RNN": (lambda: Recurrent(nn.RNN), "layer.recurrent", "dropout", (6, 5, 4)),
    "DropPath": (lambda: DropPath(0.11), "layer", "drop_prob", (6, 4)),
    "StochasticDepth": (lambda: StochasticDepth(0.11, "row"), "layer", "p", (6, 4)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


class Holder(L.LightningModule):
    """Calls one layer on two random inputs in every step, and notes the outputs."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = layer
        self.shape = shape
        self.scale = nn.Parameter(torch.ones(()))
        self.outputs: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        one, other = (self.layer(torch.randn(self.shape)) for _ in range(2))
        self.outputs.append((one.detach(), other.detach()))
        return self.scale * one.mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@every_kind
def test_at_rate_one_nothing_of_the_input_passes_and_at_zero_everything(kind, plain_trainer):
    make, path, attribute, shape = KINDS[kind]
    model = Holder(make(), shape)
    plain_trainer(callbacks=[aux.DropoutSchedule(p=1.0, until=2)]).fit(model, rows())

    assert len(model.outputs) == 6
    for one, other in model.outputs[:2]:
        assert torch.equal(one, other)
    for one, other in model.outputs[2:]:
        assert not torch.isclose(one, other).any(dim=0).all()
    assert getattr(model.get_submodule(path), attribute) == 0.11


@every_kind
def test_at_rate_zero_the_output_is_that_of_evaluation(kind, plain_trainer):
    make, _, _, shape = KINDS[kind]
    model = Holder(make(), shape)
    batch = torch.randn(shape)

    def training_step(_: Any, batch_idx: int) -> Tensor:
        model.outputs.append((model.layer(batch).detach(), batch))
        return model.scale * 1.0

    model.training_step = training_step
    plain_trainer(callbacks=[aux.DropoutSchedule(p=0.0, mode="standard")]).fit(model, rows(8))
    expected = model.eval().layer(batch)
    for output, _ in model.outputs:
        torch.testing.assert_close(output, expected)


class Power(nn.Module):
    """Has a ``p`` that is not a rate."""

    p = 3.0


class Stack(Classifier):
    """Blocks with rates of their own, and things that look like a rate but are none."""

    def __init__(self) -> None:
        super().__init__(dropout=0.01)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"drop": nn.Dropout(0.1 * (place + 1)), "path": DropPath(0.05)})
            for place in range(3)
        )
        self.power = Power()
        self.single = nn.LSTM(4, 3, 1)
        self.noted: list[dict[str, float]] = []

    def rates(self) -> dict[str, float]:
        blocks = {f"blocks.{place}": block for place, block in enumerate(self.blocks)}
        return {
            "encoder.2": self.encoder[2].p,
            **{f"{path}.drop": block["drop"].p for path, block in blocks.items()},
            **{f"{path}.path": block["path"].drop_prob for path, block in blocks.items()},
            "power": self.power.p,
            "single": self.single.dropout,
        }

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.noted.append(self.rates())
        return super().training_step(batch, batch_idx)


ALL = {"encoder.2", *(f"blocks.{n}.{kind}" for n in range(3) for kind in ("drop", "path"))}


@pytest.mark.parametrize(
    ("glob", "driven"),
    [
        ("*", ALL),
        ("blocks.*", ALL - {"encoder.2"}),
        ("*.path", {f"blocks.{n}.path" for n in range(3)}),
        ("blocks.[02].drop", {"blocks.0.drop", "blocks.2.drop"}),
        ("encoder.2", {"encoder.2"}),
    ],
)
def test_the_glob_says_what_is_driven_and_the_rest_keeps_its_rate(glob, driven, plain_trainer):
    model = Stack()
    before = model.rates()
    schedule = aux.DropoutSchedule(0.9, mode="standard", modules=glob)
    plain_trainer(callbacks=[schedule]).fit(model, rows())
    for noted in model.noted:
        assert noted == {path: 0.9 if path in driven else rate for path, rate in before.items()}
    assert model.rates() == before


def test_a_compiled_part_is_reached_by_its_own_path(plain_trainer):
    model = Holder(nn.Sequential(nn.Dropout(0.5), nn.Identity()), (6, 4))
    model.layer = torch.compile(model.layer, backend="eager")
    schedule = aux.DropoutSchedule(1.0, until=3, modules="layer.0")
    plain_trainer(callbacks=[schedule]).fit(model, rows())
    zero = [not one.any() for one, _ in model.outputs]
    assert zero == [True] * 3 + [False] * 3


def test_layers_made_in_configure_model_are_found(plain_trainer):
    class Late(Classifier):
        def configure_model(self) -> None:
            self.encoder[2] = nn.Dropout(0.2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert self.encoder[2].p == 0.7
            return super().training_step(batch, batch_idx)

    model = Late()
    plain_trainer(callbacks=[aux.DropoutSchedule(0.7, mode="standard")]).fit(model, rows())
    assert model.encoder[2].p == 0.2


# ------------------------------------------------------------------------------------- messages
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": -0.1, "until": 3}, r"p=-0\.1 is not a rate"),
        ({"p": float("nan"), "until": 3}, r"p=nan is not a rate"),
        ({"p": 0.1, "mode": "late"}, r"mode='late' takes start= .*start='50%'"),
        ({"p": 0.1, "until": 3, "shape": "sawtooth"}, r"dropout_schedule: .*not 'sawtooth'"),
        ({"p": 0.1, "until": "half"}, r"(?s)dropout_schedule: .*half.*\^"),
        ({"p": 0.1, "until": "130%"}, r"(?s)130%.*more than the whole training"),
        ({"p": 0.1, "until": 2.5}, r"(?s)2\.5 has no unit of time"),
        ({"p": 0.1, "until": 3, "name": "a/b"}, r"the name 'a/b' cannot be used in log keys"),
        ({"p": 2, "until": 3, "name": "mine"}, r"^mine: p=2"),
    ],
)
def test_values_that_no_schedule_can_have_are_refused_when_it_is_made(arguments, message):
    with pytest.raises(AuxiliaryError, match=message):
        aux.DropoutSchedule(**arguments)


def refusal(model: L.LightningModule, schedule: aux.DropoutSchedule, trainer: Any) -> str:
    with pytest.raises(AuxiliaryError) as caught:
        trainer(callbacks=[schedule]).fit(model, rows())
    return str(caught.value)


def test_a_window_that_ends_before_it_begins_is_refused(plain_trainer):
    schedule = aux.DropoutSchedule(0.1, mode="standard", start="80%", until="20%")
    said = refusal(Stack(), schedule, plain_trainer)
    assert said.startswith("dropout_schedule: ")
    assert "the times must be in order" in said


def test_percent_of_a_training_without_end_is_refused(plain_trainer):
    model = Stack()
    before = model.rates()
    with pytest.raises(AuxiliaryError, match=r"dropout_schedule: 50%.*max_steps/max_epochs"):
        plain_trainer(max_epochs=-1, callbacks=[aux.DropoutSchedule(0.1, until="50%")]).fit(
            model, rows()
        )
    assert model.noted == []
    assert model.rates() == before
