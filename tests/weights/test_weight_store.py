"""``WeightStore``: values for any module, exchanged for a forward and put back whatever happens."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_aux as aux
from lightning_aux.weights import WeightStore
from tests.engine.small_models import Blind, Classifier, equal, rows, weights


class LastOutput(nn.Module):
    """The last output of an RNN."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x[:, None, :].expand(-1, 3, -1))[0][:, -1]


class Tied(nn.Module):
    """One weight under two names, and a buffer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 8)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.inner.weight
        self.register_buffer("scale", torch.ones(1))
        self.second.register_buffer("scale", self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.second(torch.tanh(self.inner(x))) * self.scale)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 8),
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)),
    "two-layer LSTM": lambda: LastOutput(nn.LSTM(4, 8, num_layers=2, batch_first=True)),
    "GRU": lambda: LastOutput(nn.GRU(4, 8, batch_first=True)),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
    "tied": Tied,
    "weight_norm, old": lambda: weight_norm(nn.Linear(4, 8)),
    "weight_norm, new": lambda: parametrizations.weight_norm(nn.Linear(4, 8)),
    "spectral_norm, old": lambda: spectral_norm(nn.Linear(4, 8)),
    "spectral_norm, new": lambda: parametrizations.spectral_norm(nn.Linear(4, 8)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
}


class Around(Classifier):
    """A classifier around any module."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__(lr=0.1)
        self.encoder = make()
        with torch.no_grad():
            width = self.eval().encoder(torch.randn(2, 4)).flatten(1).shape[1]
        self.train()
        self.classifier = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.encoder(x * x.new_tensor([1.0, 1.0, 1.0, 0.01])).flatten(1))


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*")
@pytest.mark.parametrize("kind", MODULES)
def test_f75_the_pass_with_a_teachers_weights_is_that_of_a_module_that_has_them(
    kind, plain_trainer
):
    """Copied by rebuilding and ``load_state_dict``: ``deepcopy`` refuses some of these (F75)."""
    torch.manual_seed(8)
    model = Around(MODULES[kind])
    reference = Around(MODULES[kind])
    reference.load_state_dict(model.state_dict())
    reference.eval()
    initial = Around(MODULES[kind])
    initial.load_state_dict(model.state_dict())

    def look(step: aux.Step) -> bool:
        # "copy": the teacher has its weights and the live module's buffers of the last update.
        with torch.no_grad():
            expected = reference(step.batch[0])
        taught = step.teacher("frozen").logits
        return bool(torch.allclose(taught, expected, atol=1e-6))

    probe = Blind(look)
    plain_trainer(max_epochs=2, callbacks=[probe, aux.FrozenTeacher()]).fit(model, rows())
    assert probe.seen == [True] * 12
    changed = [n for n, v in weights(model).items() if not torch.equal(v, initial.state_dict()[n])]
    assert any(name.startswith("encoder") for name in changed)


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*")
@pytest.mark.parametrize("kind", MODULES)
def test_training_with_a_teacher_that_nobody_listens_to_is_training_without(kind, plain_trainer):
    results = []
    for callbacks in ([], [aux.EMATeacher(0.5), Blind(lambda step: step.teacher("ema").logits)]):
        torch.manual_seed(8)
        model = Around(MODULES[kind])
        plain_trainer(max_epochs=2, callbacks=callbacks).fit(model, rows())
        results.append(weights(model))
    assert equal(*results)


def test_the_flat_weights_of_an_lstm_are_exchanged_too():
    """cuDNN and the CPU kernels read the list that the LSTM keeps, not its attributes."""
    lstm = nn.LSTM(4, 8, num_layers=2)
    other = nn.LSTM(4, 8, num_layers=2)
    store = WeightStore(lstm)
    store.load_state_dict(other.state_dict(), "test")
    x = torch.randn(5, 2, 4)
    own, _ = lstm(x)
    with store.in_place(), torch.no_grad():
        assert all(
            mine is getattr(lstm, name)
            for mine, name in zip(lstm._flat_weights, lstm._flat_weights_names, strict=True)
        )
        assert torch.equal(lstm(x)[0], other(x)[0])
    assert torch.equal(lstm(x)[0], own)


