"""``DropoutSchedule``: the published rate in every step, on every kind of module, and undone."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_aux as aux
from lightning_aux.functional import dropout_rate
from tests.engine.small_models import WIDTH, Blind, Classifier, rows


class Dropping(Classifier):
    """Notes the rate of its dropout and the optimizer steps taken, in every training step."""

    def __init__(self) -> None:
        super().__init__(dropout=0.123)
        self.rates: list[tuple[int, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.rates.append((self.trainer.global_step, self.encoder[2].p))
        return super().training_step(batch, batch_idx)


def random_settings(seed: int, fewest_epochs: int = 1) -> dict[str, Any]:
    choose = random.Random(seed)
    mode = choose.choice(["early", "early", "late", "standard"])
    epochs, batches = choose.randint(fewest_epochs, 5), choose.randint(2, 9)
    accumulate = choose.randint(1, 4)
    per_epoch = math.ceil(batches / accumulate)
    total = epochs * per_epoch
    unit = choose.choice(["steps", "ep", "%"])
    steps = choose.randint(1, total)
    if unit == "ep":
        whole = choose.randint(1, epochs)
        written, cut = f"{whole}ep", whole * per_epoch
    elif unit == "%":
        percent = choose.choice([10, 25, 50, 70, 100])
        written, cut = f"{percent}%", math.floor(percent * total / 100 + 0.5)
    else:
        written, cut = choose.choice([steps, f"{steps} steps"]), steps
    return {
        "mode": mode,
        "p": choose.choice([0.05, 0.3, 0.5, 1.0]),
        "shape": "constant" if mode == "standard" else choose.choice(["constant", "linear"]),
        "written": written,
        "cut": cut,
        "total": total,
        "trainer": {"max_epochs": epochs, "accumulate_grad_batches": accumulate},
        "batches": batches,
    }


def callback(settings: dict[str, Any]) -> aux.DropoutSchedule:
    bound = {"early": "until", "late": "start"}.get(settings["mode"])
    cut = {bound: settings["written"]} if bound else {}
    return aux.DropoutSchedule(settings["p"], mode=settings["mode"], shape=settings["shape"], **cut)


def published(settings: dict[str, Any], step: int) -> float:
    bound = {"early": "until", "late": "start"}.get(settings["mode"])
    cut = {bound: settings["cut"]} if bound else {}
    return dropout_rate(
        step, settings["p"], settings["mode"], settings["total"], shape=settings["shape"], **cut
    )


@pytest.mark.parametrize("seed", range(30))
def test_the_rate_of_every_step_is_the_published_rule(seed, plain_trainer):
    settings = random_settings(seed)
    model = Dropping()
    trainer = plain_trainer(callbacks=[callback(settings)], **settings["trainer"])
    trainer.fit(model, rows(4 * settings["batches"], 4))
    assert trainer.global_step == settings["total"]
    assert len(model.rates) == settings["batches"] * settings["trainer"]["max_epochs"]
    for step, rate in model.rates:
        assert rate == pytest.approx(published(settings, step), abs=1e-12)
    assert model.encoder[2].p == 0.123


@pytest.mark.parametrize("seed", range(30))
def test_after_a_resume_in_the_middle_every_rate_is_the_published_rule(
    seed, plain_trainer, tmp_path
):
    settings = random_settings(seed, fewest_epochs=2)
    stopped = settings["trainer"]["max_epochs"] // 2
    loader = rows(4 * settings["batches"], 4)
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, enable_version_counter=False)
    whole = plain_trainer(
        callbacks=[callback(settings), saving], enable_checkpointing=True, **settings["trainer"]
    )
    uninterrupted = Dropping()
    whole.fit(uninterrupted, loader)
    resumed = Dropping()
    plain_trainer(callbacks=[callback(settings)], **settings["trainer"]).fit(
        resumed, loader, ckpt_path=tmp_path / f"epoch={stopped - 1}.ckpt"
    )
    assert resumed.rates == uninterrupted.rates[stopped * settings["batches"] :]
    assert resumed.rates
    assert all(rate == pytest.approx(published(settings, step)) for step, rate in resumed.rates)


def test_a_window_with_both_ends_is_on_between_them(plain_trainer):
    model = Dropping()
    schedule = aux.DropoutSchedule(0.4, mode="standard", start="1ep", until="75%")
    plain_trainer(max_epochs=4, callbacks=[schedule]).fit(model, rows())
    assert [rate for _, rate in model.rates] == [0.0] * 6 + [0.4] * 12 + [0.0] * 6


# --------------------------------------------------------------------------------------- modules
class DropPath(nn.Module):
    """Stochastic depth as in timm: the rate is ``drop_prob``."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        return x * x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.drop_prob)


class StochasticDepth(nn.Module):
    """Stochastic depth as in torchvision: the rate is ``p``, the class is known by its name."""

    def __init__(self, p: float, mode: str = "row") -> None:
        super().__init__()
        self.p, self.mode = p, mode

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        return x * x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.p)


