"""Models of other packages train with us as in a loop of plain torch with the terms written out.

The loop has no Lightning and nothing of ours: a deep copy as the teacher, the average of its
weights parameter by parameter, the terms from ``torch.nn.functional``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import chain
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.transformer import LightningTransformer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_aux as aux

DECAY, TEMPERATURE = 0.7, 2.0
DISTILLED, PULLED = 1.5, 0.05
EPOCHS, SEED = 2, 6

# The logits and the loss of a module for one batch.
Run = Callable[[Any, Any], tuple[Tensor, Tensor]]


class Logged(L.Callback):
    """Keeps main loss, distillation and distance as they are logged in every step."""

    KEYS = ("aux/main", "aux/self_distillation", "aux/ema_anchor")

    def __init__(self) -> None:
        self.rows: list[list[float]] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.rows.append([float(trainer.callback_metrics[key]) for key in self.KEYS])


def in_plain_torch(module: Any, run: Run, loader: DataLoader[Any]) -> list[list[float]]:
    """Trains ``module`` and returns the numbers that `Logged` keeps."""
    optimizer = module.configure_optimizers()
    teacher = deepcopy(module).eval().requires_grad_(False)
    rows = []
    for batch in chain.from_iterable(loader for _ in range(EPOCHS)):
        logits, main = run(module, batch)
        taught, _ = run(teacher, batch)
        distillation = TEMPERATURE**2 * F.kl_div(
            F.log_softmax(logits / TEMPERATURE, -1),
            F.softmax(taught / TEMPERATURE, -1),
            reduction="batchmean",
        )
        pairs = list(zip(module.parameters(), teacher.parameters(), strict=True))
        distance = sum((live - average).square().sum() for live, average in pairs)
        optimizer.zero_grad()
        (main + DISTILLED * distillation + PULLED * distance).backward()
        optimizer.step()
        with torch.no_grad():
            for live, average in pairs:
                average.mul_(DECAY).add_(live, alpha=1 - DECAY)
        rows.append([main.item(), distillation.item(), float(distance)])
    return rows


def transformer() -> tuple[Any, Run, Any]:
    """Lightning's demo: two inputs, log-probabilities, the words of all sequences in one row."""
    text = torch.randint(12, (16, 7), generator=torch.Generator().manual_seed(3))
    # From one in ten initial weights its attention makes 1e-9 and more of rounding in eight steps.
    torch.manual_seed(1)

    def run(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
        logits = module(*batch)
        return logits, F.nll_loss(logits, batch[1].flatten())

    return (
        LightningTransformer(vocab_size=12),
        run,
        list(zip(text[:, :-1], text[:, 1:], strict=True)),
    )


class Bert(L.LightningModule):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.net = pytest.importorskip("transformers").BertForSequenceClassification(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.net(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Not Adam: it would make steps of full size of the rounding in gradients that are zero.
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def bert() -> tuple[Any, Run, Any]:
    """A Hugging Face classifier made from a config: a loss and logits in one output, dicts."""
    config = pytest.importorskip("transformers").BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=12, num_labels=3,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(30, (16, 8), generator=generator)
    labels = torch.randint(3, (16,), generator=generator)

    def run(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
        logits = module.net(input_ids=batch["input_ids"]).logits
        return logits, F.cross_entropy(logits, batch["labels"])

    samples = [
        {"input_ids": words, "labels": label} for words, label in zip(tokens, labels, strict=True)
    ]
    return Bert(config), run, samples


@pytest.fixture(autouse=True)
def _doubles() -> Iterator[None]:
    """Float64, so that only rounding is left to tell the two apart."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("make", [transformer, bert])
def test_every_step_and_the_weights_are_those_of_plain_torch(make, plain_trainer, monkeypatch):
    # The demo downloads its own data in prepare_data, whatever loader it is given.
    monkeypatch.setattr("lightning.pytorch.demos.transformer.WikiText2", lambda **_: None)
    module, run, samples = make()
    by_hand = deepcopy(module).train()
    loader = DataLoader(samples, batch_size=4)
    logged = Logged()
    added = [
        aux.EMATeacher(decay=DECAY),
        aux.SelfDistillation(temperature=TEMPERATURE, weight=DISTILLED),
        aux.EMAAnchor(space="weight", weight=PULLED, teacher="ema"),
        logged,
    ]

    # Dropout is on: both draw the same masks as long as neither teacher draws any.
    L.seed_everything(SEED, verbose=False)
    module.train()
    plain_trainer(max_epochs=EPOCHS, log_every_n_steps=1, callbacks=added).fit(module, loader)
    L.seed_everything(SEED, verbose=False)
    expected = in_plain_torch(by_hand, run, loader)

    assert len(logged.rows) == len(expected) == EPOCHS * len(loader)
    for step, (ours, theirs) in enumerate(zip(logged.rows, expected, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9), step
    assert min(distance for _, _, distance in expected[1:]) > 1e-4
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-6, atol=1e-9)
