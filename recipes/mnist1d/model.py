"""A small one-dimensional convolutional classifier as a plain LightningModule."""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from recipes.confidence import WithinClassVariation, confidence_measures

Batch = tuple[Tensor, Tensor]


class ConvClassifier(LightningModule):
    """Three strided convolutions, dropout and a linear layer, trained with AdamW.

    Logs `train_loss`, `train_acc`, `val_loss` and `val_acc` once per epoch, and in `test` the
    measures of `recipes.confidence`: `test_acc`, `test_nll`, `test_ece` and so on.

    Args:
        width: Channels of every convolution.
        dropout: Probability that a feature is zeroed before the linear layer.
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        num_classes: Number of classes.
    """

    def __init__(
        self,
        width: int = 64,
        dropout: float = 0.0,
        lr: float = 2e-3,
        weight_decay: float = 1e-2,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.weight_decay = weight_decay
        self.encoder = nn.Sequential(
            nn.Conv1d(1, width, kernel_size=5, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(5 * width, num_classes)
        self.train_acc = MulticlassAccuracy(num_classes, average="micro")
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_measures = confidence_measures(num_classes)
        self.test_within = WithinClassVariation()

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(batch, classes)` of signals `(batch, 1, 40)`."""
        return self.head(self.dropout(self.encoder(x)))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = cross_entropy(logits, y)
        self.train_acc(logits, y)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.val_acc(logits, y)
        self.log("val_loss", cross_entropy(logits, y))
        self.log("val_acc", self.val_acc, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        features = self.encoder(x)
        self.test_measures.update(self.head(self.dropout(features)), y)
        self.test_within.update(features, y)
        self.log_dict(self.test_measures)
        self.log("test_within", self.test_within)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self(batch[0]).softmax(dim=-1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
