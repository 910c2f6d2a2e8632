"""Ways of sharding that are not supported: named errors before training, never wrong values.

What is supported, FSDP2, is trained in two processes in ``tests/contract/strategies``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch.strategies
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

import lightning_aux as aux
from lightning_aux.engine.distributed import shard as shard_head
from tests.engine.small_models import Classifier, rows


class Never(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("trained")

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("validated")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.encoder.parameters(), lr=0.1)


def fsdp1(module: nn.Module) -> None:
    """What FSDP1 marks its flat parameters and the originals with; it needs a GPU to run."""
    module.classifier.weight._fsdp_flattened = True


def zero3(module: nn.Module) -> None:
    """What DeepSpeed ZeRO-3 numbers its parameters with; without it their size here is 0 (F26)."""
    module.classifier.weight.ds_id = 3


@pytest.mark.parametrize("shard", [fsdp1, zero3])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (aux.EMATeacher, "ema"),
        (aux.FrozenTeacher, "frozen"),
        (lambda: aux.EMAAnchor(space="weight"), "ema_anchor.teacher"),
    ],
)
def test_f26_parameters_that_are_parts_of_others_are_refused_before_anything_runs(
    make: Callable[[], Any], name: str, shard: Any, plain_trainer: Any
) -> None:
    model = Never()
    shard(model)
    message = rf"{name}: 'classifier\.weight' of Never are sharded by FSDP1 or .*FSDP2"
    with pytest.raises(aux.AuxiliaryError, match=message):
        plain_trainer(callbacks=[make()]).fit(model, rows(), rows())


class DeepSpeedStrategy(SingleDeviceStrategy):
    """The name that Lightning's strategy has; the real one asks for the package and for CUDA."""


@pytest.mark.parametrize(
    "make",
    [aux.EMATeacher, aux.EMAAnchor, lambda: aux.DropoutSchedule(0.1, until=2)],
)
def test_f27_f47_f48_deepspeed_is_a_named_error_before_anything_runs(
    make: Callable[[], Any], plain_trainer: Any
) -> None:
    """It gathers, accumulates and steps by itself: what we add could be lost without a word."""
    trainer = plain_trainer(callbacks=[make()], strategy=DeepSpeedStrategy("cpu"))
    with pytest.raises(aux.AuxiliaryError, match=r"DeepSpeed .* ModelParallelStrategy"):
        trainer.fit(Never(), rows(), rows())


def test_the_strategy_of_that_name_is_the_one_that_lightning_has() -> None:
    """Renamed in Lightning, it would no longer be recognised."""
    assert lightning.pytorch.strategies.DeepSpeedStrategy.__name__ == DeepSpeedStrategy.__name__


def test_a_head_that_fsdp1_would_have_to_flatten_is_a_named_error() -> None:
    class FSDPStrategy:
        root_device = torch.device("cpu")

    with pytest.raises(aux.AuxiliaryError, match=r"head of probe .*FSDPStrategy.*\(FSDP2\)"):
        shard_head(nn.Linear(2, 2), FSDPStrategy(), "probe")