def test_f75_tied_weights_are_held_once_and_stay_tied():
    module = Tied()
    store = WeightStore(module)
    assert sorted(store.state_dict()) == [
        "inner.bias", "inner.weight", "outer.bias", "outer.weight", "scale", "second.bias",
    ]  # fmt: skip
    with torch.no_grad():
        module.inner.weight.add_(1)
    store.update(0.0)
    live = module.inner.weight
    with store.in_place():
        assert module.inner.weight is live
        assert module.second.weight is live
        assert module.inner.weight.data_ptr() == store.state_dict()["inner.weight"].data_ptr()
    assert module.second.weight is module.inner.weight


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_f11_whatever_is_raised_inside_the_users_weights_come_back(error):
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    store = WeightStore(module)
    with torch.no_grad():
        for value in (*module.parameters(), *module.buffers()):
            value.add_(1)
    before, pointers = weights(module), [p.data_ptr() for p in module.parameters()]
    buffers = dict(module.named_buffers())
    with pytest.raises(error), store.in_place():  # noqa: PT012
        assert not equal(weights(module), before)
        raise error
    assert equal(weights(module), before)
    assert [p.data_ptr() for p in module.parameters()] == pointers
    assert all(buffers[name] is buffer for name, buffer in module.named_buffers())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_teachers_pass_leaves_the_students_weights_and_modes(error, plain_trainer):
    class Fragile(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            if not self.training and self.trainer.global_step == 3:
                during.update(weights(self))
                raise error("in the teacher's pass")
            return logits

        def on_train_batch_start(self, *_: Any) -> None:
            live.clear()
            live.update(weights(self))

    live: dict[str, Tensor] = {}
    during: dict[str, Tensor] = {}
    model = Fragile()
    callbacks = [aux.EMATeacher(decay=0.5), aux.SelfDistillation()]
    trainer = plain_trainer(callbacks=callbacks)
    expected = error if error is RuntimeError else (KeyboardInterrupt, SystemExit)
    with pytest.raises(expected):
        trainer.fit(model, rows())
    assert not equal(during, live)
    assert equal(weights(model), live)
    assert all(module.training for module in model.modules())


def test_the_students_graph_survives_the_exchange():
    """Forward, exchange, exchange back, backward: the gradients are those without an exchange."""
    gradients = []
    for exchanged in (False, True):
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        store = WeightStore(module)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(2)
        x = torch.randn(5, 4)
        loss = module(x).square().sum()
        if exchanged:
            with store.in_place(), torch.no_grad():
                module(x)
        loss.backward()
        gradients.append({n: p.grad for n, p in module.named_parameters()})
    assert equal(*gradients)


def test_f75_a_module_without_shapes_yet_is_a_named_error(plain_trainer):
    class Lazy(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.LazyLinear(8), nn.Tanh())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.classifier.parameters(), lr=0.1)

    message = r"ema: 'encoder\.0\.weight', 'encoder\.0\.bias' has no shape yet"
    with pytest.raises(aux.AuxiliaryError, match=message):
        plain_trainer(callbacks=[aux.EMATeacher()]).fit(Lazy(), rows())


def test_a_module_that_replaces_its_buffers_gets_its_new_ones_back():
    module = nn.BatchNorm1d(3)
    store = WeightStore(module)
    fresh = torch.full((3,), 5.0)
    module.running_mean = fresh
    with store.in_place():
        assert module.running_mean is not fresh
    assert module.running_mean is fresh
    store.update_buffers(0.0)
    assert torch.equal(store.state_dict()["running_mean"], fresh)
    fresh.data = torch.full((5,), 6.0)  # grown where it is
    store.update_buffers(0.0)
    assert torch.equal(store.state_dict()["running_mean"], torch.full((5,), 6.0))


