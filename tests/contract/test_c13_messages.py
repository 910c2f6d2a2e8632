"""C13: bad input is an error that says what was wrong, where, and what to do."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_aux import (
    AuxiliaryError,
    DropoutSchedule,
    EarlyLearningRegularization,
    EMAAnchor,
    EMATeacher,
    FrozenTeacher,
    Objective,
    SelfDistillation,
    Step,
    Taps,
)
from lightning_aux.registry import ENTRIES
from tests.contract.models import FEATURES, HIDDEN, Classifier, Samples, Stream
from tests.contract.references import HandWritten, reference
from tests.contract.training import (
    callbacks,
    every_term,
    fit,
    identical,
    largest_difference,
    loader,
    quiet_trainer,
    seeded,
    weights,
)


def refusal(
    module: L.LightningModule, added: list[Any], data: Any = None, **arguments: Any
) -> tuple[str, int]:
    """The message that training ends with, and how many optimizer steps were taken before."""
    trainer = quiet_trainer(added, **arguments)
    with pytest.raises(AuxiliaryError) as raised:
        trainer.fit(module, loader() if data is None else data)
    return str(raised.value), trainer.global_step


class Term(Objective):
    """Whatever function it is given."""

    def __init__(self, function: Any, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.function = function

    def loss(self, step: Step) -> Tensor:
        result: Tensor = self.function(step)
        return result


# ------------------------------------------------------------------------------- paths and targets
@pytest.mark.parametrize(
    "added",
    [
        [EMATeacher(), SelfDistillation(on="encodr", divergence="mse")],
        [EMATeacher(), SelfDistillation(on="encodr.*", divergence="mse")],
        [EMATeacher(), SelfDistillation(), Taps(logits="encodr")],
        [Term(lambda step: step.loss, reads=("encodr",))],
    ],
    ids=["on", "glob", "Taps", "reads"],
)
def test_f33_a_path_that_matches_nothing_lists_near_matches_before_training(
    added: list[Any],
) -> None:
    message, steps = refusal(seeded(Classifier), added)
    assert "no module of Classifier has the path 'encodr" in message
    assert "Near matches: " in message
    assert "'encoder'" in message
    assert steps == 0


def test_a_path_that_was_not_declared_says_how_to_declare_it() -> None:
    term = Term(lambda step: step.features("encoder").mean())
    message, steps = refusal(seeded(Classifier), [term])
    assert "term: 'encoder' exists but was not declared" in message
    assert "reads=('encoder',)" in message
    assert steps == 0


class Inputs(Dataset[Any]):
    """Batches without labels, as a tensor or in a dict."""

    def __init__(self, key: str | None = None) -> None:
        self.x = Samples().x
        self.key = key

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index] if self.key is None else {self.key: self.x[index]}


class Unsupervised(Classifier):
    """Needs no labels itself."""

    def total_loss(self, batch: Any) -> Tensor:
        return self(batch["x"] if isinstance(batch, dict) else batch).square().mean()


@pytest.mark.parametrize(
    ("key", "found"), [(None, "a tensor of shape (8, 6)"), ("x", "a dict with the keys ['x']")]
)
def test_a_batch_without_a_target_says_what_it_is_instead(key: str | None, found: str) -> None:
    added = [EMATeacher(), SelfDistillation(only_correct=True)]
    message, steps = refusal(seeded(Unsupervised), added, DataLoader(Inputs(key), batch_size=8))
    assert f"self_distillation: the batch has no target: it is {found}" in message
    assert "Taps(target=" in message
    assert steps == 0


def test_a_key_that_is_called_like_a_label_is_named_as_the_example() -> None:
    added = [EMATeacher(), SelfDistillation(only_correct=True)]

    class Labelled(Inputs):
        def __getitem__(self, index: int) -> Any:
            return {"x": self.x[index], "churn_label": 0}

    message, _ = refusal(seeded(Unsupervised), added, DataLoader(Labelled(), batch_size=8))
    assert "for example Taps(target='churn_label')." in message


def test_a_key_path_that_ends_early_says_where_it_ends() -> None:
    added = [EMATeacher(), SelfDistillation(only_correct=True), Taps(target="graph.y")]
    message, _ = refusal(seeded(Classifier), added)
    assert "'graph.y' ends at the batch, which is a list of 2 (Tensor, Tensor)" in message


# --------------------------------------------------------------------------------- the user's model
def test_a_model_without_dropout_says_what_was_looked_for() -> None:
    class Plain(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh())

    message, steps = refusal(seeded(Plain), [DropoutSchedule(p=0.1, until="50%")])
    for looked_for in ("nn.Dropout*", "nn.AlphaDropout", "drop_prob", "nn.MultiheadAttention"):
        assert looked_for in message
    assert "Add nn.Dropout(0.0)" in message
    assert steps == 0


def test_a_training_step_that_does_not_call_the_model_says_so() -> None:
    class Parts(Classifier):
        def total_loss(self, batch: Any) -> Tensor:
            h = batch[0] @ self.encoder[0].weight.T
            return nn.functional.cross_entropy(h @ self.head.weight.T, batch[1])

    message, steps = refusal(seeded(Parts), callbacks("self_distillation_kl"))
    assert "self_distillation: Parts.training_step does not call self(...)" in message
    assert "Call self(x) in training_step" in message
    assert steps == 0


def test_manual_optimisation_past_manual_backward_says_what_to_call() -> None:
    class Past(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.total_loss(batch).backward()
            optimizer.step()

    message, steps = refusal(seeded(Past, manual=True), callbacks("self_distillation_kl"))
    assert "Call self.manual_backward(loss) instead of loss.backward()" in message
    assert steps <= 1


def test_parameters_without_a_shape_are_named() -> None:
    class Lazy(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.LazyLinear(4)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.encoder.parameters(), lr=0.1)

    message, steps = refusal(seeded(Lazy), callbacks("self_distillation_kl"))
    assert "ema: 'head.weight', 'head.bias' has no shape yet" in message
    assert "Run one batch through the module" in message
    assert steps == 0


def test_backward_in_automatic_optimisation_is_refused() -> None:
    message, steps = refusal(seeded(Classifier), [Term(lambda step: step.loss, backward=1)])
    assert "backward=1 needs manual optimisation" in message
    assert steps == 0


# --------------------------------------------------------------------------------------- batches
@every_term
def test_a_batch_of_one_trains_like_the_hand_written_term(entry: str) -> None:
    """Every term is a mean over examples that exists for one example."""
    hand = seeded(HandWritten, reference(entry), 0.7)
    fit(hand, data=loader(5, 1, indexed=True))
    module = seeded(Classifier)
    fit(module, callbacks(entry, 0.7), loader(5, 1))
    # Directions of what one example differs from the mean of a few are sensitive to rounding.
    tolerance = 1e-3 if entry == "multi_teacher_distillation" else 1e-6
    assert largest_difference(weights(module), weights(hand)) < tolerance


@every_term
def test_an_empty_batch_is_named(entry: str) -> None:
    """A term over examples has no mean over none of them; one over weights needs no examples."""

    class TolerantOfNone(Classifier):
        def total_loss(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="sum")

    def without_rows(samples: list[Any]) -> tuple[Tensor, Tensor]:
        x, y = torch.utils.data.default_collate(samples)
        return x[:0], y[:0]

    module, data = seeded(TolerantOfNone), loader(collate_fn=without_rows)
    if entry in ("ema_anchor_weight", "parameter_anchor_l2"):  # do not read the batch
        fit(module, callbacks(entry), data)
        return
    message, steps = refusal(module, callbacks(entry), data)
    assert ENTRIES[entry].objective is not None
    assert message.startswith(f"{ENTRIES[entry].objective}:")
    assert "empty" in message
    assert steps == ENTRIES[entry].begins


# ----------------------------------------------------------------------------------------- terms
def broken_from(first: int) -> Any:
    """A term that is NaN from the given optimizer step on."""
    return lambda step: (
        step.logits.square().mean() * (float("nan") if step.progress.steps >= first else 1.0)
    )


def test_a_term_that_is_not_finite_raises_and_names_the_step() -> None:
    module = seeded(Classifier)
    message, steps = refusal(module, [Term(broken_from(3))])
    assert "term: the term is nan after 3 optimizer steps" in message
    assert "nonfinite='skip'" in message
    assert steps == 3
    assert all(value.isfinite().all() for value in weights(module).values())


def test_a_term_that_is_not_finite_is_skipped_and_counted_where_asked() -> None:
    """Those steps train with the main loss alone."""
    module = seeded(Classifier)
    skipping = Term(broken_from(3), nonfinite="skip")
    fit(module, [skipping])
    assert skipping.state() == {"skipped": 7}

    expected = seeded(Classifier)
    fit(expected, [Term(lambda step: step.logits.square().mean(), weight="early(1, until=3)")])
    assert identical(weights(module), weights(expected))


@every_term
def test_a_registered_term_that_becomes_infinite_raises_with_its_name(entry: str) -> None:
    first = ENTRIES[entry].begins + 2
    # What it remembers begins to count in the second epoch.
    said = 5 if entry == "progressive_self_distillation" else first

    class Overflowing(Classifier):
        def on_train_batch_start(self, *_: Any) -> None:
            if self.global_step == first:
                torch.nn.init.constant_(self.encoder[0].weight, float("nan"))

    message, steps = refusal(seeded(Overflowing), callbacks(entry))
    assert message.startswith(f"{ENTRIES[entry].objective}: the term is nan after {said}")
    assert steps == said


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (lambda step: step.logits, "shape (8, 4)"),
        (lambda step: step.logits.mean(1), "shape (8,)"),
        (lambda step: 0.5, "0.5"),
        (lambda step: None, "None"),
        (lambda step: step.target.sum(), "shape ()"),
    ],
    ids=["matrix", "vector", "number", "nothing", "integer"],
)
def test_a_term_that_is_not_a_scalar_tensor_says_what_it_is(result: Any, got: str) -> None:
    message, steps = refusal(seeded(Classifier), [Term(result)])
    assert "term: loss(step) must return a scalar floating-point tensor" in message
    assert got in message
    assert steps == 0


# ----------------------------------------------------------------------------- callbacks and time
def test_two_callbacks_of_one_name_are_refused() -> None:
    added = [EMATeacher(), EMATeacher(decay=0.5)]
    message, steps = refusal(seeded(Classifier), added)
    assert "two callbacks are called 'ema': a EMATeacher and a EMATeacher" in message
    assert "name='...'" in message
    assert steps == 0


@pytest.mark.parametrize(
    "objective", [SelfDistillation(teacher="emma"), EMAAnchor(teacher="emma")], ids=str
)
def test_a_teacher_that_is_not_attached_is_named_with_those_that_are(objective: Any) -> None:
    added = [EMATeacher(), FrozenTeacher(), objective]
    message, steps = refusal(seeded(Classifier), added)
    assert f"{objective.name}: no teacher is called 'emma'. Near matches: 'ema'" in message
    assert "EMATeacher(name='emma')" in message
    assert steps == 0


def test_an_iterable_dataset_has_no_memory_per_sample() -> None:
    message, steps = refusal(
        seeded(Classifier), [EarlyLearningRegularization()], DataLoader(Stream(), batch_size=8)
    )
    assert "early_learning_regularization" in message
    assert "the training dataset Stream is iterable and has no index" in message
    assert "map-style dataset" in message
    assert steps == 0


@pytest.mark.parametrize(
    "added",
    [
        [EMATeacher(), SelfDistillation(weight="linear(0, 1, until=30%)")],
        [DropoutSchedule(p=0.1, until="50%")],
    ],
    ids=["weight", "dropout"],
)
def test_percent_of_a_training_without_end_is_refused(added: list[Any]) -> None:
    message, steps = refusal(seeded(Classifier), added, max_epochs=-1)
    assert message.startswith(added[-1].name)
    assert "%" in message
    assert "give max_steps/max_epochs or write the time in steps" in message
    assert steps == 0


@every_term
def test_a_weight_that_does_not_parse_points_at_the_character(entry: str) -> None:
    with pytest.raises(ValueError, match=r"linear\(0, 1, untl=30%\)\n *\^") as raised:
        callbacks(entry, "linear(0, 1, untl=30%)")
    assert "until" in str(raised.value)
    assert "example:" in str(raised.value)
