"""The horizon: as many steps as Lightning says, or as were really made where it will not say."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, IterableDataset

from lightning_aux.engine.clock import horizon_of
from tests.engine.small_models import Blind, Classifier, Rows, rows


class Asking(Classifier):
    """Keeps Lightning's own estimate, asked for where users ask for it."""

    estimate: float = -1

    def on_train_start(self) -> None:
        self.estimate = self.trainer.estimated_stepping_batches


COMBINATIONS = [
    {
        "accumulate_grad_batches": accumulate,
        "max_steps": steps,
        "max_epochs": epochs,
        "limit_train_batches": limit,
    }
    for accumulate, steps, epochs, limit in product(
        (1, 3, 4, 10), (-1, 5, 60), (None, 1, 3), (1.0, 5, 0.5)
    )
    if not (steps == -1 and epochs is None)  # then Lightning trains for 1,000 epochs
]


@pytest.mark.parametrize(
    "arguments", COMBINATIONS, ids=lambda each: "-".join(map(str, each.values()))
)
def test_the_total_is_lightnings_estimate_and_what_really_happens(arguments, plain_trainer):
    model, probe = Asking(), Blind(lambda step: step.progress.fraction)
    trainer = plain_trainer(callbacks=[probe], **arguments)
    if arguments["max_epochs"] is None:
        trainer.fit_loop.max_epochs = -1
    trainer.fit(model, rows(26, 4))  # seven batches
    horizon = horizon_of(trainer, automatic=True)
    assert horizon.total == model.estimate == trainer.global_step
    assert probe.seen[0] == 0.0
    assert probe.seen[-1] < 1.0


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("scheduling", [{2: 3}, {0: 2, 1: 4}, {0: 7, 3: 2, 5: 1}, {0: 100}])
def test_with_changing_accumulation_it_is_the_number_of_steps_really_made(
    scheduling, epochs, plain_trainer
):
    per_epoch: list[int] = []

    class Counting(Classifier):
        def on_train_epoch_end(self) -> None:
            per_epoch.append(self.trainer.global_step - sum(per_epoch))

    probe = Blind(lambda step: step.progress.steps)
    trainer = plain_trainer(
        max_epochs=epochs, callbacks=[GradientAccumulationScheduler(scheduling), probe]
    )
    trainer.fit(Counting(), rows(26, 4))
    horizon = probe.engine.horizon
    assert horizon.total == trainer.global_step == sum(per_epoch)
    for epoch, begun in enumerate(torch.tensor([0, *per_epoch]).cumsum(0)[:-1].tolist()):
        assert horizon.steps(f"{epoch}ep") == begun
        assert probe.seen[7 * epoch] == begun


@pytest.mark.parametrize("limit", [4, 17])
def test_changing_accumulation_stops_at_max_steps_too(limit, plain_trainer):
    probe = Blind(lambda step: step.progress.steps)
    accumulating = GradientAccumulationScheduler({0: 1, 2: 3})
    trainer = plain_trainer(max_epochs=4, max_steps=limit, callbacks=[accumulating, probe])
    trainer.fit(Classifier(), rows(26, 4))
    assert probe.engine.horizon.total == trainer.global_step == limit


def test_manual_optimisation_counts_one_step_per_batch_as_lightning_does(plain_trainer):
    class Manual(Asking):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()

    model, probe = Manual(), Blind(lambda step: step.progress.steps)
    trainer = plain_trainer(max_epochs=2, callbacks=[probe])
    trainer.fit(model, rows(26, 4))
    assert probe.engine.horizon.total == model.estimate == trainer.global_step == 14


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from (Rows(26)[each] for each in range(26))


def test_a_stream_has_a_total_only_by_steps_and_no_epochs(plain_trainer):
    probe = Blind(lambda step: step.progress.fraction, name="probe")
    plain_trainer(max_epochs=1, callbacks=[probe]).fit(
        Classifier(), DataLoader(Stream(), batch_size=4)
    )
    assert probe.engine.horizon.total is None
    assert probe.seen == [None] * 7
    plain_trainer(max_steps=4, max_epochs=-1, callbacks=[probe]).fit(
        Classifier(), DataLoader(Stream(), batch_size=4)
    )
    assert probe.engine.horizon.total == 4
    assert probe.seen[7:] == [0.0, 0.25, 0.5, 0.75]
    with pytest.raises(ValueError, match="number of optimizer steps in an epoch"):
        probe.engine.horizon.steps("1ep")