class Probability(nn.Module):
    """Has a ``p`` that is no dropout rate."""

    p = 0.9

    def forward(self, x: Tensor) -> Tensor:
        return x


KINDS: dict[str, tuple[Any, str]] = {
    "Dropout": (lambda: nn.Dropout(0.11), "p"),
    "Dropout1d": (lambda: nn.Dropout1d(0.11), "p"),
    "Dropout2d": (lambda: nn.Dropout2d(0.11), "p"),
    "Dropout3d": (lambda: nn.Dropout3d(0.11), "p"),
    "AlphaDropout": (lambda: nn.AlphaDropout(0.11), "p"),
    "FeatureAlphaDropout": (lambda: nn.FeatureAlphaDropout(0.11), "p"),
    "DropPath": (lambda: DropPath(0.11), "drop_prob"),
    "StochasticDepth": (lambda: StochasticDepth(0.11), "p"),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(8, 2, dropout=0.11), "dropout"),
    "LSTM": (lambda: nn.LSTM(8, 8, num_layers=2, dropout=0.11), "dropout"),
    "GRU": (lambda: nn.GRU(8, 8, num_layers=3, dropout=0.11), "dropout"),
    "RNN": (lambda: nn.RNN(8, 8, num_layers=2, dropout=0.11), "dropout"),
}


class Holding(Classifier):
    """Holds one more module and notes its rate."""

    def __init__(self, **held: nn.Module) -> None:
        super().__init__(dropout=0.123)
        self.held = nn.ModuleDict(held)
        self.rates: list[list[float]] = []
        self.attributes: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        modules = [*self.held.values(), self.encoder[2]]
        self.rates.append([getattr(m, a) for m, a in zip(modules, self.attributes, strict=False)])
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_dropout_is_driven_and_given_back(kind, plain_trainer):
    make, attribute = KINDS[kind]
    model = Holding(it=make())
    model.attributes = [attribute, "p"]
    plain_trainer(callbacks=[aux.DropoutSchedule(0.4, until=3)]).fit(model, rows())
    assert model.rates == [[0.4, 0.4]] * 3 + [[0.0, 0.0]] * 3
    assert getattr(model.held["it"], attribute) == 0.11
    assert model.encoder[2].p == 0.123


def test_an_rnn_of_one_layer_and_a_p_that_is_no_rate_are_left_alone(plain_trainer):
    model = Holding(one=nn.LSTM(8, 8), other=Probability())
    model.attributes = ["dropout", "p", "p"]
    plain_trainer(callbacks=[aux.DropoutSchedule(0.4, until=3)]).fit(model, rows())
    assert model.rates == [[0.0, 0.9, 0.4]] * 3 + [[0.0, 0.9, 0.0]] * 3


def test_a_glob_drives_only_what_it_names(plain_trainer):
    model = Holding(a=nn.Dropout(0.2), b=nn.Dropout(0.3))
    model.attributes = ["p", "p", "p"]
    plain_trainer(callbacks=[aux.DropoutSchedule(0.5, until="50%", modules="held.*")]).fit(
        model, rows()
    )
    assert model.rates == [[0.5, 0.5, 0.123]] * 3 + [[0.0, 0.0, 0.123]] * 3


def test_what_is_driven_is_said_in_a_table_at_the_start(plain_trainer, caplog):
    schedule = aux.DropoutSchedule(0.25, until=5)
    plain_trainer(callbacks=[schedule]).fit(Dropping(), rows())
    (text,) = [each.message for each in caplog.records if "drives" in each.message]
    said, head, row = text.splitlines()
    assert said == "lightning_aux: dropout_schedule drives"
    assert head.split() == ["where", "what", "before", "schedule"]
    assert row.split(maxsplit=3) == ["encoder.2", "Dropout.p", "0.123", str(schedule.schedule)]


def test_two_schedules_drive_a_part_each(plain_trainer):
    model = Holding(a=nn.Dropout(0.2))
    model.attributes = ["p", "p"]
    early = aux.DropoutSchedule(0.5, until="50%", modules="held.a", name="early")
    late = aux.DropoutSchedule(0.6, mode="late", start="50%", modules="encoder.*", name="late")
    plain_trainer(callbacks=[early, late]).fit(model, rows())
    assert model.rates == [[0.5, 0.0]] * 3 + [[0.0, 0.6]] * 3
    assert (model.held["a"].p, model.encoder[2].p) == (0.2, 0.123)


def test_rates_of_the_users_own_that_differ_are_each_given_back(plain_trainer):
    model = Holding(a=nn.Dropout(0.2), b=nn.MultiheadAttention(8, 2, dropout=0.3), c=DropPath(0.4))
    plain_trainer(callbacks=[aux.DropoutSchedule(0.5, mode="standard")]).fit(model, rows())
    rates = model.held["a"].p, model.held["b"].dropout, model.held["c"].drop_prob
    assert rates == (0.2, 0.3, 0.4)


