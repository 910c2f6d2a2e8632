"""``QuantizedWeights``: Q(w) while gradients are computed and in evaluation, w everywhere else."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_aux as aux
from lightning_aux.cli import main
from lightning_aux.functional import quantize
from lightning_aux.weights import quantized
from tests.engine.small_models import Classifier, equal, largest_difference, rows, weights

BITS, BUCKET = 2, 8


def rounded(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: quantize(value, BITS, BUCKET) if name.endswith("weight") else value
        for name, value in values.items()
    }


def attached(**arguments: Any) -> aux.QuantizedWeights:
    return aux.QuantizedWeights(bits=BITS, bucket=BUCKET, **arguments)


class Watched(Classifier):
    """Notes its weights in every step, after every optimizer step and in every evaluation."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.in_step: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = [weights(self)]
        self.evaluated: list[dict[str, Tensor]] = []

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(lambda *_: self.after.append(weights(self)))
        return optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.in_step.append(weights(self))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated.append(weights(self))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.evaluated.append(weights(self))
        return self(batch[0])


def trained(plain_trainer: Any, module: Any, *callbacks: Any, **options: Any) -> L.Trainer:
    trainer = plain_trainer(**({"max_epochs": 2} | options), callbacks=list(callbacks))
    trainer.fit(module, rows(), rows(4) if hasattr(module, "evaluated") else None)
    return trainer


