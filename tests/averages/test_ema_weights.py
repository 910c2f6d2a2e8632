"""``EMAWeights``: every evaluation sees the average, training and checkpoints never do."""

from __future__ import annotations

import warnings
from itertools import permutations, product
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_aux as aux
from tests.engine.small_models import Classifier, equal, largest_difference, rows, weights


class Watched(Classifier):
    """Keeps its weights after every optimizer step, and those that each evaluation sees."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("evaluated", torch.zeros((), dtype=torch.long))
        self.history: list[dict[str, Tensor]] = []
        self.seen: list[tuple[str, dict[str, Tensor]]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))

    def on_train_start(self) -> None:
        self.history.append(parameters(self))

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(lambda *_: self.history.append(parameters(self)))
        return optimizer

    def look(self, where: str) -> None:
        self.seen.append((where, weights(self)))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.look("validation_step")
        self.evaluated += 1
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    def on_validation_start(self) -> None:
        self.look("on_validation_start")

    def on_validation_end(self) -> None:
        self.look("on_validation_end")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.look("test_step")

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.look("predict_step")


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in module.named_parameters()}


def average(history: list[dict[str, Tensor]], decay: float = 0.9) -> dict[str, Tensor]:
    """φ ← d φ + (1 − d) θ in float64."""
    values = {name: value.double() for name, value in history[0].items()}
    for now in history[1:]:
        values = {n: decay * values[n] + (1 - decay) * now[n].double() for n in values}
    return values


def shows(seen: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return largest_difference({name: seen[name] for name in expected}, expected) < 1e-6


def fit(plain_trainer: Any, callbacks: list[Any], **arguments: Any) -> tuple[Watched, L.Trainer]:
    module = Watched()
    trainer = plain_trainer(**({"max_epochs": 2, "callbacks": callbacks} | arguments))
    trainer.fit(module, rows(), rows(8))
    return module, trainer


def test_validation_sees_the_average_from_its_first_hook_to_its_last(plain_trainer):
    module, _ = fit(plain_trainer, [aux.EMAWeights(decay=0.9)], num_sanity_val_steps=0)
    epochs = [module.seen[:4], module.seen[4:]]
    for seen, steps in zip(epochs, (6, 12), strict=True):
        assert [where for where, _ in seen] == [
            "on_validation_start",
            "validation_step",
            "validation_step",
            "on_validation_end",
        ]
        assert all(shows(each, average(module.history[: steps + 1])) for _, each in seen)
    assert equal(parameters(module), module.history[-1])


def test_f01_an_average_that_has_not_begun_is_not_evaluated(plain_trainer):
    module, _ = fit(plain_trainer, [aux.EMAWeights(decay=0.9, start=8)], num_sanity_val_steps=2)
    sanity, first, second = module.seen[:4], module.seen[4:8], module.seen[8:]
    assert all(shows(each, module.history[0]) for _, each in sanity)
    assert all(shows(each, module.history[6]) for _, each in first)
    assert all(shows(each, average(module.history[8:])) for _, each in second)


def test_f01_an_average_that_has_begun_but_not_moved_is_not_evaluated(plain_trainer):
    """It holds the weights of step 8 and moves at step 13; validated are those of step 12."""
    module, _ = fit(plain_trainer, [aux.EMAWeights(0.9, start=8, every=5)], num_sanity_val_steps=0)
    assert shows(module.seen[-1][1], module.history[12])


class Saving(L.Callback):
    """Saves a checkpoint in one hook of the validation."""

    def __init__(self, hook: str, path: Any) -> None:
        self.path = path
        setattr(self, hook, self.save)

    def save(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    "hook",
    [
        "on_validation_start",
        "on_validation_batch_end",
        "on_validation_epoch_end",
        "on_validation_end",
        "on_train_epoch_end",
    ],
)
def test_f02_a_checkpoint_has_the_raw_weights_whenever_it_is_saved(plain_trainer, tmp_path, hook):
    path = tmp_path / "saved.ckpt"
    for order in permutations([aux.EMAWeights(decay=0.9), Saving(hook, path)]):
        module, _ = fit(plain_trainer, list(order), max_epochs=1)
        saved = torch.load(path, weights_only=True)
        raw = {name: saved["state_dict"][name] for name in module.history[-1]}
        assert equal(raw, module.history[-1])
        kept = saved["lightning_aux"]["members"]["ema_weights.teacher"]["weights"]
        assert shows(kept, average(module.history))
        assert shows(module.seen[-1][1], average(module.history))


def test_model_checkpoint_ranks_by_the_average_in_every_order(plain_trainer, tmp_path):
    """The monitored value is the average's; the file has the raw weights of that epoch."""
    scores = []
    for number, order in enumerate(permutations(range(3))):
        callbacks = [
            aux.EMAWeights(decay=0.9),
            ModelCheckpoint(tmp_path / str(number), monitor="loss", save_top_k=-1),
            L.pytorch.callbacks.EarlyStopping("loss", patience=9),
        ]
        L.seed_everything(0)
        module, _ = fit(
            plain_trainer, [callbacks[each] for each in order], enable_checkpointing=True
        )
        kept = {str(value): path for path, value in callbacks[1].best_k_models.items()}
        scores.append(sorted(map(float, callbacks[1].best_k_models.values())))
        assert len(kept) == 2
        saved = torch.load(callbacks[1].best_model_path, weights_only=True)["state_dict"]
        assert any(equal({n: saved[n] for n in each}, each) for each in module.history)
    assert all(each == scores[0] for each in scores)


