"""Teachers that follow the student every so often: each is its rule, written as a loop."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import lightning_aux as aux
from lightning_aux.functional import power_exponent
from lightning_aux.weights.registrations import Registrations
from tests.engine.small_models import Blind, Classifier, equal, largest_difference, rows, weights
from tests.teachers.test_ema_teacher import Walk, recursion


def walk(plain_trainer: Any, teacher: Any, steps: int = 30, **arguments: Any) -> Walk:
    """Random steps of which every epoch has six."""
    model = Walk()
    options = {"max_steps": steps, "max_epochs": -1, "callbacks": [teacher]} | arguments
    plain_trainer(**options).fit(model, rows())
    return model


def mean(sets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(each[name].double() for each in sets) / len(sets) for name in sets[0]}


# --------------------------------------------------------------------------------------- the decay
def test_a_schedule_of_the_decay_is_followed(plain_trainer):
    """τ_k = 1 − (1 − 0.9)·(cos(π k / K) + 1)/2 (Grill et al. 2020, section 3.3)."""
    teacher = aux.EMATeacher("cosine(0.9, 1)")
    history = walk(plain_trainer, teacher).history
    k = torch.arange(30, dtype=torch.float64)
    decays = (1 - 0.1 * (torch.cos(torch.pi * k / 30) + 1) / 2).tolist()
    assert largest_difference(teacher.store.state_dict(), recursion(history, decays)) < 1e-5


@pytest.mark.parametrize(("half_life", "steps"), [(5, 5), ("1ep", 6), ("50%", 15)])
def test_after_a_half_life_the_first_weights_count_half(half_life, steps, plain_trainer):
    teacher = aux.EMATeacher(half_life=half_life)
    history = walk(plain_trainer, teacher, max_epochs=5, max_steps=-1).history
    assert len(history) == 31
    expected = recursion(history, [0.5 ** (1 / steps)] * 30)
    assert largest_difference(teacher.store.state_dict(), expected) < 1e-5


@pytest.mark.parametrize("every", [1, 4])
def test_the_power_function_average_has_its_profile(every, plain_trainer):
    """The weight of step t is proportional to t^γ: β(t) = (1 − 1/t)^(γ + 1) unrolled."""
    teacher = aux.EMATeacher(length=0.1, every=every)
    history = walk(plain_trainer, teacher, steps=400).history
    gamma = power_exponent(0.1)
    used = range(every, 401, every)
    ends = [(t / 400) ** (gamma + 1) for t in (0, *used)]
    shares = [later - earlier for earlier, later in pairwise(ends)]
    assert sum(shares) == pytest.approx(1)
    expected = {
        name: sum(share * history[t][name].double() for share, t in zip(shares, used, strict=True))
        for name in history[0]
    }
    assert largest_difference(teacher.store.state_dict(), expected) < 1e-5
    t = torch.tensor(list(used), dtype=torch.float64) / 400
    share = torch.tensor(shares, dtype=torch.float64)
    deviation = ((share * t**2).sum() - (share * t).sum() ** 2).sqrt()
    assert float(deviation) == pytest.approx(0.1, rel=0.02)


def test_a_decay_that_leaves_its_bounds_is_named(plain_trainer):
    with pytest.raises(aux.AuxiliaryError, match=r"decay='linear.*' is 1\.0\d+ after 1 optimizer"):
        walk(plain_trainer, aux.EMATeacher("linear(0.99, 1.3, until=30)"), steps=30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 0.9, "half_life": 10}, r"decay=0\.9 and half_life=10 both say"),
        ({"half_life": 10, "length": 0.1}, r"half_life=10 and length=0\.1 both say"),
        ({"length": 0.5}, r"length=0\.5 is the standard deviation as a share of training"),
        ({"half_life": "soon"}, "soon"),
    ],
)
def test_two_ways_to_say_how_long_or_none_are_refused(arguments, message):
    with pytest.raises(aux.AuxiliaryError, match=message):
        aux.EMATeacher(**arguments)


# ------------------------------------------------------------------------------------------- peers
def test_peer_ema_equals_torchs_averaged_model_and_ema_weight_averaging(plain_trainer):
    """Both copy at their first update; so does ours with start=1."""
    teacher, theirs = aux.EMATeacher(0.9, start=1), EMAWeightAveraging(decay=0.9, use_buffers=False)
    torchs: list[Any] = []

    class Averaging(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if not torchs:
                rule = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
                torchs.append(
                    torch.optim.swa_utils.AveragedModel(
                        nn.ModuleList(module.children()), multi_avg_fn=rule
                    )
                )
            torchs[0].update_parameters(nn.ModuleList(module.children()))

    model = Walk()
    options = {"max_steps": 100, "max_epochs": -1}
    plain_trainer(**options, callbacks=[teacher, theirs, Averaging()]).fit(model, rows())
    ours = teacher.store.state_dict()
    lightnings = dict(theirs._average_model.module.named_parameters())
    assert largest_difference(ours, {n: v.detach().double() for n, v in lightnings.items()}) < 1e-6
    for own, other in zip(ours.values(), torchs[0].module.parameters(), strict=True):
        assert torch.allclose(own, other, atol=1e-6)


def test_peer_ema_equals_ema_pytorch_and_torch_ema(plain_trainer):
    """Both begin from the initial weights; ema-pytorch copies in its first update unless told."""
    ema_pytorch, torch_ema = pytest.importorskip("ema_pytorch"), pytest.importorskip("torch_ema")
    teacher, peers = aux.EMATeacher(0.9), {}

    class Averaging(L.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.parts = nn.ModuleList(module.children())
            peers["ema-pytorch"] = ema_pytorch.EMA(
                self.parts, beta=0.9, update_after_step=-1, update_every=1, inv_gamma=1e-9, power=9
            )
            peers["ema-pytorch"].initted.fill_(True)
            peers["torch-ema"] = torch_ema.ExponentialMovingAverage(
                self.parts.parameters(), decay=0.9, use_num_updates=False
            )

        def on_train_batch_end(self, *_: Any) -> None:
            peers["ema-pytorch"].update()
            peers["torch-ema"].update()

    model = Walk()
    options = {"max_steps": 100, "max_epochs": -1}
    plain_trainer(**options, callbacks=[teacher, Averaging()]).fit(model, rows())
    ours = teacher.store.state_dict().values()
    theirs = {
        "ema-pytorch": peers["ema-pytorch"].ema_model.parameters(),
        "torch-ema": peers["torch-ema"].shadow_params,
    }
    for name, values in theirs.items():
        far = max(float((a - b).abs().max()) for a, b in zip(ours, values, strict=True))
        assert far < 1e-6, name


def test_peer_swa_equals_torchs_averaged_model(plain_trainer):
    teacher, torchs = aux.SWATeacher(start="50%", every=3), []

    class Averaging(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step >= 15 and trainer.global_step % 3 == 0:
                parts = nn.ModuleList(module.children())
                torchs[:] = torchs or [torch.optim.swa_utils.AveragedModel(parts)]
                torchs[0].update_parameters(parts)

    model = Walk()
    plain_trainer(max_epochs=5, callbacks=[teacher, Averaging()]).fit(model, rows())
    ours = teacher.store.state_dict()
    assert largest_difference(ours, mean([model.history[k] for k in range(15, 31, 3)])) < 1e-6
    for own, other in zip(ours.values(), torchs[0].module.parameters(), strict=True):
        assert torch.allclose(own, other, atol=1e-6)


# ------------------------------------------------------------------------- in the middle of a run
@pytest.mark.parametrize(
    "arguments",
    [{"decay": 0.9}, {"decay": 0.9, "every": 4}, {"decay": 0.99, "warmup": True}, {"length": 0.1}],
)
def test_an_average_that_is_new_in_a_resumed_run_begins_there(arguments, plain_trainer, tmp_path):
    """As if training had begun with the weights of the file; a decay of all steps since 0 is not
    due."""
    first = Walk()
    trainer = plain_trainer(max_epochs=2)
    trainer.fit(first, rows())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    teacher, model = aux.EMATeacher(**arguments), Walk()
    plain_trainer(max_epochs=4, callbacks=[teacher]).fit(
        model, rows(), ckpt_path=tmp_path / "plain.ckpt"
    )
    history = [weights(first), *model.history[1:]]
    every = arguments.get("every", 1)
    expected = {n: v.double() for n, v in history[0].items()}
    for step in range(every, 13, every):
        decay = 1.0
        for n in range(step - every, step):
            if "length" in arguments:
                decay *= (1 - 1 / (n + 1)) ** (power_exponent(0.1) + 1)
            else:
                rate = arguments["decay"]
                decay *= min(rate, (1 + n) / (10 + n)) if "warmup" in arguments else rate
        now = history[step]
        expected = {n: decay * v + (1 - decay) * now[n].double() for n, v in expected.items()}
    assert largest_difference(teacher.store.state_dict(), expected) < 1e-5


# --------------------------------------------------------------------------------------- snapshots
def test_the_previous_epoch_is_the_teacher(plain_trainer):
    teacher, seen = aux.SnapshotTeacher(), []
    look = Blind(lambda step: seen.append(weights_of(teacher)) or 0)
    model = Walk()
    plain_trainer(max_epochs=4, callbacks=[teacher, look]).fit(model, rows())
    for step, each in enumerate(seen):
        assert equal(each, model.history[step // 6 * 6])


def weights_of(teacher: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in teacher.store.state_dict().items()}


@pytest.mark.parametrize("window", [3, "linear(1, 4, until=24)"])
def test_a_window_is_the_mean_of_the_last_snapshots(window, plain_trainer):
    teacher, seen = aux.SnapshotTeacher(every=4, window=window), []
    look = Blind(lambda step: seen.append(weights_of(teacher)) or 0)
    history = walk(plain_trainer, teacher, steps=24, callbacks=[teacher, look]).history
    kept: list[int] = [0]
    for step, each in enumerate(seen):
        if step and step % 4 == 0:
            size = 3 if window == 3 else int(1 + 3 * step / 24)
            kept = [*kept, step][-size:]
        assert largest_difference(each, mean([history[k] for k in kept])) < 1e-6


def test_objectives_wait_for_the_first_snapshot(plain_trainer):
    """The weight is 0, and no pass is made, until there is somebody to learn from."""
    teacher = aux.SnapshotTeacher(start=3, every=2)
    term = aux.SelfDistillation("snapshot")
    ready = []
    look = Blind(lambda step: ready.append(term.weight_at(step.progress.steps)) or 0)
    walk(plain_trainer, teacher, steps=6, callbacks=[teacher, term, look])
    assert ready == [0, 0, 0, 1, 1, 1]


def test_voters_are_the_last_snapshots(plain_trainer):
    teacher, seen = aux.VotedTeacher(snapshots=2, every=3, vote="logits"), []

    def look(step: aux.Step) -> int:
        alone = [by_hand(each.state_dict(), step.batch[0]) for each in teacher.ring]
        seen.append([each.state_dict() for each in teacher.ring])
        assert torch.allclose(step.teacher("voted").logits, sum(alone) / len(alone), atol=1e-6)
        return 0

    walk(plain_trainer, teacher, steps=8, callbacks=[teacher, Blind(look)])
    assert [len(each) for each in seen] == [1, 1, 1, 2, 2, 2, 2, 2]


def by_hand(state: dict[str, Tensor], x: Tensor) -> Tensor:
    x = x * x.new_tensor([1.0, 1.0, 1.0, 0.01])
    hidden = torch.tanh(x @ state["encoder.0.weight"].T + state["encoder.0.bias"])
    return hidden @ state["classifier.weight"].T + state["classifier.bias"]


# -------------------------------------------------------------------------------------- generations
class Scheduled(Classifier):
    """With momentum, and a learning rate that falls: both have to begin again."""

    def __init__(self) -> None:
        super().__init__()
        self.starts: list[tuple[float, int, dict[str, Tensor]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers().optimizer
        moments = sum("momentum_buffer" in state for state in optimizer.state.values())
        self.starts.append((optimizer.param_groups[0]["lr"], moments, weights(self)))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def test_a_generation_is_a_training_of_its_own(plain_trainer):
    """The second generation at weight 0 is the first once more, bit for bit."""
    teacher = aux.SnapshotTeacher("previous", every="1ep", restart=True)
    model = Scheduled()
    trainer = plain_trainer(max_epochs=3, callbacks=[teacher])
    trainer.fit(model, rows())
    generations = [model.starts[:6], model.starts[6:12], model.starts[12:]]
    for rate, moments, values in (generation[0] for generation in generations):
        assert (rate, moments) == (0.05, 0)
        assert equal(values, generations[0][0][2])
    for first, other in zip(generations[0], generations[1], strict=True):
        assert first[:2] == other[:2]
        assert equal(first[2], other[2])
    # Whoever looks after the last step sees what was trained, not the new beginning.
    alone = Scheduled()
    L.seed_everything(0)
    alone.load_state_dict(generations[0][0][2])
    plain_trainer(max_epochs=1).fit(alone, rows())
    assert equal(weights(model), weights(alone))
    assert equal(weights_of(teacher), weights(alone))


@pytest.mark.parametrize("name", ["a_first", "z_last"])
def test_other_teachers_have_the_statistics_of_what_was_trained_and_not_of_the_restart(
    name, plain_trainer
):
    class Normed(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.means: list[Tensor] = []

        def forward(self, x: Tensor) -> Any:
            return super().forward(self.norm(x))

        def on_train_batch_end(self, *_: Any) -> None:
            self.means.append(self.norm.running_mean.clone())

    model, other = Normed(), aux.EMATeacher(0.5, name)
    seen: list[Tensor] = []
    look = Blind(lambda step: seen.append(other.store.buffers["norm.running_mean"].clone()) or 0)
    generations = aux.SnapshotTeacher("m", every="1ep", restart=True)
    plain_trainer(max_epochs=2, callbacks=[generations, other, look]).fit(model, rows())
    assert torch.equal(seen[6], model.means[5])


@pytest.mark.parametrize("stop", [6, 12])  # within an epoch: tests/contract/test_c07_resume.py
def test_generations_resume_exactly(stop, plain_trainer, tmp_path):
    def callbacks() -> list[Any]:
        return [
            aux.SnapshotTeacher("previous", every="1ep", restart=True),
            aux.SelfDistillation("previous"),
        ]

    L.seed_everything(0)
    through = Scheduled()
    plain_trainer(max_epochs=3, callbacks=callbacks()).fit(through, rows())
    L.seed_everything(0)
    first = Scheduled()
    trainer = plain_trainer(max_epochs=-1, max_steps=stop, callbacks=callbacks())
    trainer.fit(first, rows())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = Scheduled()
    plain_trainer(max_epochs=3, callbacks=callbacks()).fit(
        second, rows(), ckpt_path=tmp_path / "half.ckpt"
    )
    assert equal(weights(second), weights(through))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window=0 counts snapshots: at least 1"),
        ({"restart": True, "window": 2}, "with restart=True the teacher is the one generation"),
        ({"restart": True, "start": 3}, "with restart=True"),
        ({"every": "0ep"}, "more than zero"),
    ],
)
def test_snapshots_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(aux.AuxiliaryError, match=message):
        aux.SnapshotTeacher(**arguments)


# ------------------------------------------------------------------------------------------ random
@pytest.mark.parametrize("init", ["reset", "shuffle"])
def test_a_random_teacher_has_its_own_seed_and_leaves_the_students_stream_alone(
    init, plain_trainer
):
    def run(seed: int | None) -> tuple[Any, dict[str, Tensor]]:
        L.seed_everything(0)
        teacher = [] if seed is None else [aux.RandomTeacher(seed=seed, init=init)]
        model = Classifier(dropout=0.3)
        plain_trainer(max_steps=4, callbacks=teacher).fit(model, rows())
        return teacher and teacher[0].store.state_dict(), weights(model)

    (first, student), (again, _), (other, _), (_, plain) = run(1), run(1), run(2), run(None)
    assert equal(first, again)
    assert not equal(first, other)
    assert equal(student, plain)
    L.seed_everything(0)
    initial = weights(Classifier())
    for name, value in first.items():
        assert not torch.equal(value, initial[name])
        if init == "shuffle":
            assert torch.equal(value.flatten().sort().values, initial[name].flatten().sort().values)


def test_reset_draws_as_the_layers_do(plain_trainer):
    teacher = aux.RandomTeacher(seed=3)
    plain_trainer(max_steps=1, callbacks=[teacher]).fit(Classifier(), rows())
    torch.manual_seed(3)
    drawn = Classifier()
    # The modules reset themselves from the last to the first.
    torch.manual_seed(3)
    drawn.classifier.reset_parameters()
    drawn.encoder[0].reset_parameters()
    assert equal(teacher.store.state_dict(), weights(drawn))


@pytest.mark.parametrize("distance", [0.0, 0.3, 1.0])
def test_the_student_starts_at_its_distance(distance, plain_trainer):
    """((1 − α)·θ_T + α·θ_0) / √(α² + (1 − α)²), Sarnthein et al. 2023, section 3."""
    teacher, starts = aux.RandomTeacher(student_distance=distance), []
    look = Blind(lambda step: starts.append(weights(step.module)) or 0)
    model = Classifier()
    initial = weights(model)
    plain_trainer(max_steps=2, callbacks=[teacher, aux.EMATeacher(), look]).fit(model, rows())
    norm = (distance**2 + (1 - distance) ** 2) ** 0.5
    drawn = teacher.store.state_dict()
    expected = {n: ((1 - distance) * drawn[n] + distance * initial[n]) / norm for n in initial}
    assert largest_difference(starts[0], expected) < 1e-6


def test_a_parameter_that_no_reset_reaches_is_named(plain_trainer):
    class Positions(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.zeros(3))

    with pytest.raises(aux.AuxiliaryError, match=r"none reaches 'positions'\. Use init='shuffle'"):
        plain_trainer(callbacks=[aux.RandomTeacher()]).fit(Positions(), rows())


# ----------------------------------------------------------------------- what appears during a fit
class Adapted(Classifier):
    """Has an adapter from the second epoch on, and its encoder replaced by a wrapper."""

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.adapter = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            return x + self.adapter(x)

    def __init__(self) -> None:
        super().__init__()
        self.history: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.encoder = self.Wrapped(self.encoder)
            self.optimizers().optimizer.add_param_group(
                {"params": list(self.encoder.adapter.parameters())}
            )
            self.appeared = weights(self.encoder.adapter)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(lambda *_: self.history.append(self.now()))
        return optimizer

    def now(self) -> dict[str, Tensor]:
        return {
            name.replace("inner.", ""): value.detach().clone()
            for name, value in self.named_parameters()
        }


def test_an_adapter_that_appears_is_averaged_from_then_on_and_nothing_begins_again(plain_trainer):
    teacher, model = aux.EMATeacher(0.9), Adapted()
    first = model.now()
    seen: list[Tensor] = []
    look = Blind(lambda step: seen.append(step.teacher("ema").logits) or 0)
    plain_trainer(max_epochs=2, callbacks=[teacher, look]).fit(model, rows())
    expected = recursion([first, *({n: h[n] for n in first} for h in model.history)], [0.9] * 12)
    kept = teacher.store.state_dict()
    assert largest_difference({n: kept[n] for n in first}, expected) < 1e-5
    adapter = {n: n.removeprefix("encoder.adapter.") for n in kept if "adapter" in n}
    appeared = {n: model.appeared[short] for n, short in adapter.items()}
    since = [appeared, *({n: each[n] for n in adapter} for each in model.history[6:])]
    expected = recursion(since, [0.9] * 6)
    assert adapter
    assert largest_difference({n: kept[n] for n in adapter}, expected) < 1e-5
    assert len(seen) == 12


class Thawing(Classifier):
    """Its encoder is frozen for the first six steps; keeps its weights after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder.requires_grad_(False)
        self.history: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self) -> None:
        self.encoder.requires_grad_(self.current_epoch > 0)

    def on_train_batch_end(self, *_: Any) -> None:
        self.history.append(weights(self))


