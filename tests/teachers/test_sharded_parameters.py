"""Sharded parameters: a named error before training, not a teacher that equals the student."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import lightning_aux as aux
from tests.engine.small_models import Classifier, rows


class Never(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("trained")

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("validated")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.encoder.parameters(), lr=0.1)


@pytest.fixture
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fsdp2(module: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (1,))
    whole = module.classifier.weight
    module.classifier.weight = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))


def fsdp1(module: nn.Module) -> None:
    """What FSDP1 marks its flat parameters and the originals with; it needs a GPU to run."""
    module.classifier.weight._fsdp_flattened = True


def zero3(module: nn.Module) -> None:
    """What DeepSpeed ZeRO-3 numbers its parameters with."""
    module.classifier.weight.ds_id = 3


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("shard", [fsdp2, fsdp1, zero3])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (aux.EMATeacher, "ema"),
        (aux.FrozenTeacher, "frozen"),
        (lambda: aux.EMAAnchor(space="weight"), "ema_anchor.teacher"),
    ],
)
def test_sharded_parameters_are_refused_before_anything_runs(
    make: Callable[[], Any], name: str, shard: Any, plain_trainer: Any
) -> None:
    model = Never()
    shard(model)
    message = rf"{name}: 'classifier\.weight' of Never are sharded, .* keeps whole parameters"
    with pytest.raises(aux.AuxiliaryError, match=message):
        plain_trainer(callbacks=[make()]).fit(model, rows(), rows())