@pytest.mark.parametrize("error", [RuntimeError("on purpose"), KeyboardInterrupt()])
def test_f11_an_exception_in_validation_leaves_the_raw_weights(plain_trainer, error):
    class Fails(Watched):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if not self.trainer.sanity_checking:
                raise error

    module, callback = Fails(), aux.EMAWeights(decay=0.9)
    trainer = plain_trainer(max_epochs=2, callbacks=[callback])
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        trainer.fit(module, rows(), rows(8))
    assert len(module.history) == 7
    assert equal(parameters(module), module.history[-1])
    assert "run" not in vars(trainer.fit_loop.epoch_loop.val_loop)
    assert "save_checkpoint" not in vars(trainer)


def test_f03_a_run_resumed_from_a_file_of_a_validation_goes_on_from_the_raw_weights(
    plain_trainer, tmp_path
):
    """With the sanity check that Lightning would make by default."""
    through, _ = fit(plain_trainer, [aux.EMAWeights(decay=0.9)])
    saving = Saving("on_validation_end", tmp_path / "half.ckpt")
    L.seed_everything(0)
    fit(plain_trainer, [aux.EMAWeights(decay=0.9), saving], max_epochs=1)
    resumed = Watched()
    trainer = plain_trainer(max_epochs=2, callbacks=[aux.EMAWeights(decay=0.9)])
    trainer.fit(resumed, rows(), rows(8), ckpt_path=tmp_path / "half.ckpt")
    assert equal(parameters(resumed), parameters(through))
    assert shows(resumed.seen[-1][1], average(through.history))


def test_what_the_user_counts_in_a_buffer_during_validation_stays(plain_trainer):
    module, _ = fit(plain_trainer, [aux.EMAWeights(decay=0.9)], num_sanity_val_steps=0)
    assert module.evaluated == 4