def test_a_buffer_that_two_modules_share_is_exchanged_in_both_and_shared_again():
    module = Tied()
    store = WeightStore(module)
    live = module.scale
    live.add_(1)
    with store.in_place():
        assert module.scale is module.second.scale is store.state_dict()["scale"]
        assert float(module.scale) == 1.0
    assert module.scale is module.second.scale is live


def test_stores_in_each_other_and_all_of_them_aside():
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    sets = [weights(module)]
    stores = []
    for _ in range(2):
        with torch.no_grad():
            for value in (*module.parameters(), *module.buffers()):
                value.add_(1)
        sets.append(weights(module))
        stores.append(WeightStore(module))
    with torch.no_grad():
        for value in (*module.parameters(), *module.buffers()):
            value.add_(1)
    live, (one, other), (_, first, second) = weights(module), stores, sets
    with one.in_place(), one.in_place():
        with other.in_place():
            assert equal(weights(module), second)
            for each in stores:
                with each.aside():
                    assert equal(weights(module), live)
                assert equal(weights(module), second)
            with pytest.raises(aux.AuxiliaryError, match="already, under others"), one.in_place():
                pass
        assert equal(weights(module), first)
    assert equal(weights(module), live)
    one._exchange(False, None)  # as Ctrl-C may leave them
    other._exchange(False, None)
    one.restore()
    other.restore()
    assert equal(weights(module), live)


@pytest.mark.parametrize("shared", [False, True])
def test_an_evaluation_writes_into_the_module_and_not_into_the_average(shared):
    module = Tied()
    if not shared:
        module.second.scale = module.scale.clone()
    store = WeightStore(module)
    module.scale.fill_(7.0)
    live = module.scale
    with store.in_place(evaluating=True):
        assert float(module.scale) == 1.0
        assert (module.second.scale is module.scale) == shared
        module.scale += 1
    assert module.scale is live
    assert float(module.scale) == 2.0
    assert (module.second.scale is module.scale) == shared
    assert float(store.state_dict()["scale"]) == 1.0
    with store.in_place(evaluating=True):  # from now on it is the live one
        assert float(module.scale) == 2.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averaged_buffers_of_half_precision_are_averaged_in_float32(dtype):
    module = nn.BatchNorm1d(3).to(dtype)
    store = WeightStore(module, "average")
    expected = torch.zeros(3, dtype=torch.float64)
    for _ in range(300):
        module.running_mean.fill_(1.0)
        store.update_buffers(0.999)
        expected = 0.999 * expected + 0.001
    held = store.state_dict()["running_mean"]
    assert held.dtype == torch.float32
    assert torch.allclose(held.double(), expected, atol=1e-6)
    for evaluating in (False, True):
        with store.in_place(evaluating):
            assert torch.equal(module.running_mean, held.to(dtype))
    store.give()
    assert torch.equal(module.running_mean, held.to(dtype))


def test_a_store_made_before_the_module_is_cast_has_its_values_in_the_new_dtype():
    module = nn.BatchNorm1d(3)
    store = WeightStore(module, "average")
    module.to(torch.bfloat16)
    module.running_mean.fill_(5.0)
    with store.in_place():
        assert torch.equal(module.running_mean, torch.zeros(3, dtype=torch.bfloat16))
    store.update_buffers(0.5)
    assert torch.equal(store.state_dict()["running_mean"], torch.full((3,), 2.5))


def test_weights_are_read_from_a_state_dict_of_a_module_with_compiled_parts():
    module = nn.Sequential(nn.Linear(4, 8))
    store = WeightStore(module)
    compiled = nn.Sequential(torch.compile(nn.Linear(4, 8), backend="eager"))
    store.load_state_dict(compiled.state_dict(), "test")
    assert torch.equal(store.state_dict()["0.weight"], compiled.state_dict()["0._orig_mod.weight"])


