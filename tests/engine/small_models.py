"""Models, data and a probing objective that the tests of the engine and of its members share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import lightning_aux as aux

CLASSES = 3
WIDTH = 4


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """``size`` samples (x, y); the last column of x is the sample's own index."""

    def __init__(self, size: int = 24) -> None:
        generator = torch.Generator().manual_seed(11)
        self.x = torch.randn(size, WIDTH, generator=generator)
        self.x[:, -1] = torch.arange(size)
        self.y = torch.randint(CLASSES, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


def rows(size: int = 24, batch_size: int = 4, **loader: Any) -> DataLoader[Any]:
    """A loader over :class:`Rows`; every argument of DataLoader may be given."""
    return DataLoader(Rows(size), batch_size=batch_size, **loader)


class Layers(nn.Sequential):
    """A class of the user's own: `compile()` of a bare ``nn.Sequential`` compiles nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)  # type: ignore[no-any-return]


class Classifier(L.LightningModule):
    """Two layers; the forward is called by ``training_step`` as ``self(x)``."""

    def __init__(self, dropout: float = 0.0, lr: float = 0.05) -> None:
        super().__init__()
        self.encoder = Layers(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Dropout(dropout))
        self.classifier = nn.Linear(8, CLASSES)
        self.lr = lr

    def forward(self, x: Tensor) -> Any:
        # The index column is in the way of training, not of the tests that read it.
        return self.classifier(self.encoder(x * x.new_tensor([1.0, 1.0, 1.0, 0.01])))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Probe(aux.Objective):
    """Adds nothing to the loss and keeps what ``look(step)`` returned in every step."""

    needs = ("index",)

    def __init__(self, look: Callable[[aux.Step], Any], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.look = look
        self.seen: list[Any] = []

    def loss(self, step: aux.Step) -> Tensor:
        self.seen.append(self.look(step))
        return step.loss * 0.0


class Blind(Probe):
    """A :class:`Probe` for data without indices."""

    needs = ()


class Shrink(aux.Objective):
    """A term with a gradient of its own: the mean square of the logits."""

    def loss(self, step: aux.Step) -> Tensor:
        return step.logits.square().mean()


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest absolute difference between two state dicts of the same keys."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two state dicts are the same to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def leaves(nested: Any) -> Iterator[Tensor]:
    """The tensors of a nested state."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, dict):
        for value in nested.values():
            yield from leaves(value)
    elif isinstance(nested, list | tuple):
        for value in nested:
            yield from leaves(value)
