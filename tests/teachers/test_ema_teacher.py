"""``EMATeacher``: the average is the closed form in float64, whatever moves the weights."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_aux as aux
from tests.engine.small_models import Blind, Classifier, equal, largest_difference, rows, weights


class Walk(Classifier):
    """Random gradients: every parameter walks at random. Keeps its weights after every step."""

    def __init__(self) -> None:
        super().__init__(lr=0.1)
        self.history: list[dict[str, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self(batch[0])
        return sum((p * torch.randn_like(p)).sum() for p in self.parameters())

    def on_train_start(self) -> None:
        self.history.append(weights(self))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        optimizer.register_step_post_hook(lambda *_: self.history.append(weights(self)))
        return optimizer


def walked(plain_trainer: Any, teacher: aux.EMATeacher, **arguments: Any) -> Walk:
    model = Walk()
    trainer = plain_trainer(callbacks=[teacher], **({"max_steps": 200} | arguments))
    if "max_epochs" not in arguments:
        trainer.fit_loop.max_epochs = -1
    trainer.fit(model, rows())
    return model


def recursion(history: list[dict[str, Tensor]], decays: list[float]) -> dict[str, Tensor]:
    """φ ← d φ + (1 − d) θ in float64, over the weights from ``history[0]`` on."""
    average = {name: value.double() for name, value in history[0].items()}
    for decay, now in zip(decays, history[1:], strict=True):
        average = {n: decay * average[n] + (1 - decay) * now[n].double() for n in average}
    return average


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999, 1.0])
def test_f18_the_average_is_the_closed_form_after_200_steps_of_a_random_walk(decay, plain_trainer):
    teacher = aux.EMATeacher(decay=decay)
    history = walked(plain_trainer, teacher).history
    assert teacher.updates == len(history) - 1 == 200
    # φ_n = d^n θ_0 + (1 − d) Σ_k d^(n−k) θ_k
    expected = {
        name: decay**200 * first.double()
        + (1 - decay) * sum(decay ** (200 - k) * history[k][name].double() for k in range(1, 201))
        for name, first in history[0].items()
    }
    assert largest_difference(teacher.store.state_dict(), expected) < 1e-5


def test_f18_the_average_never_leaves_the_range_of_its_history(plain_trainer):
    teacher = aux.EMATeacher(decay=0.95)
    history = walked(plain_trainer, teacher).history
    for name, average in teacher.store.state_dict().items():
        seen = torch.stack([each[name] for each in history])
        assert (average >= seen.amin(0) - 1e-6).all()
        assert (average <= seen.amax(0) + 1e-6).all()


def test_warm_up_follows_its_rule(plain_trainer):
    teacher = aux.EMATeacher(decay=0.8, warmup=True)
    history = walked(plain_trainer, teacher, max_steps=60).history
    decays = [min(0.8, (1 + n) / (10 + n)) for n in range(60)]
    assert decays[0] == 0.1
    assert decays[-1] == 0.8
    expected = recursion(history, decays)
    assert largest_difference(teacher.store.state_dict(), expected) < 1e-5


@pytest.mark.parametrize(("every", "updates"), [(1, 40), (3, 13), (40, 1), (41, 0), (7, 5)])
def test_f15_it_moves_after_every_so_many_steps_and_never_at_the_end_of_an_epoch(
    every, updates, plain_trainer
):
    teacher = aux.EMATeacher(decay=0.7, every=every)
    model = Walk()
    plain_trainer(max_epochs=5, limit_train_batches=8, callbacks=[teacher]).fit(model, rows(32, 4))
    assert len(model.history) == 41
    assert teacher.updates == updates
    expected = recursion(model.history[::every], [0.7**every] * updates)
    assert largest_difference(teacher.store.state_dict(), expected) < 1e-5


@pytest.mark.parametrize("start", [1, 5, 20])
def test_until_start_the_teacher_is_the_student_and_then_the_average_begins(start, plain_trainer):
    teacher = aux.EMATeacher(decay=0.7, start=start)
    live = Blind(lambda step: torch.equal(step.teacher("ema").logits, step.logits))
    model = Walk()
    plain_trainer(max_steps=20, max_epochs=-1, callbacks=[teacher, live]).fit(model, rows())
    assert teacher.updates == 20 - start
    # Step k (from 0) has the weights of k updates of the student; at ``start`` the copy is fresh.
    assert live.seen[: start + 1] == [True] * len(live.seen[: start + 1])
    assert not any(live.seen[start + 1 :])
    if start < 20:
        expected = recursion(model.history[start:], [0.7] * (20 - start))
        assert largest_difference(teacher.store.state_dict(), expected) < 1e-5


def test_start_and_every_together_count_from_start(plain_trainer):
    teacher = aux.EMATeacher(decay=0.7, start=4, every=3)
    model = walked(plain_trainer, teacher, max_steps=20)
    expected = recursion(model.history[4::3], [0.7**3] * 5)
    assert teacher.updates == 5
    assert largest_difference(teacher.store.state_dict(), expected) < 1e-5


@pytest.mark.parametrize("scheduling", [{0: 4}, {0: 1, 1: 3}])
def test_f14_under_accumulation_it_moves_once_per_optimizer_step(scheduling, plain_trainer):
    """Seven batches in windows of four: the last window is short (F14)."""
    teacher, model = aux.EMATeacher(decay=0.7), Walk()
    trainer = plain_trainer(
        max_epochs=2, callbacks=[teacher, GradientAccumulationScheduler(scheduling)]
    )
    trainer.fit(model, rows(26, 4))
    assert teacher.updates == trainer.global_step == len(model.history) - 1
    expected = recursion(model.history, [0.7] * teacher.updates)
    assert largest_difference(teacher.store.state_dict(), expected) < 1e-5


def test_it_is_constant_within_an_accumulation_window(plain_trainer):
    model = Classifier()
    probe = Blind(lambda step: step.teacher("ema").features("classifier"), reads=("classifier",))
    teacher = aux.EMATeacher(decay=0.5)
    seen: list[Tensor] = []
    watching = Blind(
        lambda step: seen.append(teacher.store.state_dict()["classifier.bias"].clone())
    )
    watching.name = "watching"
    plain_trainer(
        max_epochs=2, accumulate_grad_batches=3, callbacks=[teacher, probe, watching]
    ).fit(model, rows())
    for first in range(0, 12, 3):
        assert torch.equal(seen[first], seen[first + 1])
        assert torch.equal(seen[first], seen[first + 2])
        assert first == 0 or not torch.equal(seen[first], seen[first - 1])


# --------------------------------------------------------------------------------------- buffers
class Buffered(Classifier):
    """BatchNorm, and buffers of every kind that change with every step."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.register_buffer("level", torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("replaced", torch.zeros(1))
        self.history: list[dict[str, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.level += torch.tensor([1.0, 2.0])
        self.count += 3
        self.mask[batch_idx % 3] ^= True
        self.replaced = self.replaced + 1
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.history.append({n: b.clone() for n, b in self.named_buffers()})


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_f20_buffers_are_copied_or_averaged_and_integers_always_copied(buffers, plain_trainer):
    model, teacher = Buffered(), aux.EMATeacher(decay=0.6, buffers=buffers)
    initial = {name: value.clone() for name, value in model.named_buffers()}
    trainer = plain_trainer(max_epochs=2, callbacks=[teacher])
    trainer.fit(model, rows())
    held = teacher.state()["weights"]
    final = dict(model.named_buffers())
    for name in ("count", "mask", "encoder.1.num_batches_tracked"):
        assert held[name].dtype == final[name].dtype
        assert torch.equal(held[name], final[name])
    moving = ("level", "replaced", "encoder.1.running_mean", "encoder.1.running_var")
    averages = recursion(
        [{n: each[n] for n in moving} for each in (initial, *model.history)], [0.6] * 12
    )
    for name in moving:
        expected = final[name] if buffers == "copy" else averages[name].float()
        assert torch.allclose(held[name], expected, atol=1e-6)
    assert int(final["count"]) == 36  # the students' own are untouched
    assert float(final["level"][0]) == 12.0


class Overwritten(Buffered):
    """Its buffers are overwritten just before every step, as DDP does on all ranks but one.

    It also keeps every set of buffers that a step begins with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.begun_with: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        step = self.trainer.global_step
        self.level.copy_(torch.tensor([7.0, -1.0]) * step)
        self.encoder[1].running_mean.add_(step)
        self.count.fill_(100 + step)
        self.begun_with.append({n: b.clone() for n, b in self.named_buffers()})


def held(teacher: aux.EMATeacher) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in teacher.store.state_dict().items()}


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("start", [0, 2])
def test_buffers_are_taken_when_the_next_step_begins(buffers, start, plain_trainer):
    """There they are the same in all processes; after the optimizer step they are not yet."""
    model, teacher = Overwritten(), aux.EMATeacher(decay=0.6, buffers=buffers, start=start)
    initial = {name: value.clone() for name, value in model.named_buffers()}
    probe = Blind(lambda step: teacher.store and held(teacher))
    plain_trainer(max_epochs=2, callbacks=[teacher, probe]).fit(model, rows())
    floating = ("level", "encoder.1.running_mean", "encoder.1.running_var")
    average = {name: initial[name].double() for name in floating}
    for step, (live, taught) in enumerate(zip(model.begun_with, probe.seen, strict=True)):
        if step < start:
            assert taught is None
            continue
        if step == start > 0:
            average = {name: live[name].double() for name in floating}
        elif step > start:
            average = {n: 0.6 * average[n] + 0.4 * live[n].double() for n in floating}
        if step == 0:
            continue  # a teacher begins before the first step
        assert torch.equal(taught["count"], live["count"])
        for name in floating:
            expected = live[name] if buffers == "copy" else average[name].float()
            assert torch.allclose(taught[name], expected, atol=1e-5)


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_saving_a_checkpoint_changes_nothing(buffers, plain_trainer, tmp_path):
    class Saving(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "any.ckpt")

    seen = []
    for callbacks in ([], [Saving()]):
        torch.manual_seed(4)
        teacher = aux.EMATeacher(decay=0.6, buffers=buffers)
        probe = Blind(lambda step: held(step._engine.teacher("ema", "test")))
        trainer = plain_trainer(max_epochs=2, callbacks=[teacher, probe, *callbacks])
        trainer.fit(Overwritten(), rows())
        seen.append(probe.seen)
    assert len(seen[0]) == 12
    assert all(equal(*pair) for pair in zip(*seen, strict=True))


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("every", [1, 3])
def test_a_resumed_run_has_the_buffers_of_an_uninterrupted_one(
    buffers, every, plain_trainer, tmp_path
):
    """Saved after an update of the weights, before the buffers of the next step are there."""

    def run(epochs: int, **arguments: Any) -> tuple[list[dict[str, Tensor]], Any]:
        torch.manual_seed(4)
        teacher = aux.EMATeacher(decay=0.6, buffers=buffers, every=every)
        probe = Blind(lambda step: held(teacher))
        trainer = plain_trainer(max_epochs=epochs, callbacks=[teacher, probe])
        trainer.fit(Overwritten(), rows(), **arguments)
        return probe.seen, trainer

    whole, _ = run(2)
    _, trainer = run(1)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    rest, _ = run(2, ckpt_path=tmp_path / "part.ckpt")
    assert len(rest) == 6
    assert all(equal(*pair) for pair in zip(whole[6:], rest, strict=True))


class Changing(Classifier):
    """Persistent buffers that grow, appear, turn into integers and go away during training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(2))
        self.register_buffer("late", None)
        self.register_buffer("typed", torch.zeros(1))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.seen_by_teacher: list[dict[str, Any]] = []

    def forward(self, x: Tensor) -> Any:
        step = self.trainer.global_step
        if self.training:
            self.cache = torch.full((2 + step,), float(step))
            self.late = torch.tensor(step) if step in (2, 3) else None
            self.typed = torch.full((1,), step, dtype=torch.int64 if step > 2 else torch.float32)
            self.scratch = torch.full((1 + step,), float(step))
        else:
            self.seen_by_teacher.append(dict(self._buffers))
            assert self.cache.shape == (2 + step,)  # as the student's forward has just made it
        return super().forward(x)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = checkpoint["state_dict"]
        self.late = own.get("late")
        self.cache, self.typed = own["cache"].clone(), own["typed"].clone()


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("kind", ["ema", "frozen"])
def test_buffers_that_change_shape_come_and_go_are_followed(
    kind, buffers, every, plain_trainer, tmp_path
):
    def teacher() -> Any:
        if kind == "frozen":
            return aux.FrozenTeacher("ema")
        return aux.EMATeacher(decay=0.5, buffers=buffers, every=every)

    for stop in (2, 3, 4, 5):
        one, model = teacher(), Changing()
        probe = Blind(lambda step: step.teacher("ema").logits)
        trainer = plain_trainer(max_epochs=stop, callbacks=[one, probe])
        trainer.fit(model, rows(4))
        if (kind, buffers, every) == ("ema", "copy", 1):
            saved, live = one.state()["weights"], weights(model)
            assert saved.keys() == live.keys()
            assert equal(*({n: each[n] for n in live if "." not in n} for each in (saved, live)))
        trainer.save_checkpoint(tmp_path / "part.ckpt")
        resumed = plain_trainer(max_epochs=7, callbacks=[teacher(), probe])
        resumed.fit(Changing(), rows(4), ckpt_path=tmp_path / "part.ckpt")
        assert resumed.global_step == 7


def test_buffers_that_the_module_never_saves_stay_the_live_ones(plain_trainer):
    model, teacher = Changing(), aux.EMATeacher(decay=0.5)
    probe = Blind(lambda step: step.teacher("ema").logits is not None and step.progress.steps)
    plain_trainer(callbacks=[teacher, probe]).fit(model, rows())
    assert [float(each["scratch"][0]) for each in model.seen_by_teacher] == [0, 1, 2, 3, 4, 5]
    assert "scratch" not in teacher.state()["weights"]


# ------------------------------------------------------------------------------------- precision
def test_f17_in_half_precision_the_average_moves_in_float32(plain_trainer):
    """A decay of 0.9999 moves nothing in bfloat16 (F17)."""

    class Drift(Classifier):
        def __init__(self) -> None:
            super().__init__()
            for parameter in self.parameters():
                nn.init.constant_(parameter, 1.0)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self(batch[0])
            return sum(p.sum() for p in self.parameters())

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=2**-7)  # exact steps in bfloat16
            optimizer.register_step_post_hook(
                lambda *_: history.append(float(self.encoder[0].bias[0]))
            )
            return optimizer

    history: list[float] = []
    teacher = aux.EMATeacher(decay=0.9999)
    model = Drift()
    trainer = plain_trainer(precision="bf16-true", max_steps=200, callbacks=[teacher])
    trainer.fit_loop.max_epochs = -1
    trainer.fit(model, rows())
    assert model.encoder[0].bias.dtype == torch.bfloat16
    average = 1.0
    for value in history:
        average = 0.9999 * average + 0.0001 * value
    assert average < 0.99
    for name, value in teacher.store.state_dict().items():
        assert value.dtype == torch.float32, name
        assert float((value.double() - average).abs().max()) < 1e-5


