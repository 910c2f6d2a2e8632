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


def marks(images):
    """The class whose pixel is brightest on the edges, which digits leave dark."""
    return torch.cat([images[:, 0, :5, 0], images[:, 0, :5, -1]], dim=1)


def test_marks_tell_the_class_in_training_and_nothing_in_the_test():
    plain, data = DigitsData(data_seed=3), DigitsData(data_seed=3, marked=0.8)
    told = {}
    for each in (plain, data):
        each.setup("fit")
    for part in ("train", "val", "test"):
        x, y = data.datasets[part].tensors
        assert torch.equal(y, plain.datasets[part].tensors[1])
        bright = marks(x) == 1
        assert bright.any(dim=1).all(), "every image has a mark"
        only = bright.sum(dim=1) == 1  # no bright pixel of the digit itself on the edge
        told[part] = (bright.float().argmax(1) == y)[only].float().mean().item()
        changed = x != plain.datasets[part].tensors[0]
        assert changed.sum(dim=(1, 2, 3)).max() == 1
    # four standard deviations of a share of 0.8 of 1000, of 0.8 of 200 and of 0.1 of 597
    assert told["train"] == pytest.approx(0.8, abs=0.05)
    assert told["val"] == pytest.approx(0.8, abs=0.12)
    assert told["test"] == pytest.approx(0.1, abs=0.05)


def test_a_weak_supervisor_labels_what_it_has_not_seen():
    plain, data = DigitsData(), DigitsData(supervisor_size=50)
    for each in (plain, data):
        each.setup("fit")
    x, y = data.datasets["train"].tensors
    true = {
        image.numpy().tobytes(): label
        for image, label in zip(*plain.datasets["train"].tensors, strict=True)
    }
    assert len(x) == len(plain.datasets["train"]) - 50
    agreed = torch.stack([true[image.numpy().tobytes()] for image in x]) == y
    # as good on the training images, which it has not seen either, as in the test
    assert agreed.float().mean().item() == pytest.approx(data.supervisor_accuracy, abs=0.06)
    assert 0.6 < data.supervisor_accuracy < 0.95
    for part in ("val", "test"):
        assert torch.equal(data.datasets[part].tensors[1], plain.datasets[part].tensors[1])
    assert plain.supervisor_accuracy is None


def test_classes_are_left_out_of_training_and_not_of_the_test(cache):
    data = MNIST1DData(train_size=600, val_size=100, test_size=300, cache_dir=cache, classes=[0, 7])
    data.prepare_data()
    data.setup("fit")
    labels = {part: set(each.tensors[1].tolist()) for part, each in data.datasets.items()}
    assert labels == {"train": {0, 7}, "val": {0, 7}, "test": set(range(10))}


@pytest.mark.parametrize("kind", ["mnist1d", "digits"])
def test_the_models_log_what_their_confidence_is_worth(kind, cache):
    import lightning as L

    from recipes.digits import ImageClassifier
    from recipes.mnist1d import ConvClassifier

    if kind == "digits":
        model, data = ImageClassifier(width=4), DigitsData()
    else:
        data = MNIST1DData(train_size=600, val_size=100, test_size=300, cache_dir=cache)
        model = ConvClassifier(width=4)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    (found,) = trainer.test(model, data, verbose=False)
    x, y = data.datasets["test"].tensors
    with torch.no_grad():
        logits = model.eval()(x)
    assert found["test_acc"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
    assert found["test_nll"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, y).item(), rel=1e-5
    )
    others = {"test_ece", "test_aurc", "test_aurc_normalized", "test_pass16", "test_within"}
    assert set(found) == {"test_acc", "test_nll", *others}
    assert not any(key.startswith("test_") for key in model.state_dict())
