"""`ProgressiveSelfDistillation`: the targets of three epochs by hand, and what is remembered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_aux as aux
from tests.contract.models import CLASSES, Classifier, Samples
from tests.contract.training import fit, largest_difference, seeded, weights

EPOCHS, SIZE = 3, 24


class ByHand(Classifier):
    """Kim et al. 2021: cross entropy with (1 - a) y + a p, a = 0.8 t/T, p of the epoch before."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None
        self.targets: list[Tensor] = []

    def total_loss(self, batch: Any) -> Tensor:
        x, y, index = batch
        z, onehot = self(x), F.one_hot(y, CLASSES).float()
        if self.table is None:
            self.table = F.one_hot(Samples(SIZE).y, CLASSES).float()
        alpha = 0.8 * (self.current_epoch + 1) / EPOCHS
        target = (1 - alpha) * onehot + alpha * self.table[index]
        self.targets.append(target)
        self.next = (index, z.detach().softmax(1))
        return -(target * z.log_softmax(1)).sum(1).mean()

    def on_train_batch_end(self, *_: Any) -> None:
        index, p = self.next
        self.table[index] = p


def data(indexed: bool) -> DataLoader[Any]:
    random = torch.Generator().manual_seed(4)
    return DataLoader(Samples(SIZE, indexed), batch_size=8, shuffle=True, generator=random)


def test_three_epochs_are_those_of_the_paper_by_hand() -> None:
    hand = seeded(ByHand)
    fit(hand, data=data(True), max_epochs=EPOCHS)
    ours = seeded(Classifier)
    fit(ours, [aux.ProgressiveSelfDistillation()], data(False), max_epochs=EPOCHS)
    assert largest_difference(weights(ours), weights(hand)) < 1e-6
    first, last = hand.targets[0], hand.targets[-1]
    assert first.max() == 1.0  # the labels alone
    assert last.max() < 0.99
    plain = seeded(Classifier)
    fit(plain, data=data(False), max_epochs=EPOCHS)
    assert largest_difference(weights(plain), weights(hand)) > 1e-3


def test_with_all_classes_kept_the_smaller_storage_trains_nearly_the_same() -> None:
    ended = []
    for storage in ("float32", "float16", CLASSES):
        module = seeded(Classifier)
        term = aux.ProgressiveSelfDistillation(storage=storage)
        fit(module, [term], data(False), max_epochs=EPOCHS)
        ended.append(weights(module))
    assert largest_difference(ended[0], ended[1]) < 1e-3
    assert largest_difference(ended[0], ended[2]) < 1e-3