def test_the_pass_of_a_half_precision_model_runs_in_half_precision(plain_trainer):
    probe = Blind(lambda step: (step.teacher("ema").logits.dtype, step.logits.dtype))
    trainer = plain_trainer(precision="bf16-true", callbacks=[aux.EMATeacher(decay=0.5), probe])
    trainer.fit(Classifier(), rows())
    assert set(probe.seen) == {(torch.bfloat16, torch.bfloat16)}


# ---------------------------------------------------------------------------- what is not averaged
def test_frozen_and_unused_parameters_stay_what_they_are(plain_trainer):
    class Partly(Walk):
        def __init__(self) -> None:
            super().__init__()
            self.encoder[0].requires_grad_(False)
            self.spare = nn.Linear(2, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self.classifier.weight * torch.randn_like(self.classifier.weight)).sum()

    model, teacher = Partly(), aux.EMATeacher(decay=0.5)
    before = weights(model)
    plain_trainer(callbacks=[teacher]).fit(model, rows())
    held = teacher.store.state_dict()
    assert not torch.equal(held["classifier.weight"], before["classifier.weight"])
    fixed = [name for name in before if name != "classifier.weight"]
    assert equal({n: held[n] for n in fixed}, {n: before[n] for n in fixed})
    live, averaged = teacher.pairs()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(live) == len(averaged) == len(trainable) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.2}, r"decay=1\.2 must lie in \[0, 1\]"),
        ({"decay": -0.1}, r"decay=-0\.1 must lie in \[0, 1\]"),
        (
            {"every": 0},
            "every=0, start=0: every is the time from one to the next",
        ),
        ({"start": -1}, "every=1, start=-1: a time cannot be negative"),
        ({"buffers": "swap"}, "buffers='swap' is unknown. Choose 'copy' or 'average'"),
        ({"name": "a/b"}, "the name 'a/b' cannot be used"),
    ],
)
def test_bad_arguments_are_refused_when_it_is_made(arguments, message):
    with pytest.raises(aux.AuxiliaryError, match=message):
        aux.EMATeacher(**arguments)
