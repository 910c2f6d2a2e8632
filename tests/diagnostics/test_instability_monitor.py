"""``InstabilityMonitor``: its values by hand, nothing on other steps, and one warning of each."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_aux as aux
from lightning_aux.diagnostics import attention_logits, instability_monitor
from tests.contract.models import Classifier, Samples
from tests.contract.training import (
    fit,
    identical,
    loader,
    optimizer_state,
    random_state,
    seeded,
    weights,
)

PREFIX = "aux/instability_monitor/"
WIDTH, HEADS, LENGTH = 8, 2, 5


class Sequences(torch.utils.data.Dataset[Any]):
    def __init__(self, n: int = 24) -> None:
        random = torch.Generator().manual_seed(3)
        self.x = torch.randn(n, LENGTH, WIDTH, generator=random)
        self.y = torch.randint(4, (n,), generator=random)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.y[index]


def sequences() -> DataLoader[Any]:
    return DataLoader(Sequences(), batch_size=8)


class Transformer(L.LightningModule):
    """Two layers of torch's own."""

    def __init__(self, batch_first: bool = True, dropout: float = 0.0, **attention: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 16, dropout=dropout, batch_first=batch_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        for each in self.encoder.layers:
            each.self_attn = nn.MultiheadAttention(
                WIDTH, HEADS, batch_first=batch_first, **attention
            )
            nn.init.normal_(each.self_attn.in_proj_bias)
        self.head = nn.Linear(WIDTH, 4)
        self.batch_first = batch_first
        self.attended: list[tuple[nn.Module, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x)
        return self.head(x.mean(1 if self.batch_first else 0))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Rows(L.Callback):
    """What the loggers are given of ours, by step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        rows = self.rows

        class Logger(L.pytorch.loggers.CSVLogger):
            def log_metrics(self, metrics: Any, step: Any = None) -> None:
                ours = {
                    key.removeprefix(PREFIX): value
                    for key, value in metrics.items()
                    if key.startswith(PREFIX)
                }
                if ours:
                    rows.append({"step": step, **ours})

        trainer.loggers = [Logger(trainer.default_root_dir)]


def watched(module: Any, monitor: Any, data: Any = None, **options: Any) -> list[dict[str, float]]:
    rows = Rows()
    fit(module, [rows, monitor], data, **{"log_every_n_steps": 2, "max_epochs": 2} | options)
    return rows.rows


# --------------------------------------------------------------------------------- the logits
class Noted(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        self.noted = [*getattr(self, "noted", []), z.detach()]
        return z


def test_the_size_of_the_output_logits_is_logged() -> None:
    module = seeded(Noted)
    rows = watched(module, aux.InstabilityMonitor())
    assert [row["step"] for row in rows] == [1, 3, 5, 7, 9]
    for row in rows:
        z = module.noted[int(row["step"])]
        assert row["max_logit"] == pytest.approx(float(z.max()))
        log_z = sum(math.log(sum(math.exp(each) for each in line)) for line in z.tolist()) / len(z)
        assert row["log_z"] == pytest.approx(log_z, abs=1e-6)
        assert "max_attention_logit" not in row


# ------------------------------------------------------------------------------ the attention
def largest(q: Tensor, k: Tensor, heads: int, causal: bool = False) -> float:
    """Over ``(batch, length, heads · d)``, one pair after the other."""
    d = q.shape[-1] // heads
    return max(
        float(x[i, h * d : (h + 1) * d] @ y[j, h * d : (h + 1) * d]) / math.sqrt(d)
        for x, y in zip(q, k, strict=True)
        for h in range(heads)
        for i in range(len(x))
        for j in range(len(y))
        if not causal or j <= i
    )


class AttentionNoted(Transformer):
    """Keeps what each attention layer was called on, by the weights of then."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tops: list[list[float]] = []
        for each in self.encoder.layers:
            each.self_attn.register_forward_pre_hook(self.note, with_kwargs=True)

    def on_train_batch_start(self, *_: Any) -> None:
        self.tops.append([])

    def note(self, module: Any, arguments: Any, keywords: Any) -> None:
        if not self.training:
            return
        x = arguments[0].detach()
        x = x if self.batch_first else x.transpose(0, 1)
        q, k, _ = F.linear(x, module.in_proj_weight, module.in_proj_bias).detach().chunk(3, -1)
        if module.bias_k is not None:
            extra = module.bias_k.detach().expand(len(k), 1, -1)
            self.tops[-1].append(max(largest(q, k, HEADS, self.causal), largest(q, extra, HEADS)))
        else:
            self.tops[-1].append(largest(q, k, HEADS, self.causal))

    causal = False


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias_kv", [False, True])
def test_torchs_attention_is_found_and_its_largest_logit_logged(
    batch_first: bool, causal: bool, bias_kv: bool
) -> None:
    module = seeded(AttentionNoted, batch_first=batch_first, add_bias_kv=bias_kv)
    module.causal = causal
    rows = watched(module, aux.InstabilityMonitor(causal=causal), sequences())
    assert len(rows) == 3
    for row in rows:
        expected = max(module.tops[int(row["step"])])
        assert row["max_attention_logit"] == pytest.approx(expected, rel=1e-5)


class Separate(L.LightningModule):
    """Attention written by hand, with fewer key heads than heads."""

    def __init__(self, shape: str = "flat") -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj = nn.Linear(WIDTH, WIDTH // 2 if shape == "grouped" else WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.q_out, self.k_out = nn.Identity(), nn.Identity()
        self.head = nn.Linear(WIDTH, 4)
        self.tops: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.shape == "fused":
            q, k, _ = self.qkv(x).chunk(3, -1)
        else:
            q, k = self.q_proj(x), self.k_proj(x)
        d = WIDTH // HEADS
        if self.shape == "normalised":
            q = self.q_out(F.normalize(q.unflatten(-1, (HEADS, d)), dim=-1)).flatten(-2)
            k = self.k_out(F.normalize(k.unflatten(-1, (HEADS, d)), dim=-1)).flatten(-2)
        if self.shape == "grouped":  # one key head for both
            k = k.repeat(1, 1, HEADS)
        self.tops.append(largest(q.detach(), k.detach(), HEADS))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(d)).softmax(-1)
        return self.head((scores @ x).mean(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ("flat", {"queries": "*q_proj", "keys": "*k_proj", "heads": HEADS}),
        ("grouped", {"queries": "q_proj", "keys": "k_proj", "heads": HEADS}),
        ("fused", {"queries": "qkv", "keys": "qkv", "heads": HEADS}),
        ("normalised", {"queries": "q_out", "keys": "k_out"}),
    ],
)
def test_other_attention_is_found_by_the_paths_of_its_projections(
    shape: str, arguments: dict[str, Any]
) -> None:
    module = seeded(Separate, shape)
    monitor = aux.InstabilityMonitor(**arguments)
    rows = watched(module, monitor, sequences())
    for row in rows:
        expected = module.tops[int(row["step"])]
        assert row["max_attention_logit"] == pytest.approx(expected, rel=1e-5)


def test_passes_of_teachers_are_none_of_the_step() -> None:
    """A teacher of other weights, run by a term of the same step."""

    def layers(added: list[Any]) -> list[float]:
        monitor, found = aux.InstabilityMonitor(), []

        class Notes(L.Callback):
            def on_train_batch_end(self, *_: Any) -> None:
                found.extend(map(float, monitor.attention_logits.values()))

        fit(seeded(Transformer), [monitor, *added, Notes()], sequences(), log_every_n_steps=1)
        return found

    teacher = aux.RandomTeacher(init="shuffle")
    with_teacher = layers([teacher, aux.SelfDistillation("random", weight=1e-12)])
    assert len(with_teacher) == 12  # two layers in each of six steps
    assert with_teacher == pytest.approx(layers([]), rel=1e-4)


def test_nothing_is_computed_on_steps_that_are_not_logged(monkeypatch: Any) -> None:
    calls: list[str] = []
    for place, name in (
        (attention_logits, "max_attention_logit"),
        (instability_monitor, "logit_size"),
        (instability_monitor, "root_mean_squares"),
    ):
        function = getattr(place, name)

        def counted(*args: Any, name: str = name, function: Any = function, **rest: Any) -> Any:
            calls.append(name)
            return function(*args, **rest)

        monkeypatch.setattr(place, name, counted)
    fit(seeded(Transformer), [aux.InstabilityMonitor()], sequences(), log_every_n_steps=3)
    # Steps 3 and 6 are logged; of the first the forward is looked at, where errors show.
    assert calls.count("logit_size") == 3
    assert calls.count("max_attention_logit") == 6  # two layers
    assert calls.count("root_mean_squares") == 2


# ------------------------------------------------------------------------------ the gradients
class Keeps(torch.optim.Adam):
    """Notes the gradients that it uses."""

    used: list[dict[int, Tensor]]

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        groups = [each for group in self.param_groups for each in group["params"]]
        self.used.append([each.grad.detach().clone() for each in groups])
        super().step()
        return loss


class Optimised(Classifier):
    eps = 1e-8

    def configure_optimizers(self) -> Any:
        self.adam = Keeps(self.parameters(), 0.01, eps=self.eps)
        self.adam.used = []
        return self.adam


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ({}, {}),
        ({}, {"accumulate_grad_batches": 2}),
        ({}, {"gradient_clip_val": 1e-3}),
        ({"manual": True}, {}),
        ({}, {"precision": "bf16-mixed"}),
    ],
    ids=["plain", "accumulated", "clipped", "manual", "bf16"],
)
def test_gradients_are_those_that_the_optimizer_uses(model: Any, options: Any) -> None:
    module = seeded(Optimised, **model)
    compare_with_used(
        module, watched(module, aux.InstabilityMonitor(), loader(40), max_epochs=4, **options)
    )