@pytest.mark.parametrize("offload", [False, True])
def test_weights_that_are_unfrozen_are_averaged_as_if_they_had_trained(plain_trainer, offload):
    teacher, model = aux.EMATeacher(0.9, offload=offload), Thawing()
    first = weights(model)
    plain_trainer(max_epochs=2, callbacks=[teacher]).fit(model, rows())
    frozen, trained = (model.history[step]["encoder.0.weight"] for step in (5, 11))
    assert torch.equal(frozen, first["encoder.0.weight"])
    assert not torch.equal(frozen, trained)
    expected = recursion([first, *model.history], [0.9] * 12)
    assert largest_difference(teacher.store.state_dict(), expected) < 1e-6


class Cycling(Thawing):
    """A learning rate that falls within each cycle of four steps."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    def on_train_epoch_start(self) -> None:
        """Everything trains."""
        self.requires_grad_(True)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(lambda *_: self.rates.append(rate()))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step % 4 / 5)

        def rate() -> float:
            return float(optimizer.param_groups[0]["lr"])

        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def test_with_a_cyclical_rate_the_weights_at_its_lowest_are_averaged(plain_trainer):
    teacher, model = aux.SWATeacher(start=0, every=4), Cycling()
    plain_trainer(max_epochs=2, callbacks=[teacher]).fit(model, rows())
    lowest = [step for step, rate in enumerate(model.rates) if rate == min(model.rates)]
    assert lowest == [3, 7, 11]
    expected = mean([model.history[step] for step in lowest])
    assert teacher.updates == 3
    assert largest_difference(teacher.store.state_dict(), expected) < 1e-6


def test_no_hook_of_ours_stays_in_torch(plain_trainer):
    before = set(Registrations._watchers)
    plain_trainer(max_steps=2, callbacks=[aux.EMATeacher(), aux.SnapshotTeacher(every=1)]).fit(
        Classifier(), rows()
    )
    assert Registrations._watchers <= before
    for each in (*before, *Registrations._watchers):  # stores that other tests have left
        Registrations.leave(each)
    assert not torch_module._global_parameter_registration_hooks
    assert not torch_module._global_module_registration_hooks
