"""``recompute_batch_norm``: the moments of the whole data in float64, whatever the batches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_aux.weights import recompute_batch_norm


@pytest.fixture
def data() -> torch.Tensor:
    return torch.randn(103, 5) * torch.tensor([1.0, 10.0, 0.1, 3.0, 1.0]) + torch.arange(5) * 100


@pytest.mark.parametrize("sizes", [(103,), (50, 53), (100, 3), (40, 40, 23)])
def test_f73_one_layer_has_the_moments_of_the_data(data, sizes):
    norm = nn.BatchNorm1d(5)
    assert recompute_batch_norm(norm, data.split(sizes)) == 1
    assert torch.allclose(norm.running_mean.double(), data.double().mean(0), rtol=1e-6)
    assert torch.allclose(norm.running_var.double(), data.double().var(0), rtol=1e-6)


def test_images_count_every_pixel(data):
    images = torch.randn(7, 3, 4, 4) * 2 + 1
    norm = nn.BatchNorm2d(3)
    recompute_batch_norm(norm, [(images[:4], "label"), (images[4:], "label")])
    pixels = images.double().transpose(0, 1).flatten(1)
    assert torch.allclose(norm.running_mean.double(), pixels.mean(1), rtol=1e-6)
    assert torch.allclose(norm.running_var.double(), pixels.var(1), rtol=1e-6)


def test_a_second_layer_sees_what_the_first_normalises_by_the_batch(data):
    module = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    recompute_batch_norm(module, data.split(25))
    inputs = []
    for batch in data.double().split(25):
        normal = (batch - batch.mean(0)) / (batch.var(0, unbiased=False) + 1e-5).sqrt()
        inputs.append(normal @ module[1].weight.double().T + module[1].bias.double())
    expected = torch.cat(inputs)
    assert torch.allclose(module[3].running_mean.double(), expected.mean(0), atol=1e-4)
    assert torch.allclose(module[3].running_var.double(), expected.var(0), rtol=1e-4)


def test_f73_nothing_else_changes(data):
    module = nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5), nn.BatchNorm1d(5, momentum=None))
    module[0].eval()
    module(data)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    recompute_batch_norm(module, data.split(50))
    assert torch.equal(torch.get_rng_state(), random)
    assert [each.training for each in module] == [False, True, True]
    assert [module[0].momentum, module[2].momentum] == [0.1, None]
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name]) == ("running" not in name)
    assert not module[0]._forward_pre_hooks


def test_no_batches_change_nothing_and_are_refused():
    norm = nn.BatchNorm1d(5)
    with pytest.raises(ValueError, match="no batches"):
        recompute_batch_norm(norm, [])
    assert torch.equal(norm.running_var, torch.ones(5))
    assert norm.momentum == 0.1
    assert recompute_batch_norm(nn.Linear(2, 2), []) == 0


def test_only_the_named_layers_are_measured_and_others_normalise_as_in_evaluation(data):
    frozen = nn.BatchNorm1d(5)
    frozen.running_mean.fill_(100.0)
    frozen.running_var.fill_(4.0)
    module = nn.Sequential(frozen, nn.BatchNorm1d(5))
    assert recompute_batch_norm(module, data.split(50), norms=[module[1]]) == 1
    assert torch.equal(frozen.running_mean, torch.full((5,), 100.0))
    assert torch.equal(frozen.running_var, torch.full((5,), 4.0))
    seen = (data.double() - 100) / (4 + 1e-5) ** 0.5
    assert torch.allclose(module[1].running_mean.double(), seen.mean(0), rtol=1e-5, atol=1e-5)
    assert torch.allclose(module[1].running_var.double(), seen.var(0), rtol=1e-5)
    assert recompute_batch_norm(module, data.split(50), norms=[]) == 0


def test_layers_that_were_compiled_before_are_measured(data):
    module = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
    compiled = torch.compile(module, backend="eager")
    compiled(data)
    module[1].reset_running_stats()
    assert recompute_batch_norm(compiled, data.split(50)) == 1
    inputs = module[0](data).detach().double()
    assert torch.allclose(module[1].running_mean.double(), inputs.mean(0), rtol=1e-4, atol=1e-4)


def test_an_error_leaves_the_statistics_and_is_passed_on(data):
    module = nn.BatchNorm1d(5)

    def fails(batch: torch.Tensor) -> None:
        module(batch)
        raise KeyError("x")

    with pytest.raises(KeyError, match="x"):
        recompute_batch_norm(module, data.split(50), fails)
    assert torch.equal(module.running_var, torch.ones(5))
    assert (module.momentum, module.training) == (0.1, True)
