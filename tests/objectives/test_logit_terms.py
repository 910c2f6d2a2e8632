"""Objectives of logits on sequences, under masks, and with input that does not fit them."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_aux as aux
from tests.contract.training import fit, largest_difference, seeded, weights

BATCH, LENGTH, WORDS = 4, 5, 7

PADDED = {
    "label_smoothing": lambda taps: aux.LabelSmoothing(0.3, taps=taps),
    "max_sup": lambda taps: aux.MaxSup(0.3, taps=taps),
    "confidence_penalty": lambda taps: aux.ConfidencePenalty(0.3, taps=taps),
    "confidence_limit": lambda taps: aux.ConfidenceLimit(4, weight=0.3, taps=taps),
    "spectral_decoupling": lambda taps: aux.SpectralDecoupling(0.3, taps=taps),
    "z_loss": lambda taps: aux.ZLoss(0.3, taps=taps),
    "weak_to_strong": lambda taps: aux.WeakToStrongConfidence(0.3, balanced=False, taps=taps),
}


class Tagger(L.LightningModule):
    """A label for each position; padding is given to the model but not to the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 6)
        self.head = nn.Linear(6, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embedding(words))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch["words"])
        return F.cross_entropy(logits.movedim(-1, 1), batch["labels"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def sequences(padding: int) -> DataLoader[Any]:
    """The same sequences, with other words in the places that are masked."""
    random = torch.Generator().manual_seed(0)
    words = torch.randint(1, WORDS, (16, LENGTH), generator=random)
    mask = torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (16, 1), generator=random)
    rows = [
        {
            "words": torch.where(m, w, padding),
            "labels": torch.where(m, (w + 1) % WORDS, -100),
            "attention_mask": m.long(),
        }
        for w, m in zip(words, mask, strict=True)
    ]
    return DataLoader(rows, batch_size=BATCH)  # type: ignore[arg-type]


@pytest.mark.parametrize("term", PADDED)
def test_what_is_in_masked_positions_does_not_matter(term: str) -> None:
    taps = aux.Taps(mask="attention_mask")
    ended = []
    for padding in (0, 3):
        module = seeded(Tagger)
        fit(module, [PADDED[term](taps)], data=sequences(padding))
        ended.append(weights(module))
    assert largest_difference(*ended) < 1e-7


@pytest.mark.parametrize("term", PADDED)
def test_without_the_mask_it_would(term: str) -> None:
    ended = []
    for padding in (0, 3):
        module = seeded(Tagger)
        fit(module, [PADDED[term](None)], data=sequences(padding))
        ended.append(weights(module))
    reads_labels = term in ("label_smoothing", "confidence_limit", "weak_to_strong")
    assert (largest_difference(*ended) > 1e-4) is not reads_labels


TAUGHT = {
    "self_distillation": lambda: [
        aux.RandomTeacher(init="shuffle"),
        aux.SelfDistillation("random"),
    ],
    "features": lambda: [
        aux.RandomTeacher(init="shuffle"),
        aux.SelfDistillation("random", on="embedding", divergence="mse"),
    ],
    "features_cosine": lambda: [
        aux.RandomTeacher(init="shuffle"),
        aux.SelfDistillation("random", on="embedding", divergence="cosine"),
    ],
    "ema_anchor": lambda: [aux.EMAAnchor(decay=0.5, entropy=0.1)],
    "early_learning": lambda: [aux.EarlyLearningRegularization()],
    "progressive": lambda: [aux.ProgressiveSelfDistillation(weight=0.5)],
    "weak_to_strong": lambda: [aux.WeakToStrongConfidence(weight=0.5)],
}


@pytest.mark.parametrize("term", TAUGHT)
def test_the_mask_reaches_teachers_memories_and_shares_of_classes_too(term: str) -> None:
    ended = []
    for padding in (0, 3):
        module = seeded(Tagger)
        taps = aux.Taps(mask="attention_mask")
        fit(module, [taps, *TAUGHT[term]()], data=sequences(padding))
        ended.append(weights(module))
    assert largest_difference(*ended) < 1e-7


def test_a_mask_of_another_shape_is_an_error_that_names_both() -> None:
    taps = aux.Taps(mask=lambda step: step.batch["attention_mask"][:, :2])
    with pytest.raises(
        aux.AuxiliaryError, match=r"z_loss: mask must have the shape.*\(4, 5\).*\(4, 2\)"
    ):
        fit(seeded(Tagger), [aux.ZLoss(taps=taps)], data=sequences(0))


def test_a_mask_that_is_not_in_the_batch_is_an_error() -> None:
    with pytest.raises(aux.AuxiliaryError, match=r"max_sup, mask.*'padding'"):
        fit(seeded(Tagger), [aux.MaxSup(taps=aux.Taps(mask="padding"))], data=sequences(0))


def test_a_target_that_does_not_fit_is_an_error_of_the_objective() -> None:
    taps = aux.Taps(target=lambda step: step.batch["labels"][:, 0])
    with pytest.raises(aux.AuxiliaryError, match=r"label_smoothing: the target must be class"):
        fit(seeded(Tagger), [aux.LabelSmoothing(taps=taps)], data=sequences(0))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: aux.ConfidenceLimit(samples=0.5), "at least one answer"),
        (lambda: aux.ConfidencePenalty(threshold=0.0), "above 0"),
        (lambda: aux.DualHeadDistillation("head", temperature=0), "must be positive"),
        (lambda: aux.SelfDistillation(temperature=float("inf")), "positive and finite"),
        (lambda: aux.MultiTeacherDistillation([], "encoder"), "at least"),
        (lambda: aux.MultiTeacherDistillation(["a", "a"], "encoder"), "twice"),
        (lambda: aux.MultiTeacherDistillation(["a"], "encoder", drop=1.0), r"\[0, 1\)"),
        (lambda: aux.MultiTeacherDistillation(["a"], "encoder", {"b": "x"}), "among the teachers"),
    ],
)
def test_arguments_that_make_no_sense_are_errors_at_once(make: Any, said: str) -> None:
    with pytest.raises(aux.AuxiliaryError, match=said):
        make()


class Blown(Tagger):
    """Its logits are NaN in the second step, and its own loss does not read them then."""

    def forward(self, words: Tensor) -> Tensor:
        logits = super().forward(words)
        return logits if self.global_step != 1 else logits * float("nan")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss if self.global_step != 1 else self.head.weight.square().sum()


def test_a_term_with_weight_0_that_only_remembers_ends_nothing() -> None:
    ended = []
    for added in ([], [aux.EarlyLearningRegularization(weight=0.0)]):
        module = seeded(Blown)
        trainer = fit(module, added, data=sequences(0))
        assert trainer.global_step == 8
        ended.append(weights(module))
    assert largest_difference(*ended) == 0.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: aux.EMAAnchor(space="weight", teacher="frozen"),
        lambda: aux.ParameterAnchor(to="frozen"),
    ],
)
def test_a_teacher_of_another_model_has_no_weights_and_says_so_before_training(make: Any) -> None:
    teacher = aux.FrozenTeacher(module=nn.Linear(3, 3))
    with pytest.raises(aux.AuxiliaryError, match="has no weights for the student's"):
        fit(seeded(Tagger), [teacher, make()], data=sequences(0))