def test_rates_are_given_back_when_training_fails(plain_trainer):
    class Failing(Dropping):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise RuntimeError("failed")
            return super().training_step(batch, batch_idx)

    model = Failing()
    with pytest.raises(RuntimeError, match="failed"):
        plain_trainer(callbacks=[aux.DropoutSchedule(0.5, mode="standard")]).fit(model, rows())
    assert [rate for _, rate in model.rates] == [0.5, 0.5]
    assert model.encoder[2].p == 0.123


# ------------------------------------------------------------------------------- what really drops
class Wide(Classifier):
    """Ones through dropout: the share of zeros is the rate."""

    def __init__(self, dropping: nn.Module) -> None:
        super().__init__()
        self.dropping = dropping
        self.shares: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ones = torch.ones(20_000, 1)
        self.shares.append(float((self.dropping(ones) == 0).float().mean()))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("make", [lambda: nn.Dropout(0.0), lambda: DropPath(0.0)])
def test_the_share_that_is_dropped_follows_the_schedule(make, plain_trainer):
    model = Wide(make())
    schedule = aux.DropoutSchedule(0.6, until="100%", shape="linear", modules="dropping")
    plain_trainer(max_epochs=2, callbacks=[schedule]).fit(model, rows())
    expected = [dropout_rate(k, 0.6, "early", 12, until=12, shape="linear") for k in range(12)]
    assert model.shares == pytest.approx(expected, abs=0.02)  # five standard deviations
    assert expected[0] == 0.6
    assert expected[-1] == 0.0


def test_the_rate_inside_a_two_layer_lstm_is_the_one_that_is_driven(plain_trainer):
    """With the rate 1 between the layers, the second layer sees nothing of the input."""

    class Recurrent(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.LSTM(WIDTH, 8, num_layers=2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.encoder(x[:, None])[0][:, -1])

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self(batch[0])
            spread.append(float((logits - logits[:1]).abs().max()))
            return F.cross_entropy(logits, batch[1])

    spread: list[float] = []
    plain_trainer(callbacks=[aux.DropoutSchedule(1.0, until=3)]).fit(Recurrent(), rows())
    assert max(spread[:3]) < 1e-6
    assert min(spread[3:]) > 1e-4


def test_a_teachers_pass_drops_nothing_whatever_the_rate(plain_trainer):
    model = Classifier()
    probe = Blind(lambda step: torch.equal(step.teacher("one").logits, step.teacher("two").logits))
    teachers = [aux.FrozenTeacher("one"), aux.FrozenTeacher("two")]
    schedule = aux.DropoutSchedule(0.7, mode="standard")
    plain_trainer(callbacks=[schedule, *teachers, probe]).fit(model, rows())
    assert probe.seen == [True] * 6


# ------------------------------------------------------------------------------------- refusals
def test_a_model_without_dropout_is_told_what_was_looked_for(plain_trainer):
    class Without(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh())

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError("trained")

    with pytest.raises(aux.AuxiliaryError) as raised:
        plain_trainer(callbacks=[aux.DropoutSchedule(0.1, until="50%")]).fit(Without(), rows())
    for sought in ("nn.Dropout*", "nn.AlphaDropout", "drop_prob", "StochasticDepth",
                   "nn.MultiheadAttention", "nn.RNN/LSTM/GRU", "Add nn.Dropout(0.0)"):  # fmt: skip
        assert sought in str(raised.value)


def test_a_glob_that_names_no_dropout_lists_near_ones(plain_trainer):
    schedule = aux.DropoutSchedule(0.1, until="50%", modules="encoder.1")
    with pytest.raises(aux.AuxiliaryError, match=r"matching 'encoder\.1'.*'encoder\.2'"):
        plain_trainer(callbacks=[schedule]).fit(Classifier(), rows())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 1.5, "until": 3}, r"p=1\.5 is not a rate"),
        ({"p": 0.1, "mode": "soon"}, r"mode='soon' is unknown.*'standard', 'early', 'late'"),
        ({"p": 0.1}, r"mode='early' takes until= and only that"),
        ({"p": 0.1, "mode": "late", "until": 3}, "mode='late' takes start= and only that"),
        ({"p": 0.1, "until": 3, "start": 1}, r"a window with both ends is mode='standard'"),
        ({"p": 0.1, "mode": "standard", "shape": "linear"}, "shape='linear' needs mode="),
        ({"p": 0.1, "until": "50 percents"}, "dropout_schedule: "),
        ({"p": 0.1, "until": -1}, "cannot be negative"),
    ],
)
def test_bad_arguments_are_refused_when_it_is_made(arguments, message):
    with pytest.raises(aux.AuxiliaryError, match=message):
        aux.DropoutSchedule(**arguments)


def test_epochs_of_a_stream_are_refused_before_the_first_step(plain_trainer):
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from rows()

    class Never(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError("trained")

    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    with pytest.raises(aux.AuxiliaryError, match=r"dropout_schedule: .*optimizer steps"):
        plain_trainer(callbacks=[aux.DropoutSchedule(0.1, until="1ep")]).fit(Never(), loader)
