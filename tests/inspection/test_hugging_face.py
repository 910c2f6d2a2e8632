"""A Hugging Face model in a thin module: its encoder, its classifier and the labels are found."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

import lightning_aux as aux
from lightning_aux.inspection import Shape

pytest.importorskip("transformers")

from tests.third_party.test_hugging_face import Bert, samples


def test_encoder_classifier_labels_and_blocks_of_a_bert() -> None:
    torch.manual_seed(4)
    model, loader = Bert(), DataLoader(samples(), batch_size=4)
    callbacks = [
        aux.EMATeacher(decay=0.9),
        aux.SelfDistillation(only_correct=True),
        aux.StochasticDepthSchedule(0.1, "net.bert.encoder.layer.?"),
    ]
    found = aux.inspect(model, loader, callbacks, steps=0)
    assert not found.fails
    assert found.binding("logits").where == "Bert.net(...)['logits']"
    assert found.binding("target").where == "batch['labels']"
    assert found.binding("classifier").where == "net.classifier"
    assert found.binding("encoder").where == "net.bert"
    assert found.module("net.bert.pooler").output == Shape((4, 16), "float32")
    assert found.module("net").parameters == sum(each.numel() for each in model.parameters())
    blocks = {each.path for each in found.modules if "residual block" in each.kinds}
    assert {f"net.bert.encoder.layer.{place}" for place in (0, 1)} <= blocks
    assert "net.bert.encoder" not in blocks
    assert found.member("self_distillation").binds == (
        "logits = Bert.net(...)['logits']",
        "target = batch['labels']",
        "teacher ema",
    )
    roles = {each.path: each.roles for each in found.batch}
    assert roles["labels"] == ("target", "input of the model")