class Counting(TorchDispatchMode):
    """The names of all tensor operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_f77_an_update_is_one_operation_for_each_dtype_however_many_tensors():
    module = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(20)))
    store = WeightStore(module)
    with torch.no_grad(), Counting() as weights_moved:
        store.update(0.9)
    assert weights_moved.names == ["_foreach_lerp_"]
    with Counting() as buffers_moved:
        store.update_buffers(0.9)
    # Of the live buffers' floats and of their counters.
    assert buffers_moved.names == ["_foreach_copy_", "_foreach_copy_"]


def test_a_copy_of_the_callbacks_is_not_attached(plain_trainer):
    teacher = aux.EMATeacher(decay=0.5)
    plain_trainer(max_steps=1, callbacks=[teacher]).fit(Classifier(), rows())
    for copied in (deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert copied.hyperparameters["decay"] == 0.5
        assert copied.store is None
        with pytest.raises(aux.AuxiliaryError, match="ema is not attached"):
            _ = copied.engine


class Scaled(nn.Module):
    """A layer in a wrapper that has a weight of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8, 4), 3.0))
        self.inner = inner


def test_a_wrapper_with_a_parameter_of_the_same_name_takes_no_others_value():
    module = nn.Sequential(nn.Linear(4, 8))
    store = WeightStore(module)
    first = module[0].weight.detach().clone()
    with torch.no_grad():
        module[0].weight.add_(1.0)
    module[0] = Scaled(module[0])
    store.update(0.5)
    state = store.state_dict()
    assert torch.allclose(state["0.inner.weight"], first + 0.5)
    assert torch.equal(state["0.weight"], torch.full((8, 4), 3.0))


# ------------------------------------------------------------------------ a thousand updates
def thousand_updates(decays: list[float]) -> tuple[WeightStore, list[Tensor]]:
    """The store after them, and all the weights that the module had."""
    module = nn.Linear(8, 4)
    store = WeightStore(module)
    history = [module.weight.detach().double()]
    generator = torch.Generator().manual_seed(4)
    for decay in decays:
        with torch.no_grad():
            step = torch.randn(4, 8, generator=generator) * 0.02
            module.weight.copy_((module.weight + step).clamp(-1, 1))
        history.append(module.weight.detach().double())
        store.update(decay)
    return store, history


RULES: dict[str, Callable[[int], float]] = {
    "constant": lambda n: 0.999,
    "fast": lambda n: 0.9,
    "warm-up": lambda n: min(0.999, (1 + n) / (10 + n)),
    "half-life": lambda n: 0.5 ** (1 / 50),
    "cosine": lambda n: 1 - 0.004 * (math.cos(math.pi * n / 1000) + 1) / 2,
    "power function": lambda n: (1 - 1 / (n + 1)) ** 7.94,
    "equal": lambda n: (n + 1) / (n + 2),
}


@pytest.mark.parametrize("rule", RULES)
def test_f18_after_a_thousand_updates_it_is_the_closed_form_within_the_range_of_its_history(rule):
    """Σ c_k θ_k in float64, with c_k = (1 − d_k) Π_{j > k} d_j."""
    decays = [RULES[rule](n) for n in range(1000)]
    store, history = thousand_updates(decays)
    shares, product = [], 1.0
    for decay in reversed(decays):
        shares.append((1 - decay) * product)
        product *= decay
    shares = [product, *reversed(shares)]
    assert sum(shares) == pytest.approx(1)
    expected = sum(share * each for share, each in zip(shares, history, strict=True))
    found = store.state_dict()["weight"].double()
    assert float((found - expected).abs().max()) < 1e-6
    seen = torch.stack(history)
    assert (found >= seen.amin(0) - 1e-7).all()
    assert (found <= seen.amax(0) + 1e-7).all()
