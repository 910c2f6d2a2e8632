"""``SelfDistillation``: masks, divergences, features under globs and callables, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_aux as aux
from tests.engine.small_models import Classifier, rows


class Checked(aux.SelfDistillation):
    """Compares its term and its gradient with a reference in every step."""

    def __init__(self, reference: Any, **arguments: Any) -> None:
        super().__init__(**({"teacher": "frozen", "name": "self_distillation"} | arguments))
        self.reference = reference
        self.terms: list[float] = []

    def loss(self, step: aux.Step) -> Tensor:
        term = super().loss(step)
        parameters = list(step.module.parameters())
        expected = self.reference(step, step.teacher(self.teacher))
        assert term.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
        pair = [
            torch.autograd.grad(each, parameters, retain_graph=True, allow_unused=True)
            for each in (term, expected)
        ]
        for mine, reference in zip(*pair, strict=True):
            assert (mine is None) == (reference is None)
            if mine is not None:
                torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-6)
        self.terms.append(term.item())
        return term


def fitted(plain_trainer: Any, objective: Checked, model: Any = None) -> Checked:
    model = model or Classifier(lr=0.3)
    plain_trainer(max_epochs=2, callbacks=[aux.FrozenTeacher(), objective]).fit(model, rows())
    assert len(objective.terms) == 12
    assert max(objective.terms) > 1e-3
    return objective


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of each row, from probabilities."""
    return (p * (p.log() - q.log())).sum(-1)


REFERENCES = {
    "kl": lambda student, taught: kl(taught, student),
    "reverse_kl": lambda student, taught: kl(student, taught),
    "js": lambda student, taught: (
        0.5 * kl(taught, (student + taught) / 2) + 0.5 * kl(student, (student + taught) / 2)
    ),
    # At these temperatures q/p stays below the clip.
    "alpha": lambda student, taught: torch.maximum(
        kl(taught, student), (student**2 / taught - student).sum(-1) / 2
    ),
    "tv": lambda student, taught: (student - taught).abs().sum(-1) / 2,
}
POWERS = {"tv": 1}


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("divergence", REFERENCES)
def test_on_logits_it_is_the_mean_divergence_of_the_examples_times_its_power_of_t(
    divergence, temperature, plain_trainer
):
    def reference(step: aux.Step, teacher: aux.Pass) -> Tensor:
        student, taught = ((z / temperature).softmax(-1) for z in (step.logits, teacher.logits))
        factor = temperature ** POWERS.get(divergence, 2)
        return factor * REFERENCES[divergence](student, taught).mean()

    fitted(plain_trainer, Checked(reference, divergence=divergence, temperature=temperature))


@pytest.mark.parametrize("divergence", ["mse", "cosine"])
def test_logits_can_be_compared_themselves_whatever_the_temperature(divergence, plain_trainer):
    def reference(step: aux.Step, teacher: aux.Pass) -> Tensor:
        if divergence == "mse":
            return F.mse_loss(step.logits, teacher.logits)
        return (1 - F.cosine_similarity(step.logits, teacher.logits)).mean()

    fitted(plain_trainer, Checked(reference, divergence=divergence, temperature=4.0))


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "js", "tv"])
def test_binary_logits_are_predictions_of_their_own(divergence, plain_trainer):
    def reference(step: aux.Step, teacher: aux.Pass) -> Tensor:
        both = ((z / 2).sigmoid() for z in (step.logits, teacher.logits))
        student, taught = (torch.stack([p, 1 - p], -1) for p in both)
        factor = 2.0 ** POWERS.get(divergence, 2)
        return factor * REFERENCES[divergence](student, taught).sum(1).mean()

    fitted(plain_trainer, Checked(reference, divergence=divergence, temperature=2.0, binary=True))


@pytest.mark.parametrize("divergence", REFERENCES)
def test_only_correct_drops_the_examples_that_the_teacher_gets_wrong(divergence, plain_trainer):
    """They contribute 0, and the mean stays over all examples."""
    counts: list[int] = []

    def reference(step: aux.Step, teacher: aux.Pass) -> Tensor:
        right = teacher.logits.argmax(1) == step.batch[1]
        counts.append(int(right.sum()))
        student, taught = step.logits.softmax(-1), teacher.logits.softmax(-1)
        each = REFERENCES[divergence](student, taught)
        return sum(each[i] for i in range(len(right)) if right[i]) / len(right) + 0 * each.sum()

    fitted(plain_trainer, Checked(reference, divergence=divergence, only_correct=True))
    assert 0 < sum(counts) < 48


def test_a_batch_of_which_the_teacher_gets_nothing_right_contributes_zero(plain_trainer):
    class Wrong(Classifier):
        """Its labels are never what the untrained model says."""

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx % 2 == 0:
                with torch.no_grad():
                    batch[1].copy_((initial(batch[0]).argmax(1) + 1) % 3)

    model = Wrong(lr=0.3)
    initial = Classifier()
    initial.load_state_dict(model.state_dict())
    terms: list[float] = []

    class Kept(aux.SelfDistillation):
        def loss(self, step: aux.Step) -> Tensor:
            term = super().loss(step)
            terms.append(term.item())
            (gradient,) = torch.autograd.grad(term, step.logits, retain_graph=True)
            assert torch.isfinite(gradient).all()
            assert (gradient.abs().sum() == 0) == (term.item() == 0)
            return term

    plain_trainer(callbacks=[aux.FrozenTeacher(), Kept("frozen", only_correct=True)]).fit(
        model, rows()
    )
    assert terms[2] == terms[4] == 0.0