class Writes(Watched):
    """Counts in training and evaluation, and keeps the best loss and a sum of validation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        self.register_buffer("best", torch.tensor(float("inf")))
        self.register_buffer("total", torch.zeros(()))
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batches += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(float(loss))
        self.batches += 1
        self.best = torch.minimum(self.best, loss)
        self.total += loss


@pytest.mark.parametrize(
    ("average", "saves"), [*product([{}, {"every": 5}, {"buffers": "average"}], [False, True])]
)
def test_what_the_users_code_writes_into_buffers_during_validation_stays(
    plain_trainer, tmp_path, average, saves
):
    """Also when a checkpoint is written within the validation."""
    module = Writes()
    saving = [Saving("on_validation_batch_end", tmp_path / "saved.ckpt")] if saves else []
    trainer = plain_trainer(max_epochs=3, callbacks=[aux.EMAWeights(0.9, **average), *saving])
    trainer.fit(module, rows(), rows(8))
    sanity = len(module.losses) - 6
    assert module.batches == 18 + 6 + sanity
    assert float(module.best) == min(module.losses)
    assert float(module.total) == pytest.approx(sum(module.losses))


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_batch_norm_statistics_are_those_of_the_setting(plain_trainer, buffers):
    module, _ = fit(
        plain_trainer, [aux.EMAWeights(0.9, buffers=buffers)], num_sanity_val_steps=0, max_epochs=1
    )
    seen, live = module.seen[1][1]["norm.running_mean"], module.norm.running_mean
    assert torch.equal(seen, live) == (buffers == "copy")


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_averaged_statistics_are_evaluated_from_a_file_in_every_precision(
    plain_trainer, tmp_path, precision
):
    """The module is cast after the file has been read."""
    module, trainer = fit(
        plain_trainer, [aux.EMAWeights(0.9, buffers="average")], precision=precision
    )
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    kept = saved["lightning_aux"]["members"]["ema_weights.teacher"]["weights"]["norm.running_mean"]
    assert kept.dtype == torch.float32
    fresh = Watched()
    again = plain_trainer(callbacks=[aux.EMAWeights()], precision=precision)
    again.test(fresh, rows(8), ckpt_path=tmp_path / "last.ckpt")
    seen = fresh.seen[0][1]["norm.running_mean"]
    assert torch.equal(seen, kept.to(seen.dtype))
    assert not torch.equal(seen, module.norm.running_mean)


def test_a_window_of_snapshots_is_evaluated_and_saved_with_the_mean_of_their_statistics(
    plain_trainer, tmp_path
):
    teacher = aux.SnapshotTeacher(every="1ep", start="1ep", window=3)
    means: list[Tensor] = []

    class AtTheEnd(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            means.append(pl_module.norm.running_mean.clone())

    module, trainer = fit(
        plain_trainer,
        [teacher, aux.EMAWeights(teacher="snapshot"), AtTheEnd()],
        max_epochs=4,
        num_sanity_val_steps=0,
    )
    seen = [each["norm.running_mean"] for where, each in module.seen if where.endswith("_start")]
    for epoch, each in enumerate(seen):
        expected = torch.stack(means[max(0, epoch - 2) : epoch + 1]).mean(0)
        assert torch.allclose(each, expected, atol=1e-6)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    aux.EMAWeights.export(tmp_path / "last.ckpt", tmp_path / "mean.ckpt")
    exported = torch.load(tmp_path / "mean.ckpt", weights_only=True)["state_dict"]
    assert torch.allclose(exported["norm.running_mean"], seen[-1], atol=1e-6)


def test_training_is_what_it_is_without_us(plain_trainer):
    module, _ = fit(plain_trainer, [aux.EMAWeights(decay=0.9)])
    L.seed_everything(0)
    plain, _ = fit(plain_trainer, [])
    assert equal(weights(module), weights(plain))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_after_fit_every_stage_uses_the_average(plain_trainer, tmp_path, stage):
    callback = aux.EMAWeights(decay=0.9)
    module, trainer = fit(plain_trainer, [callback])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    expected, raw = average(module.history), parameters(module)
    kinds = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}

    def seen(trainer: L.Trainer, module: Watched, **where: Any) -> list[dict[str, Tensor]]:
        module.seen.clear()
        getattr(trainer, stage)(module, rows(8), **where)
        return [each for name, each in module.seen if name == kinds[stage]]

    assert all(shows(each, expected) for each in seen(trainer, module))
    assert equal(parameters(module), raw)
    # In another process, from the file, with callbacks that have never seen a training.
    again = plain_trainer(callbacks=[aux.EMAWeights(decay=0.9)])
    fresh = Watched()
    found = seen(again, fresh, ckpt_path=tmp_path / "last.ckpt")
    assert len(found) == 2
    assert all(shows(each, expected) for each in found)
    assert equal(parameters(fresh), raw)


@pytest.mark.parametrize("loaded", ["after fit", "after a file"])
def test_weights_that_the_user_loads_are_evaluated_as_they_are_with_one_warning(
    plain_trainer, tmp_path, loaded
):
    module, trainer = fit(plain_trainer, [aux.EMAWeights(decay=0.9)])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    if loaded == "after a file":
        module, trainer = Watched(), plain_trainer(callbacks=[aux.EMAWeights(decay=0.9)])
        trainer.test(module, rows(8), ckpt_path=tmp_path / "last.ckpt")
    own = Watched()
    module.load_state_dict(own.state_dict())
    module.seen.clear()
    with pytest.warns(UserWarning, match="have been changed since the average was made"):
        trainer.test(module, rows(8))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*since the average was made")
        trainer.test(module, rows(8))
    assert len(module.seen) == 4
    assert all(shows(each, parameters(own)) for _, each in module.seen)


@pytest.mark.filterwarnings("error:.*since the average was made")
def test_the_average_stays_that_of_the_module_through_evaluations(plain_trainer):
    module, trainer = fit(plain_trainer, [aux.EMAWeights(decay=0.9)])
    for _ in range(2):
        module.seen.clear()
        trainer.validate(module, rows(8))
        trainer.test(module, rows(8))
        assert all(shows(each, average(module.history)) for _, each in module.seen)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, rows(), rows(8))
    module.seen.clear()
    trainer.test(module, rows(8))
    assert module.seen
    assert not any(equal(each, weights(module)) for _, each in module.seen)


class Learns(Watched):
    """Looks at the training loss, gradient and all, in validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with torch.enable_grad():
            self.training_step(batch, batch_idx).backward()
        self.zero_grad()


