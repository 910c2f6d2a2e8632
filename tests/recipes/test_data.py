"""Recipe data: the stated share of wrong labels, and the same split for the same seed."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from recipes.digits import DigitsData
from recipes.label_noise import flip_labels
from recipes.mnist1d import MNIST1DData


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(params=["mnist1d", "digits"])
def make(request, cache):
    """Makes and sets up a data module, with the same small sizes for both sets."""

    def build(**arguments):
        if request.param == "mnist1d":
            arguments = {"val_size": 100, "test_size": 300, "cache_dir": cache, **arguments}
            data = MNIST1DData(train_size=600, **arguments)
        else:
            data = DigitsData(train_size=600, val_size=200, **arguments)
        data.prepare_data()
        data.setup("fit")
        return data

    return build


def test_the_share_of_wrong_labels_is_the_noise_itself():
    labels = torch.arange(10).repeat(5000)
    noisy = flip_labels(labels, 0.4, num_classes=10, seed=0)
    wrong = (noisy != labels).float().mean().item()
    # 50 000 independent flips: four standard deviations of the share are 0.009
    assert wrong == pytest.approx(0.4, abs=0.009)


def test_a_flipped_label_is_uniform_over_the_other_classes():
    labels = torch.full((90_000,), 3)
    counts = torch.bincount(flip_labels(labels, 1.0, num_classes=10, seed=1), minlength=10)
    assert counts[3] == 0
    others = torch.cat([counts[:3], counts[4:]]).float()
    assert (others - 10_000).abs().max() < 4 * (90_000 * 1 / 9 * 8 / 9) ** 0.5


def test_flips_depend_on_the_seed_alone():
    labels = torch.arange(10).repeat(50)
    first = flip_labels(labels, 0.5, 10, seed=7)
    torch.rand(5)
    assert torch.equal(flip_labels(labels, 0.5, 10, seed=7), first)
    assert not torch.equal(flip_labels(labels, 0.5, 10, seed=8), first)


def test_no_noise_keeps_every_label_and_nonsense_is_refused():
    labels = torch.arange(10)
    assert torch.equal(flip_labels(labels, 0.0, 10, seed=0), labels)
    with pytest.raises(ValueError, match=r"\[0, 1\], not 1.5"):
        flip_labels(labels, 1.5, 10, seed=0)


def test_same_seed_same_split(make):
    first, second = make(), make()
    for part in ("train", "val", "test"):
        for one, other in zip(
            first.datasets[part].tensors, second.datasets[part].tensors, strict=True
        ):
            assert torch.equal(one, other)


def test_other_seed_other_split(make):
    first, second = make(), make(data_seed=1)
    assert not torch.equal(first.datasets["train"].tensors[1], second.datasets["train"].tensors[1])


def test_parts_share_no_sample(make):
    data = make()
    rows = [row.numpy().tobytes() for part in data.datasets.values() for row in part.tensors[0]]
    assert len(rows) == len(set(rows))


def test_noise_touches_training_labels_only(make):
    clean, noisy = make(), make(label_noise=0.4)
    for part in ("train", "val", "test"):
        x, y = clean.datasets[part].tensors
        noisy_x, noisy_y = noisy.datasets[part].tensors
        assert torch.equal(x, noisy_x)
        changed = (y != noisy_y).float().mean().item()
        assert (0.3 < changed < 0.5) if part == "train" else changed == 0


def test_items_are_plain_pairs_of_the_stated_shape(make):
    data = make(batch_size=16)
    loader = data.train_dataloader()
    assert isinstance(loader, DataLoader)
    x, y = next(iter(loader))
    expected = (16, 1, 40) if isinstance(data, MNIST1DData) else (16, 1, 8, 8)
    assert (x.shape, x.dtype, y.shape, y.dtype) == (expected, torch.float32, (16,), torch.int64)


def test_generating_leaves_the_global_generators_alone(tmp_path):
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.rand()
    random.seed(5)
    np.random.seed(5)
    MNIST1DData(train_size=20, val_size=10, test_size=10, cache_dir=str(tmp_path)).prepare_data()
    assert (random.random(), np.random.rand()) == expected


def test_generated_arrays_are_read_from_disk_the_next_time(tmp_path, monkeypatch):
    sizes = {"train_size": 20, "val_size": 10, "test_size": 10, "cache_dir": str(tmp_path)}
    MNIST1DData(**sizes).prepare_data()
    monkeypatch.setattr("recipes.mnist1d.data._generate", lambda *_: pytest.fail("generated twice"))
    data = MNIST1DData(**sizes)
    data.prepare_data()
    data.setup("fit")
    assert len(data.datasets["test"]) == 10
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]


def test_recipes_import_nothing_of_ours():
    import subprocess
    import sys

    code = (
        "import sys, recipes.mnist1d, recipes.digits;"
        "sys.exit(any(name.startswith('lightning_aux') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
