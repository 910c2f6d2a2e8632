"""A small language model learns from a larger one: Lightning's demo, and one of Hugging Face's.

Both are made from arguments alone, with nothing downloaded, and their training is compared with the
same loop written by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.transformer import LightningTransformer, Transformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_aux as aux
from tests.engine.small_models import largest_difference, weights

WORDS, LENGTH, TEMPERATURE, WEIGHT = 12, 6, 2.0, 0.7


def text() -> Tensor:
    return torch.randint(WORDS, (16, LENGTH + 1), generator=torch.Generator().manual_seed(3))


def by_hand(
    student: Any, teacher: nn.Module, batches: Iterable[Any], both: Callable[[nn.Module, Any], Any]
) -> dict[str, Tensor]:
    """Loss + w·T²·KL(teacher ‖ student), the mean over positions; ``both``: loss and logits."""
    optimizer = student.configure_optimizers()
    teacher.eval()
    for batch in batches:
        loss, logits = both(student, batch)
        with torch.no_grad():
            p = (both(teacher, batch)[1] / TEMPERATURE).softmax(-1)
        q = (logits / TEMPERATURE).softmax(-1)
        kl = (p * (p / q).log()).sum(-1).mean()
        optimizer.zero_grad()
        (loss + WEIGHT * TEMPERATURE**2 * kl).backward()
        optimizer.step()
    return weights(student)


def distilled(plain_trainer: Any, student: Any, teacher: nn.Module, data: Any) -> dict[str, Tensor]:
    added = [
        aux.FrozenTeacher(module=teacher),
        aux.SelfDistillation("frozen", temperature=TEMPERATURE, weight=WEIGHT),
    ]
    plain_trainer(max_epochs=1, callbacks=added).fit(student, data)
    return weights(student)


def alone(plain_trainer: Any, student: Any, data: Any) -> dict[str, Tensor]:
    plain_trainer(max_epochs=1).fit(student, data)
    return weights(student)


# --------------------------------------------------------------------------------- Lightning's demo
@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo downloads its own data set in ``prepare_data``, whatever loader it is given."""
    monkeypatch.setattr("lightning.pytorch.demos.transformer.WikiText2", lambda **_: None)


def demo(width: int, layers: int) -> LightningTransformer:
    """The demo with another model in it; without dropout, so that a loop by hand draws the same."""
    torch.manual_seed(width)
    module = LightningTransformer(vocab_size=WORDS)
    module.model = Transformer(
        vocab_size=WORDS, ninp=width, nhead=2, nhid=width, nlayers=layers, dropout=0.0
    )
    return module


@pytest.mark.parametrize("part", [False, True], ids=["LightningModule", "its model"])
def test_lightnings_demo_learns_from_a_larger_one(part, plain_trainer):
    words = text()
    loader = DataLoader(TensorDataset(words[:, :-1], words[:, 1:]), batch_size=4)

    def both(model: nn.Module, batch: Any) -> Any:
        output = model(*batch)  # log-probabilities, which are logits too
        return F.nll_loss(output, batch[1].view(-1)), output

    teacher: nn.Module = demo(32, 3)
    attached = distilled(plain_trainer, demo(8, 1), teacher.model if part else teacher, loader)
    assert largest_difference(attached, by_hand(demo(8, 1), teacher, loader, both)) < 1e-6
    assert largest_difference(attached, alone(plain_trainer, demo(8, 1), loader)) > 1e-3


# ------------------------------------------------------------------------------------- Hugging Face
class Causal(L.LightningModule):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.net = causal(width, layers)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.net(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def causal(width: int, layers: int) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(width)
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=16, n_embd=width, n_layer=layers, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def test_a_causal_model_of_hugging_face_learns_from_a_larger_one(plain_trainer):
    """The teacher is called with the student's keywords: words, mask and labels."""
    words = text()
    mask = (torch.arange(LENGTH + 1) < 5).long().expand_as(words)
    samples = [
        {"input_ids": w, "attention_mask": m, "labels": w} for w, m in zip(words, mask, strict=True)
    ]
    loader = DataLoader(samples, batch_size=4)

    def both(model: Any, batch: Any) -> Any:
        output = getattr(model, "net", model)(**batch)
        return output.loss, output.logits

    teacher = causal(32, 3)
    attached = distilled(plain_trainer, Causal(8, 1), teacher, loader)
    assert largest_difference(attached, by_hand(Causal(8, 1), teacher, loader, both)) < 1e-6
    assert largest_difference(attached, alone(plain_trainer, Causal(8, 1), loader)) > 1e-3