def test_a_teachers_pass_within_a_validation_leaves_training_alone(plain_trainer):
    """The teacher is the one whose weights are validated, or another."""

    def run(kind: type[Watched], *callbacks: Any) -> Watched:
        L.seed_everything(0)
        module = kind()
        module.norm = nn.Identity()  # running statistics are written by the pass itself
        plain_trainer(max_epochs=2, callbacks=list(callbacks), inference_mode=False).fit(
            module, rows(), rows(8)
        )
        return module

    def callbacks(*more: Any) -> list[Any]:
        teachers = [aux.EMATeacher(0.5, "one"), aux.EMATeacher(0.9, "other")]
        terms = [aux.SelfDistillation(each, name=f"of_{each}") for each in ("one", "other")]
        return [*teachers, *terms, *more]

    plain = run(Watched, *callbacks())
    module = run(Learns, *callbacks(aux.EMAWeights(teacher="one")))
    assert equal(parameters(module), parameters(plain))


def test_a_second_one_is_refused_before_anything_runs(plain_trainer):
    both = [aux.EMAWeights(0.9, name="short"), aux.EMAWeights(0.99, name="long")]
    message = "short: 'long' among the Trainer's callbacks is an EMAWeights too"
    with pytest.raises(aux.AuxiliaryError, match=message):
        fit(plain_trainer, both)
    with pytest.raises(aux.AuxiliaryError, match=message):
        plain_trainer(callbacks=both).test(Watched(), rows(8))


