"""The digits of scikit-learn (1797 images of 8 x 8 pixels) as a LightningDataModule.

They come with scikit-learn; training labels can be made noisy or be those of a weak supervisor, and
images can carry a mark that tells their class in training and lies in the test.
"""

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from recipes.label_noise import flip_labels

NUM_CLASSES = 10


class DigitsData(LightningDataModule):
    """Ten classes of handwritten digits, split with equal class shares.

    Items are `(x, y)`: `x` float32 `(1, 8, 8)` in [0, 1]; `y` int64.

    Args:
        batch_size: Samples per batch.
        label_noise: Probability that a training label is replaced by one of the nine other
            classes, uniformly. Validation and test labels stay clean.
        data_seed: Seed of the split and of the label noise.
        train_size: Number of training samples.
        val_size: Number of validation samples; the rest of the 1797 are for the test.
        num_workers: Processes that load batches; 0 loads in the main process.
        marked: Probability that the mark on a training or validation image, one bright pixel on an
            edge, is that of its class; the others have that of another class. In the test it is
            that of any class. 0 for no marks at all.
        supervisor_size: When above 0, a logistic regression is fitted to so many training samples
            and labels the others, which alone are trained on.

    Attributes:
        supervisor_accuracy: Of that logistic regression, on the test images; None without one.
    """

    def __init__(
        self,
        batch_size: int = 64,
        label_noise: float = 0.0,
        data_seed: int = 42,
        train_size: int = 1000,
        val_size: int = 200,
        num_workers: int = 0,
        marked: float = 0.0,
        supervisor_size: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size
        self.label_noise = label_noise
        self.data_seed = data_seed
        self.train_size = train_size
        self.val_size = val_size
        self.num_workers = num_workers
        self.marked = marked
        self.supervisor_size = supervisor_size
        self.supervisor_accuracy: float | None = None
        self.datasets: dict[str, TensorDataset] = {}

    def setup(self, stage: str) -> None:
        """Split the images, draw the marks, and spoil training labels as asked."""
        if self.datasets:
            return
        images, labels = load_digits(return_X_y=True)
        x = torch.from_numpy(images.astype(np.float32)).view(-1, 1, 8, 8) / 16
        y = torch.from_numpy(labels.astype(np.int64))
        train, rest = self._split(np.arange(len(y)), self.train_size, labels)
        val, test = self._split(rest, self.val_size, labels)
        if self.marked:
            for part, wrong in ((train, 1 - self.marked), (val, 1 - self.marked), (test, 0.9)):
                mark(x, part, flip_labels(y[part], wrong, NUM_CLASSES, self.data_seed + 1))
        if self.supervisor_size:
            supervised, train = self._split(train, self.supervisor_size, labels)
            supervisor = LogisticRegression(max_iter=1000)
            supervisor.fit(x[supervised].flatten(1).numpy(), labels[supervised])
            self.supervisor_accuracy = float(
                supervisor.score(x[test].flatten(1).numpy(), labels[test])
            )
            y[train] = torch.from_numpy(supervisor.predict(x[train].flatten(1).numpy()))
        noisy = flip_labels(y[train], self.label_noise, NUM_CLASSES, self.data_seed)
        self.datasets = {
            "train": TensorDataset(x[train], noisy),
            "val": TensorDataset(x[val], y[val]),
            "test": TensorDataset(x[test], y[test]),
        }

    def _split(
        self, indices: np.ndarray, size: int, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        first, second = train_test_split(
            indices, train_size=size, stratify=labels[indices], random_state=self.data_seed
        )
        return first, second

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        return self._loader("test")

    def _loader(self, name: str, shuffle: bool = False) -> DataLoader:
        return DataLoader(
            self.datasets[name],
            batch_size=self.batch_size if shuffle else 500,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


def mark(images: Tensor, which: np.ndarray, classes: Tensor) -> None:
    """Set the pixel that stands for a class, in place: five on the left edge, five on the right."""
    columns = torch.where(classes < 5, 0, images.shape[-1] - 1)
    images[torch.from_numpy(which), 0, classes % 5, columns] = 1.0
