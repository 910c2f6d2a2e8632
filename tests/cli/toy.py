"""A model and data of a few milliseconds, and callbacks that disturb a run, for `compare`."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_aux import AuxiliaryError, Objective


class ToyData(LightningDataModule):
    def __init__(self, size: int = 32, num_workers: int = 0) -> None:
        super().__init__()
        x = torch.linspace(-1, 1, size).unsqueeze(1)
        self.dataset = TensorDataset(x, 2 * x)
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, batch_size=8, shuffle=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, batch_size=8)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, batch_size=8)


class ToyModel(LightningModule):
    """Logs what it started from (`start`) and a number that the order of the samples decides."""

    def __init__(self, lr: float = 0.1, wait: float = 0.0, sleeps: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1))
        self.sleeps = sleeps
        self.lr = lr
        self.wait = wait
        self.order = 0.0
        self.start = sum(float(p.double().sum()) for p in self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        time.sleep(self.wait)
        weights = torch.arange(1.0, len(x) + 1)
        self.order = 0.5 * self.order + float(x.squeeze(1) @ weights)
        return (self(x) - y).square().mean()

    def on_train_epoch_end(self) -> None:
        self.log("start", self.start)
        self.log("order", self.order)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_error", (self(batch[0]) - batch[1]).square().mean())

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_error", (self(batch[0]) - batch[1]).square().mean())

    def configure_callbacks(self) -> list[Callback]:
        return [Sleeps(self.sleeps)] if self.sleeps else []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Draws(Callback):
    """Draws random numbers wherever dropout or a new head might."""

    def setup(self, trainer, pl_module, stage: str) -> None:
        torch.rand(3)

    def on_fit_start(self, trainer, pl_module) -> None:
        torch.rand(5)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        torch.rand(7)


class Fails(Callback):
    def on_train_start(self, trainer, pl_module) -> None:
        raise RuntimeError("this variant cannot train")


class Termless(Objective):
    """Does not define ``loss``."""


class Wraps(Callback):
    """Raises something else because of an error of ours."""

    def on_train_start(self, trainer, pl_module) -> None:
        try:
            raise AuxiliaryError("the cause, for the user")
        except AuxiliaryError as error:
            raise RuntimeError("wrapped") from error


class Sleeps(Callback):
    def __init__(self, seconds: float = 0.005) -> None:
        self.seconds = seconds

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        time.sleep(self.seconds)


class Dies(Callback):
    """Ends the process in training: by a signal, or with an exit status."""

    def __init__(self, how: int) -> None:
        self.how = how

    def on_train_start(self, trainer, pl_module) -> None:
        print("last words")
        if self.how < 0:
            os.kill(os.getpid(), -self.how)
        os._exit(self.how)


class FailsOnce(Callback):
    """Fails where there is no file, and leaves one."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_start(self, trainer, pl_module) -> None:
        if not self.path.exists():
            self.path.touch()
            raise RuntimeError("for the first time")


class TestsNan(Callback):
    """Spoils the model when training is over."""

    def on_test_start(self, trainer, pl_module) -> None:
        torch.nn.init.constant_(pl_module.net[1].bias, float("nan"))


class Prints(Callback):
    def __init__(self, text: str) -> None:
        self.text = text

    def on_train_start(self, trainer, pl_module) -> None:
        print(self.text)


class Interrupts(Callback):
    def on_train_start(self, trainer, pl_module) -> None:
        raise KeyboardInterrupt


class Allocates(Callback):
    """Holds memory while it trains."""

    def __init__(self, megabytes: int) -> None:
        self.megabytes = megabytes

    def on_train_start(self, trainer, pl_module) -> None:
        torch.ones(self.megabytes, 250_000)


class Says(Callback):
    """Writes what its process is like."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_start(self, trainer, pl_module) -> None:
        found = {"threads": torch.get_num_threads(), "pid": os.getpid()}
        found["start_method"] = multiprocessing.get_start_method()
        names = ("CUDA_VISIBLE_DEVICES", "TOY")
        found |= {name: os.environ.get(name) for name in names}
        with self.path.open("a") as file:
            file.write(json.dumps(found) + "\n")


class Meets(Callback):
    """Waits until so many runs have come here, which they do only if they are there at once."""

    def __init__(self, path: str, others: int) -> None:
        self.path = Path(path)
        self.others = others

    def on_train_start(self, trainer, pl_module) -> None:
        self.path.mkdir(exist_ok=True)
        (self.path / str(os.getpid())).touch()
        deadline = time.monotonic() + 60
        while len(list(self.path.iterdir())) < self.others:
            if time.monotonic() > deadline:
                raise RuntimeError("nobody came")
            time.sleep(0.02)


class WaitsFor(Callback):
    """Begins to train when there is a file."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_start(self, trainer, pl_module) -> None:
        deadline = time.monotonic() + 120
        while not self.path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)


class Marks(Callback):
    """Writes a file when training starts, so that a test knows when to interrupt."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_start(self, trainer, pl_module) -> None:
        self.path.touch()


class Refuses(Callback):
    def __init__(self, value: float = 0.0) -> None:
        raise ValueError(f"value={value} is refused")