def test_files_that_will_not_have_the_average_are_warned_of(plain_trainer, tmp_path):
    saving = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.warns(UserWarning, match="save_weights_only=True.*will not have the average"):
        fit(plain_trainer, [aux.EMAWeights(), saving], enable_checkpointing=True, max_epochs=1)


def test_it_exports_a_file_by_itself(plain_trainer, tmp_path):
    module, trainer = fit(plain_trainer, [aux.EMAWeights(decay=0.9)])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    aux.EMAWeights.export(tmp_path / "last.ckpt", tmp_path / "average.ckpt")
    fresh = Watched()
    fresh.load_state_dict(torch.load(tmp_path / "average.ckpt", weights_only=True)["state_dict"])
    assert shows(weights(fresh), average(module.history))


def test_a_checkpoint_without_an_average_is_evaluated_as_it_is_with_a_warning(
    plain_trainer, tmp_path
):
    module, trainer = fit(plain_trainer, [])
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    fresh = Watched()
    with pytest.warns(UserWarning, match="has no average called 'ema_weights.teacher'"):
        plain_trainer(callbacks=[aux.EMAWeights()]).test(
            fresh, rows(8), ckpt_path=tmp_path / "plain.ckpt"
        )
    assert all(shows(each, parameters(module)) for _, each in fresh.seen)


def test_validation_within_an_epoch_and_under_accumulation_sees_the_average_so_far(plain_trainer):
    module, _ = fit(
        plain_trainer,
        [aux.EMAWeights(decay=0.9)],
        val_check_interval=2,
        accumulate_grad_batches=3,
        num_sanity_val_steps=0,
        max_epochs=1,
    )
    validated = [each for where, each in module.seen if where == "on_validation_start"]
    # 6 batches in windows of 3: after 2, 4 and 6 of them 0, 1 and 2 steps have been taken.
    assert len(validated) == 3
    for steps, each in enumerate(validated):
        assert shows(each, average(module.history[: steps + 1]))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            aux.SWATeacher(start="50%", every=2),
            lambda history: {
                n: sum(history[k][n].double() for k in (6, 8, 10, 12)) / 4 for n in history[0]
            },
        ),
        (aux.SnapshotTeacher("swa", every=5), lambda history: history[10]),
        (aux.EMATeacher(0.9, "swa"), average),
    ],
    ids=["swa", "snapshot", "ema"],
)
def test_the_average_can_be_that_of_a_teacher_among_the_callbacks(plain_trainer, source, expected):
    module, _ = fit(plain_trainer, [aux.EMAWeights(teacher="swa"), source])
    assert shows(module.seen[-1][1], expected(module.history))


def test_what_it_cannot_do_is_said(plain_trainer):
    with pytest.raises(aux.AuxiliaryError, match=r"decay=0\.9 beside teacher='ema' would change"):
        aux.EMAWeights(decay=0.9, teacher="ema")
    for source in (aux.FrozenTeacher(), aux.RandomTeacher(), aux.VotedTeacher()):
        message = f"'{source.name}' is a {type(source).__name__}, which has no average"
        with pytest.raises(aux.AuxiliaryError, match=message):
            fit(plain_trainer, [aux.EMAWeights(teacher=source.name), source])
    with pytest.raises(aux.AuxiliaryError, match="no teacher is called 'emma'"):
        fit(plain_trainer, [aux.EMAWeights(teacher="emma"), aux.EMATeacher()])


def test_peer_the_average_is_lightnings_where_that_is_right(plain_trainer):
    """Its own callback counts the first step's weights, not the initial ones, as the start."""
    module, _ = fit(plain_trainer, [aux.EMAWeights(decay=0.9, start=1)])
    ours = module.seen[-1][1]
    L.seed_everything(0)
    theirs = EMAWeightAveraging(decay=0.9, use_buffers=False)
    fit(plain_trainer, [theirs])
    expected = dict(theirs._average_model.module.named_parameters())
    assert shows(ours, {name: value.detach().double() for name, value in expected.items()})
