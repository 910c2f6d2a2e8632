"""Of modules that other packages ship, `inspect` finds encoder, classifier and labels."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

import lightning_aux as aux
from tests.third_party.shipped_modules import SHIPPED


@dataclass(frozen=True)
class Truth:
    """What a reader of the package's source would say.

    `labels` is the key path of the leaf that serves as target, or what is suggested where no rule
    finds it.
    """

    encoder: str
    classifier: str
    labels: str
    suggested: bool = False


TRUTH = {
    "chemprop": Truth("message_passing", "predictor.ffn.1.2", "Y", suggested=True),
    "torch_geometric": Truth(
        "model.mp.layer1.layer.model", "model.post_mp.layer_post_mp.model.0.model", "y"
    ),
    "deeptab": Truth("estimator.encoder", "estimator.tabular_head.linear_final", "1"),
    "scvi": Truth("module.z_encoder.encoder", "module.z_encoder.mean_encoder", "labels"),
    "transformers": Truth("net.bert", "net.classifier", "answer.class", suggested=True),
}


@pytest.fixture(params=TRUTH)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    shipped = SHIPPED[request.param]
    if any(importlib.util.find_spec(each) is None for each in shipped.imports):
        pytest.skip(f"{request.param} is not installed")
    before = torch.get_default_dtype()
    torch.set_default_dtype(shipped.dtype)
    yield request.param
    torch.set_default_dtype(before)


def test_encoder_classifier_and_labels(name: str) -> None:
    shipped, truth = SHIPPED[name], TRUTH[name]
    module, loader = shipped.build()
    taps = [aux.Taps(**shipped.taps)] if shipped.taps else []
    found = aux.inspect(module, loader, [*taps, aux.EMATeacher(decay=0.9)], steps=0, max_epochs=2)
    assert not found.fails
    assert found.binding("encoder").where == truth.encoder
    assert found.binding("classifier").where == truth.classifier
    target = found.binding("target")
    if truth.suggested:
        assert f"It may be Taps(target={truth.labels!r})" in str(target.error)
    else:
        assert [each.path for each in found.batch if "target" in each.roles] == [truth.labels]