def test_f53_of_a_manual_step_with_a_gradient_scaler_they_are_not_the_scaled_ones() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    module = seeded(Optimised, manual=True)
    rows = watched(module, aux.InstabilityMonitor(), loader(40), max_epochs=4, plugins=[plugin])
    assert scaler.get_scale() == 2.0**10
    compare_with_used(module, rows)


def compare_with_used(module: Optimised, rows: list[dict[str, float]]) -> None:
    assert rows
    for row in rows:
        used = module.adam.used[int(row["step"])]
        squares = [each.double().square() for each in used]
        each = [float(square.mean().sqrt()) for square in squares if square.ndim > 1]
        whole = torch.cat([square.flatten() for square in squares]).mean().sqrt()
        assert row["gradient_rms"] == pytest.approx(float(whole), rel=1e-5)
        assert row["gradient_rms_min"] == pytest.approx(min(each), rel=1e-5)
        assert row["gradient_rms_over_eps"] == pytest.approx(min(each) / 1e-8, rel=1e-5)


def test_without_an_eps_there_is_no_ratio() -> None:
    rows = watched(seeded(Classifier, optimizer="sgd"), aux.InstabilityMonitor())
    assert all("gradient_rms" in row and "gradient_rms_over_eps" not in row for row in rows)


class Faint(Optimised):
    """The gradient of one tensor is small, and that of another one exactly 0."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.faint = nn.Parameter(torch.ones(3, 2))
        self.silent = nn.Parameter(torch.ones(3, 2))

    def total_loss(self, batch: Any) -> Tensor:
        return super().total_loss(batch) + 1e-12 * self.faint.sum() + 0 * self.silent.sum()


def test_the_tensor_whose_gradient_is_near_eps_is_named_once() -> None:
    with pytest.warns(UserWarning, match="lightning_aux: instability_monitor") as caught:
        rows = watched(seeded(Faint), aux.InstabilityMonitor())
    assert rows[0]["gradient_rms_over_eps"] == pytest.approx(1e-4, rel=1e-3)
    (message,) = [str(each.message) for each in caught if "instability" in str(each.message)]
    assert "the gradient of 'faint' has a root mean square of 0.0001 times" in message
    assert "a smaller eps" in message


# ---------------------------------------------------------------------------------- the alarm
def warned(caught: Any) -> list[str]:
    return [str(each.message) for each in caught if "instability" in str(each.message)]


def test_a_key_bias_which_softmax_does_not_see_is_no_alarm(recwarn: Any) -> None:
    """Its gradient is 0 up to rounding, below any eps."""
    monitor = aux.InstabilityMonitor(queries="q_proj", keys="k_proj", heads=HEADS)
    watched(seeded(Separate), monitor, sequences())
    assert warned(recwarn) == []


def test_each_limit_is_warned_of_once_and_training_goes_on() -> None:
    monitor = aux.InstabilityMonitor(max_attention_logit=1e-3, max_log_z=0.1)
    with pytest.warns(UserWarning, match="instability_monitor") as caught:
        rows = watched(seeded(Transformer), monitor, sequences())
    assert len(rows) == 3
    attention, log_z = warned(caught)
    assert "the largest attention logit is" in attention
    assert "in 'encoder.layers." in attention
    assert "qk-layernorm" in attention
    assert "log Z" in log_z
    assert "ZLoss" in log_z


class Broken(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * math.inf


def test_what_is_not_finite_is_beyond_every_limit_and_no_error_of_ours() -> None:
    with pytest.warns(UserWarning, match="log Z of the output logits is nan"):
        watched(seeded(Broken), aux.InstabilityMonitor(max_log_z=1e6))


def test_none_warns_of_nothing(recwarn: Any) -> None:
    monitor = aux.InstabilityMonitor(
        max_attention_logit=None, max_log_z=None, min_gradient_rms_over_eps=None
    )
    watched(seeded(Faint), monitor)
    assert warned(recwarn) == []


# ------------------------------------------------------------------------------------ no harm
@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"compiled": True}])
def test_training_is_bit_identical(options: dict[str, Any]) -> None:
    options = dict(options)
    compiled = options.pop("compiled", False)

    def trained(added: list[Any]) -> list[Any]:
        module = seeded(Transformer, dropout=0.2)
        if compiled:
            module.compile(backend="aot_eager", fullgraph=True)
        trainer = fit(module, added, sequences(), log_every_n_steps=2, **options)
        return [weights(module), optimizer_state(trainer), random_state()]

    plain = trained([])
    torch._dynamo.reset()
    monitor = aux.InstabilityMonitor()
    assert identical(plain, trained([monitor]))
    torch._dynamo.reset()


def test_compiled_it_finds_what_it_finds_eagerly() -> None:
    found = []
    for compiled in (False, True):
        module = seeded(Transformer)
        if compiled:
            module.compile(backend="aot_eager", fullgraph=True)
        found.append(watched(module, aux.InstabilityMonitor(), sequences()))
        torch._dynamo.reset()
    for eager, other in zip(*found, strict=True):
        assert other == pytest.approx(eager, rel=1e-5)


# ----------------------------------------------------------------------------------- refusals
class Nothing(Classifier):
    def forward(self, x: Tensor) -> Any:
        return {"scores": super().forward(x)}

    def total_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0])["scores"], batch[1])


def test_a_model_without_logits_is_an_error_in_the_first_step_unless_said() -> None:
    with pytest.raises(aux.AuxiliaryError, match="no logits in what Nothing") as caught:
        watched(seeded(Nothing), aux.InstabilityMonitor(), log_every_n_steps=5)
    assert "instability_monitor" in str(caught.value)
    rows = watched(seeded(Nothing), aux.InstabilityMonitor(logits=False))
    assert set(rows[0]) == {"step", "gradient_rms", "gradient_rms_min"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": "q_porj", "keys": "k_proj"}, "Near matches: 'q_proj'"),
        ({"queries": "q_proj", "keys": "*"}, r"names 1 modules and keys='\*'"),
        ({"queries": "q_proj", "keys": "k_proj", "heads": 3}, "heads=3 does not divide"),
        ({"queries": "q_proj", "keys": "k_proj"}, "heads=None does not divide"),
        ({"queries": "k_proj", "keys": "q_proj", "heads": 2}, "the other way round"),
        ({"queries": "head", "keys": "head", "heads": 2}, "not queries, keys and values"),
    ],
)
def test_paths_that_do_not_fit_are_refused_before_anything_is_trained(
    arguments: dict[str, Any], message: str
) -> None:
    module = seeded(Separate)
    before = weights(module)
    with pytest.raises(aux.AuxiliaryError, match=f"instability_monitor: .*{message}"):
        fit(module, [aux.InstabilityMonitor(**arguments)], sequences())
    assert identical(weights(module), before)


def test_queries_without_keys_are_refused() -> None:
    with pytest.raises(aux.AuxiliaryError, match="queries='q' and keys=None"):
        aux.InstabilityMonitor(queries="q")


def test_flattened_parameters_are_refused() -> None:
    """As FSDP1 leaves them, which needs a GPU."""
    module = seeded(Classifier)
    module.head.weight._fsdp_flattened = True
    with pytest.raises(aux.AuxiliaryError, match=r"'head\.weight' is part of a flattened"):
        fit(module, [aux.InstabilityMonitor()], DataLoader(Samples(16), 8))