def test_only_correct_reads_the_target_where_the_taps_say(plain_trainer):
    def reference(step: aux.Step, teacher: aux.Pass) -> Tensor:
        right = (teacher.logits.argmax(1) == step.batch[1].flip(0)).float()
        return (
            right * REFERENCES["kl"](step.logits.softmax(-1), teacher.logits.softmax(-1))
        ).mean()

    taps = aux.Taps(target=lambda p: p.batch[1].flip(0))
    fitted(plain_trainer, Checked(reference, only_correct=True, taps=taps))


class Dense(Classifier):
    """Logits ``(batch, classes, height, width)`` and a label for every pixel."""

    def forward(self, x: Tensor) -> Tensor:
        pixels = torch.stack([x * scale for scale in (1.0, 0.5, -1.0, 2.0, 0.3, -0.2)], 1)
        return super().forward(pixels).transpose(1, 2).unflatten(2, (2, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), pixel_labels(y))


def pixel_labels(y: Tensor) -> Tensor:
    return (y[:, None] + torch.arange(6)).remainder(3).unflatten(1, (2, 3))


def by_pixel(step: aux.Step) -> Tensor:
    return pixel_labels(step.batch[1])


@pytest.mark.parametrize("only_correct", [False, True])
@pytest.mark.parametrize("divergence", REFERENCES)
def test_dense_predictions_are_compared_pixel_by_pixel(divergence, only_correct, plain_trainer):
    def reference(step: aux.Step, teacher: aux.Pass) -> Tensor:
        total, count = step.logits.sum() * 0, 0
        for image, taught, labels in zip(step.logits, teacher.logits, by_pixel(step), strict=True):
            for row in range(2):
                for column in range(3):
                    p, q = image[:, row, column].softmax(0), taught[:, row, column].softmax(0)
                    count += 1
                    if not only_correct or q.argmax() == labels[row, column]:
                        total = total + REFERENCES[divergence](p, q)
        return total / count

    taps = aux.Taps(target=by_pixel)
    objective = Checked(
        reference, divergence=divergence, only_correct=only_correct, dim=1, taps=taps
    )
    fitted(plain_trainer, objective, Dense(lr=0.3))