# ----------------------------------------------------------------------------------- training
@pytest.mark.parametrize("window", [1, 3])
def test_every_micro_batch_has_the_quantised_weights_and_the_optimizer_its_own(
    plain_trainer, window
):
    module = Watched()
    trained(plain_trainer, module, attached(), accumulate_grad_batches=window)
    assert (len(module.in_step), len(module.after)) == (12, 12 // window + 1)
    for number, seen in enumerate(module.in_step):
        assert equal(seen, rounded(module.after[number // window]))
    assert not equal(module.after[-1], rounded(module.after[-1]))
    assert equal(weights(module), module.after[-1])


def test_the_gradient_of_a_window_is_that_at_the_quantised_weights(plain_trainer):
    """Accumulated over uneven windows, momentum and weight decay of w included."""

    class Decayed(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)

    module = Decayed()
    hand = deepcopy(module)
    trained(plain_trainer, module, attached(), accumulate_grad_batches=4)

    optimizer = hand.configure_optimizers()
    batches = list(rows())
    for window in [batches[:4], batches[4:]] * 2:
        at = deepcopy(hand)
        at.load_state_dict(rounded(weights(hand)))
        total = sum(F.cross_entropy(at(x), y) for x, y in window) / 4
        gradients = torch.autograd.grad(total, list(at.parameters()))
        for each, gradient in zip(hand.parameters(), gradients, strict=True):
            each.grad = gradient
        optimizer.step()
    assert largest_difference(weights(module), weights(hand)) < 1e-6


class TwoForwards(Watched):
    """Manual optimisation: two losses, each with a forward, a backward and a step of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for _ in range(2):
            self.in_step.append(weights(self))
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            self.in_step.append(weights(self))
            optimizer.step()
            optimizer.zero_grad()


def test_in_manual_optimisation_only_the_optimizer_has_the_weights_themselves(plain_trainer):
    module = TwoForwards()
    trained(plain_trainer, module, attached(), max_epochs=1)
    assert (len(module.in_step), len(module.after)) == (24, 13)
    for number, seen in enumerate(module.in_step):
        assert equal(seen, rounded(module.after[number // 2]))
    assert equal(weights(module), module.after[-1])


@pytest.mark.parametrize("how", ["past Lightning", "with a closure"])
def test_in_manual_optimisation_a_step_that_cannot_be_followed_is_refused(plain_trainer, how):
    class Past(TwoForwards):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=how == "with a closure")
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            optimizer.step(*([lambda: loss] if how == "with a closure" else []))

    module = Past()
    message = "quantized_weights has other weights in the module during training_step"
    with pytest.raises(aux.AuxiliaryError, match=message):
        trained(plain_trainer, module, attached())
    assert equal(weights(module), module.after[0])


def test_a_teacher_follows_the_weights_themselves(plain_trainer):
    module = Watched()
    teacher = aux.EMATeacher(decay=0.5)
    trained(plain_trainer, module, teacher, attached(), aux.SelfDistillation(weight=0.5))
    average = module.after[0]
    for each in module.after[1:]:
        average = {name: (average[name] + each[name]) / 2 for name in average}
    assert largest_difference(teacher.state()["weights"], average) < 1e-6


def test_only_the_parameters_that_are_named_are_quantised_and_new_ones_are_found(plain_trainer):
    class Grows(Watched):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                self.encoder[0] = deepcopy(self.encoder[0])

    module = Grows()
    trained(plain_trainer, module, attached(exclude="classifier.*"), max_epochs=1)
    for number, seen in enumerate(module.in_step):
        # The optimizer does not know the new layer; the old one is no longer in the module.
        full, expected = module.after[number], rounded(module.after[number])
        assert torch.equal(seen["encoder.0.weight"], expected["encoder.0.weight"])
        assert torch.equal(seen["classifier.weight"], full["classifier.weight"])
        assert not torch.equal(seen["encoder.0.weight"], full["encoder.0.weight"])


# ------------------------------------------------------------------- wherever a step ends or saves
class Stops(Watched):
    """Ends its fourth step in some way."""

    def __init__(self, how: BaseException | None) -> None:
        super().__init__()
        self.how = how

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 3 and self.how is not None:
            raise self.how
        return None if batch_idx == 3 else loss


@pytest.mark.parametrize("where", ["training_step", "backward"])
@pytest.mark.parametrize("error", [RuntimeError("on purpose"), KeyboardInterrupt()], ids=repr)
def test_an_exception_leaves_the_weights_themselves_also_for_callbacks_before_us(
    plain_trainer, tmp_path, error, where
):
    class Fails(L.Callback):
        def on_before_backward(self, trainer: Any, module: Any, loss: Any) -> None:
            if where == "backward" and trainer.fit_loop.batch_idx == 3:
                raise error

        def on_exception(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "saved.ckpt")

    module = Stops(error) if where == "training_step" else Watched()
    with pytest.raises((RuntimeError, SystemExit)):
        trained(plain_trainer, module, Fails(), attached())
    assert equal(weights(module), module.after[-1])
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    assert equal(saved["state_dict"], module.after[-1])


@pytest.mark.parametrize("window", [1, 2])
def test_a_step_without_a_loss_ends_with_the_weights_themselves(plain_trainer, window):
    between = []

    class Looks(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            between.append((weights(module), module.after[-1]))

    trained(plain_trainer, Stops(None), Looks(), attached(), accumulate_grad_batches=window)
    assert len(between) == 12
    assert all(equal(seen, expected) for seen, expected in between)


def test_files_hold_the_weights_themselves_whenever_they_are_saved(plain_trainer, tmp_path):
    """Between forward and backward too, which goes on from the same graph."""

    class Saves(L.Callback):
        def __init__(self) -> None:
            self.expected: dict[str, dict[str, Tensor]] = {}

        def save(self, where: str, trainer: Any, module: Any) -> None:
            before = weights(module)
            path = f"{where}{len(self.expected)}.ckpt"
            trainer.save_checkpoint(tmp_path / path)
            self.expected[path] = module.after[-1]
            assert equal(weights(module), before)

        def on_before_backward(self, trainer: Any, module: Any, loss: Any) -> None:
            self.save("backward", trainer, module)

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            self.save("end", trainer, module)

        def on_validation_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            self.save("validation", trainer, module)

    def run(*more: Any) -> Any:
        L.seed_everything(5)
        module = Watched()
        trained(plain_trainer, module, *more, attached())
        return module

    saving = Saves()
    assert equal(weights(run(saving)), weights(run()))
    assert len(saving.expected) > 24
    for path, expected in saving.expected.items():
        saved = torch.load(tmp_path / path, weights_only=True)["state_dict"]
        assert equal(saved, expected), path


# --------------------------------------------------------------------------- evaluation and export
def test_every_evaluation_has_the_quantised_weights_unless_told_otherwise(plain_trainer):
    for evaluate in (True, False):
        module = Watched()
        trainer = trained(plain_trainer, module, attached(evaluate=evaluate))
        for stage in (trainer.validate, trainer.test, trainer.predict):
            stage(module, rows(4))
        ended = module.after[-1]
        # The sanity check, two epochs, and one each.
        at = [module.after[0], module.after[6], ended, ended, ended, ended]
        assert len(module.evaluated) == len(at)
        for seen, full in zip(module.evaluated, at, strict=True):
            assert equal(seen, rounded(full) if evaluate else full)
        assert equal(weights(module), ended)


def tied() -> Watched:
    module = Watched()
    module.other = nn.Linear(4, 8)
    module.other.weight = module.encoder[0].weight
    return module


def test_the_exported_file_is_plain_and_has_what_was_evaluated(plain_trainer, tmp_path, capsys):
    module = tied()
    saving = ModelCheckpoint(tmp_path, "run")
    trained(plain_trainer, module, attached(), saving, enable_checkpointing=True)
    quantized(tmp_path / "run.ckpt", tmp_path / "q.ckpt")
    saved = torch.load(tmp_path / "q.ckpt", weights_only=True)
    assert "lightning_aux" not in saved
    assert equal(saved["state_dict"], module.evaluated[-1])
    assert not equal(saved["state_dict"], weights(module))
    tied().load_state_dict(saved["state_dict"], strict=True)
    aux.QuantizedWeights.export(tmp_path / "run.ckpt", tmp_path / "again.ckpt")
    assert (
        main(["export", str(tmp_path / "run.ckpt"), "--quantized", "--out", f"{tmp_path}/c"]) == 0
    )
    for path in ("again.ckpt", "c"):
        assert equal(
            torch.load(tmp_path / path, weights_only=True)["state_dict"], saved["state_dict"]
        )


def test_a_file_of_a_run_without_is_refused(plain_trainer, tmp_path):
    plain = trained(plain_trainer, Classifier(), max_epochs=1)
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(aux.AuxiliaryError, match="written without QuantizedWeights"):
        quantized(tmp_path / "plain.ckpt", tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()


@pytest.mark.parametrize("first", [0, 1])
def test_beside_an_average_the_average_is_evaluated_and_nothing_remains(plain_trainer, first):
    module = Watched()
    both = [aux.EMAWeights(decay=0.5), attached(evaluate=False)]
    trainer = trained(plain_trainer, module, *(both if first else both[::-1]))
    average = module.after[0]
    for each in module.after[1:]:
        average = {name: (average[name] + each[name]) / 2 for name in average}
    assert largest_difference(module.evaluated[-1], average) < 1e-6
    assert "save_checkpoint" not in trainer.__dict__
    assert "run" not in trainer.fit_loop.epoch_loop.val_loop.__dict__


@pytest.mark.parametrize("place", range(2))
def test_two_with_different_layers_do_both_and_nothing_remains(plain_trainer, place):
    module = Watched()
    one = attached(parameters="encoder.*", name="one")
    other = aux.QuantizedWeights(bits=5, bucket=4, parameters="classifier.weight", name="other")
    trainer = trained(plain_trainer, module, *([one, other], [other, one])[place])
    full = module.after[-1]
    seen = module.evaluated[-1]
    for name, value in full.items():
        how = (BITS, BUCKET) if name.startswith("encoder") else (5, 4)
        kept = name == "classifier.bias"
        assert torch.equal(seen[name], value if kept else quantize(value, *how))
    assert equal(weights(module), full)
    assert "save_checkpoint" not in trainer.__dict__
    assert "run" not in trainer.fit_loop.epoch_loop.val_loop.__dict__


# ---------------------------------------------------------------------------------------- messages
@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"bits": 0}, r"bits=0 must be from 1 to 16"), ({"bucket": 1}, "at least two elements")],
)
def test_arguments_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(aux.AuxiliaryError, match=message):
        aux.QuantizedWeights(**arguments)


def newton(module: Any) -> Any:
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters())
    return module


def lazy(module: Any) -> Any:
    module.classifier = nn.LazyLinear(3)
    return module


@pytest.mark.parametrize(
    ("change", "added", "message"),
    [
        (None, [attached(parameters="encodr.*")], r"no parameter is called 'encodr\.\*'"),
        (None, [attached(exclude="hed.*")], r"no parameter is called 'hed\.\*'"),
        (newton, [attached()], "LBFGS compares losses"),
        (lazy, [attached()], r"'classifier\.weight' has no shape yet"),
        (None, [attached(), aux.EMAWeights()], "'ema_weights' among the Trainer's callbacks"),
        (None, [attached(), aux.ParameterAnchor(form="variational")], "adds noise"),
        (
            None,
            [attached(name="one"), attached(parameters="*.0.*", name="two")],
            r"one: two quantises 'encoder\.0\.weight' too",
        ),
    ],
)
def test_what_can_be_known_before_training_is_said_then(plain_trainer, change, added, message):
    module = Classifier() if change is None else change(Classifier())
    with pytest.raises(aux.AuxiliaryError, match=message):
        trained(plain_trainer, module, *added)
