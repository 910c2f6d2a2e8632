"""``WiSEFT``: coefficients whose score is no number, and norms that were frozen."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import lightning_aux as aux
from tests.averages.test_candidates import Scored, state_of
from tests.averages.test_model_soup import Frozen
from tests.engine.small_models import CLASSES, rows, weights


class Shaky(Scored):
    """Its loss is NaN near the weights it began with."""

    everywhere = False

    def on_fit_start(self) -> None:
        self.began = self.classifier.weight.detach().clone()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        near = self.everywhere or torch.equal(self.classifier.weight, self.began)
        self.log("val_loss", loss * torch.nan if near else loss)


@pytest.mark.parametrize("order", [[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_coefficient_whose_score_is_nan_is_never_the_best(plain_trainer, mode, order):
    mix = aux.WiSEFT("val_loss", mode, coefficients=order)
    plain_trainer(max_epochs=2, callbacks=[mix]).fit(Shaky(), rows(), rows(16))
    assert math.isnan(mix.curve[0.0])
    choose = max if mode == "max" else min
    assert mix.coefficient == choose((0.5, 1.0), key=mix.curve.__getitem__)


def test_scores_that_are_all_nan_are_refused_and_the_live_weights_stay(plain_trainer, tmp_path):
    module, last = Shaky(), []
    module.everywhere = True
    module.on_train_epoch_end = lambda: last.append(weights(module))
    mix = aux.WiSEFT("val_loss", coefficients=[0.0, 1.0])
    with pytest.raises(aux.AuxiliaryError, match=r"wise_ft: the score of every .*\(0, 1\) is NaN"):
        plain_trainer(max_epochs=2, callbacks=[mix]).fit(module, rows(), rows(16))
    assert not list(tmp_path.glob("wise_ft*"))
    for name, value in weights(module).items():
        assert torch.equal(value, last[-1][name])


def test_a_frozen_norm_keeps_its_statistics(plain_trainer):
    mix, module = aux.WiSEFT("val_loss", "min", coefficients=[0.5]), Frozen(norm=True)
    module.norm.running_mean.fill_(0.25)
    plain_trainer(max_epochs=2, callbacks=[mix]).fit(module, rows(), rows(16))
    assert torch.equal(state_of(mix.path)["norm.running_mean"], torch.full((CLASSES,), 0.25))


def test_the_statistics_of_the_best_are_measured(plain_trainer):
    mix, module = aux.WiSEFT("val_loss", "min", coefficients=[0.5]), Scored(norm=True)
    plain_trainer(max_epochs=2, callbacks=[mix]).fit(module, rows(), rows(16))
    state = state_of(mix.path)
    module.load_state_dict(state)
    inputs = []
    module.norm.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    module(torch.cat([x for x, _ in rows()]))
    expected = inputs[0].detach().double().mean(0)
    assert torch.allclose(state["norm.running_mean"].double(), expected, atol=1e-6)