class Square(Classifier):
    """As many positions as the batch has samples: a comparison with ``(4,)`` would broadcast."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.stack([x] * 4, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0])[:, 0], batch[1])


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (
            Square,
            {},
            r"target has shape \(4,\), and logits of shape \(4, 4, 3\).*need \(4, 4\)\. Give",
        ),
        (
            Dense,
            {"taps": aux.Taps(target=by_pixel)},
            r"\(4, 2, 3\), and .*\(4, 3, 2, 3\) with the classes in dim=-1 need \(4, 3, 2\)\. "
            r"It would fit dim=1\.",
        ),
        (Classifier, {"dim": 2}, r"self_distillation: logits of shape \(4, 3\) have no .*dim=2"),
        (
            Classifier,
            {"taps": aux.Taps(target=lambda p: F.one_hot(p.batch[1], 3))},
            r"shape \(4, 3\), and logits of shape \(4, 3\) .* need \(4,\)\.",
        ),
    ],
)
def test_a_target_that_is_not_one_index_per_prediction_is_refused(
    model, arguments, message, plain_trainer
):
    callbacks = [
        aux.FrozenTeacher(),
        aux.SelfDistillation("frozen", only_correct=True, **arguments),
    ]
    with pytest.raises(aux.AuxiliaryError, match=message):
        plain_trainer(callbacks=callbacks).fit(model(), rows())


# ------------------------------------------------------------------------------------- features
@pytest.mark.parametrize("divergence", ["mse", "cosine"])
def test_on_a_path_it_is_the_distance_of_the_outputs_of_that_module(divergence, plain_trainer):
    def reference(step: aux.Step, teacher: aux.Pass) -> Tensor:
        scale = step.batch[0].new_tensor([1.0, 1.0, 1.0, 0.01])
        own = step.module.encoder(step.batch[0] * scale)
        other = teacher.features("encoder")
        if divergence == "mse":
            return ((own - other) ** 2).sum() / own.numel()
        norms = own.norm(dim=1) * other.norm(dim=1)
        return (1 - (own * other).sum(1) / norms).mean()

    fitted(plain_trainer, Checked(reference, on="encoder", divergence=divergence))


def test_a_glob_gives_the_mean_over_its_modules(plain_trainer):
    def reference(step: aux.Step, teacher: aux.Pass) -> Tensor:
        pairs = [(step.features("encoder.*")[f"encoder.{i}"], i) for i in range(3)]
        return (
            sum(F.mse_loss(own, teacher.features("encoder.*")[f"encoder.{i}"]) for own, i in pairs)
            / 3
        )

    fitted(plain_trainer, Checked(reference, on="encoder.*", divergence="mse"))


def test_a_callable_is_read_from_the_student_and_from_the_teacher(plain_trainer):
    asked: list[str] = []

    def centred(seen: aux.Pass) -> Tensor:
        asked.append(type(seen).__name__)
        return seen.returned - seen.returned.mean(0)

    def reference(step: aux.Step, teacher: aux.Pass) -> Tensor:
        own, other = (z - z.mean(0) for z in (step.returned, teacher.returned))
        return (own - other).square().mean()

    fitted(plain_trainer, Checked(reference, on=centred, divergence="mse"))
    assert asked == ["Step", "Pass"] * 12


def test_convolutional_features_are_compared_example_by_example(plain_trainer):
    class Convolutional(Classifier):
        def __init__(self) -> None:
            super().__init__(lr=0.3)
            self.encoder = nn.Sequential(nn.Conv1d(1, 3, 2), nn.Tanh())
            self.classifier = nn.Linear(9, 3)

        def forward(self, x: Tensor) -> Tensor:
            scaled = x * x.new_tensor([1.0, 1.0, 1.0, 0.01])
            return self.classifier(self.encoder(scaled[:, None]).flatten(1))

    def reference(step: aux.Step, teacher: aux.Pass) -> Tensor:
        own, other = step.features("encoder"), teacher.features("encoder")
        similarities = [
            (a.flatten() @ b.flatten()) / (a.norm() * b.norm())
            for a, b in zip(own, other, strict=True)
        ]
        return 1 - sum(similarities) / len(similarities)

    objective = Checked(reference, on="encoder", divergence="cosine")
    fitted(plain_trainer, objective, Convolutional())


# ------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"divergence": "mae"}, r"divergence='mae' does not fit on='logits'.*'kl'.*'cosine'"),
        ({"on": "encoder"}, r"divergence='kl' does not fit on='encoder'.*'mse', 'cosine'"),
        ({"temperature": -1.0}, r"temperature=-1\.0 must be positive"),
        (
            {"on": "encoder", "divergence": "mse", "temperature": 2.0},
            r"temperature, only_correct, dim and binary need on='logits', not 'encoder'",
        ),
        ({"on": "encoder", "divergence": "mse", "only_correct": True}, "binary need on='logits'"),
        ({"on": "encoder", "divergence": "mse", "dim": 1}, "binary need on='logits'"),
        ({"on": "encoder", "divergence": "mse", "binary": True}, "binary need on='logits'"),
        ({"binary": True, "only_correct": True}, "only_correct needs one class index.*binary=True"),
        ({"nonfinite": "?"}, r"self_distillation: nonfinite='\?' is unknown"),
    ],
)
def test_bad_arguments_are_refused_when_it_is_made(arguments, message):
    with pytest.raises(aux.AuxiliaryError, match=message):
        aux.SelfDistillation(**arguments)


class Never(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("trained")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": "emma"}, r"no teacher is called 'emma'\. Near matches: 'ema'"),
        ({"on": "encodr", "divergence": "mse"}, "no module .* the path 'encodr'.*'encoder'"),
        ({"on": "head.*", "divergence": "mse"}, r"the path 'head\.\*'"),
        ({"taps": aux.Taps(logits="clasifier")}, "'clasifier'.*'classifier'"),
    ],
)
def test_what_is_not_in_the_model_is_refused_before_training(arguments, message, plain_trainer):
    callbacks = [aux.EMATeacher(), aux.SelfDistillation(**arguments)]
    with pytest.raises(aux.AuxiliaryError, match=message):
        plain_trainer(callbacks=callbacks).fit(Never(), rows())


class Recurrent(Classifier):
    """Its encoder returns a tuple, as every RNN and many an attention layer does."""

    def __init__(self) -> None:
        super().__init__(lr=0.3)
        self.encoder = nn.LSTM(4, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * x.new_tensor([1.0, 1.0, 1.0, 0.01])
        return self.classifier(self.encoder(scaled[:, None])[0][:, -1])


def test_features_that_are_a_tuple_are_a_named_error_with_the_way_to_pick_one(plain_trainer):
    callbacks = [aux.EMATeacher(), aux.SelfDistillation(on="encoder", divergence="mse")]
    with pytest.raises(aux.AuxiliaryError, match=r"output of 'encoder' is a tuple of 2.*Taps"):
        plain_trainer(callbacks=callbacks).fit(Recurrent(), rows())


def test_the_way_to_pick_one_that_the_error_names_works(plain_trainer):
    def reference(step: aux.Step, teacher: aux.Pass) -> Tensor:
        return F.mse_loss(step.features()[0], teacher.features()[0])

    objective = Checked(
        reference,
        on=lambda p: p.features()[0],
        taps=aux.Taps(features="encoder"),
        divergence="mse",
    )
    fitted(plain_trainer, objective, Recurrent())
