"""``GradientDirection``: whether mini-batch gradients agree, and with the gradient of all data."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, cast
from zlib import crc32

import numpy
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_aux.attribute_schedules.driver import Driver
from lightning_aux.attribute_schedules.rates import rates_in
from lightning_aux.engine import Attached, AuxiliaryError, Engine, Progress
from lightning_aux.engine.distributed import (
    data_rank,
    processes,
    same_everywhere,
    shards_parameters,
)
from lightning_aux.functional.gradient_directions import variance_of_sum
from lightning_aux.schedule import Interval, ScheduleError, Time

__all__ = ["GradientDirection"]


class GradientDirection(Attached):
    """Logs what dropout does to gradients: their directional variance and error.

    Liu, Xu, Jin, Shen & Darrell 2023, "Dropout Reduces Underfitting", arXiv:2303.01500, section 3:
    early in training, dropout makes the gradients of mini-batches point in more similar directions
    (less variance) and closer to the gradient of the whole data without dropout (less error).

    Logged under ``aux/<name>/``:

    - ``variance``: mean over pairs of mini-batches of ``(1 − cos(gᵢ, gⱼ)) / 2``, with the model as
      it trains now, dropout included;
    - ``error``: mean over mini-batches of ``(1 − cos(gᵢ, ĝ)) / 2``, ĝ the gradient of ``full``
      mini-batches together, without dropout;
    - ``norm``: mean norm of the gᵢ;
    - ``seconds``: what the latest measurement took.

    The gradients are those of the user's own loss with respect to all trainable parameters. The
    mini-batches are drawn once from the training dataset, by random numbers of our own, and are
    the same in every measurement and after a resume. The paper takes the whole data for ĝ; here it
    is a sample unless ``full`` says otherwise.

    A measurement costs ``batches + full`` times the forward and backward of one batch, and the
    memory of two gradients. Several processes share the batches. Training is bit-identical to
    training without; what ``training_step`` changes besides logs, metrics and buffers is not
    undone.

    Args:
        every: from one measurement to the next: optimizer steps, ``"500 steps"``, ``"1ep"``,
            ``"5%"``; the first is before the first step.
        batches: mini-batches whose gradients are compared, at least 2.
        full: mini-batches whose mean gradient stands for that of all data. Default: ``batches``
            times four, or the whole dataset where it is smaller; 0 takes the whole dataset.
        name: unique name for logs.

    Raises:
        AuxiliaryError: fewer batches than 2, an ``every`` that is no time; before training, with
            manual optimisation, a sharded model, or an iterable dataset.
    """

    turn = 1

    def __init__(
        self,
        every: Time = "1ep",
        batches: int = 16,
        full: int | None = None,
        name: str = "gradient_direction",
    ) -> None:
        super().__init__(name)
        if batches < 2 or (full is not None and full < 0):
            raise AuxiliaryError(
                f"{name}: batches={batches}, full={full}: at least two mini-batches are compared."
            )
        try:
            self.interval = Interval(every)
        except ScheduleError as error:
            raise AuxiliaryError(f"{name}: every={every!r}: {error}") from error
        self.batches = batches
        self.full = full
        self.measured: list[tuple[int, dict[str, float]]] = []
        """Optimizer steps taken, and what was measured then."""
        self._due: Callable[[int], bool] | None = None
        self._groups: list[list[int]] = []

    def check(self, engine: Engine) -> None:
        module = type(engine.module).__name__
        if not engine.module.automatic_optimization:
            raise AuxiliaryError(
                f"{self.name}: in manual optimisation {module}.training_step takes optimizer steps "
                f"itself, so its gradients cannot be taken by themselves."
            )
        if shards_parameters(engine.trainer.strategy):
            raise AuxiliaryError(
                f"{self.name}: no process has whole gradients of a sharded model. Use ddp or one "
                f"process to look at them."
            )

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        self._due = engine.bind(self.interval, self.name)
        self.measured = [(int(at), dict(found)) for at, found in (state or {}).get("measured", [])]
        loader = engine.trainer.train_dataloader
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            raise AuxiliaryError(
                f"{self.name}: draws mini-batches from the dataset of one DataLoader, by index, "
                f"and this training has {type(loader).__name__} over "
                f"{type(getattr(loader, 'dataset', loader)).__name__}."
            )
        size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        if size is None:
            raise AuxiliaryError(f"{self.name}: the DataLoader does not say its batch size.")
        device = engine.trainer.strategy.root_device
        seed = same_everywhere(torch.initial_seed() % 2**62, device)
        generator = torch.Generator().manual_seed(seed ^ crc32(self.name.encode()))
        samples = len(cast("Sized", loader.dataset))
        order = torch.randperm(samples, generator=generator).tolist()
        self._groups = [order[at : at + size] for at in range(0, len(order) - size + 1, size)]
        if len(self._groups) < 2:
            raise AuxiliaryError(
                f"{self.name}: the dataset has {samples} samples, fewer than two mini-batches."
            )
        self._seed = seed
        first, whole = self._counts()
        rank_zero_info(
            f"lightning_aux: {self.name} measures every {self.interval.every}, each time with "
            f"{first + whole} forward and backward passes of a mini-batch"
        )

    def _counts(self) -> tuple[int, int]:
        """Mini-batches that are compared, and that stand for all data."""
        available = len(self._groups)
        whole = 4 * self.batches if self.full is None else self.full or available
        return min(self.batches, available), min(whole, available)

    def before_step(self, now: Progress) -> None:
        assert self._due is not None
        if not self._due(now.steps) or (self.measured and self.measured[-1][0] >= now.steps):
            return
        began = time.perf_counter()
        found = self._measure()
        self.measured.append((now.steps, {**found, "seconds": time.perf_counter() - began}))

    def _measure(self) -> dict[str, float]:
        """Both statistics from the sums of unit gradients and of whole ones."""
        parameters = [each for each in self.engine.module.parameters() if each.requires_grad]
        count, whole = self._counts()
        directions = [torch.zeros_like(each, dtype=torch.float32) for each in parameters]
        norms = torch.zeros((), device=directions[0].device)
        for number in self._own(count):
            gradient = self._gradient(number, parameters)
            norm = torch.stack(torch._foreach_norm(gradient)).norm()
            torch._foreach_add_(directions, torch._foreach_div(gradient, norm.clamp_min(1e-30)))
            norms += norm
        total = [torch.zeros_like(each) for each in directions]
        with self._without_dropout():
            for number in self._own(whole):
                torch._foreach_add_(total, self._gradient(number, parameters))
        if processes() > 1:
            for each in (*directions, *total, norms):
                dist.all_reduce(each)
        squared = torch.stack(torch._foreach_norm(directions)).square().sum()
        length = torch.stack(torch._foreach_norm(total)).norm()
        along = torch.stack(
            [each.sum() for each in torch._foreach_mul(directions, total)]
        ).sum() / length.clamp_min(1e-30)
        return {
            "variance": float(variance_of_sum(squared, count)),
            "error": float((1 - along / count) / 2),
            "norm": float(norms / count),
        }

    def _own(self, count: int) -> range:
        """The mini-batches of this process."""
        rank = data_rank(self.engine.trainer.strategy)
        return range(rank, count, processes()) if processes() > 1 else range(count)

    def _gradient(self, number: int, parameters: list[Any]) -> list[Tensor]:
        seed = (self._seed + crc32(f"{self.name} {number}".encode())) % 2**62
        loss = self.engine.passes.loss_of(self._batch(number, seed), seed, self.name)
        scaler = getattr(self.engine.trainer.precision_plugin, "scaler", None)
        if scaler is not None:  # a direction does not know of a factor; float16 does
            loss = loss * scaler.get_scale()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        scale = 1.0 if scaler is None else 1.0 / scaler.get_scale()
        return [
            torch.zeros_like(parameter, dtype=torch.float32)
            if each is None
            else each.float() * scale
            for each, parameter in zip(gradients, parameters, strict=True)
        ]

    def _batch(self, number: int, seed: int) -> Any:
        trainer = self.engine.trainer
        loader = trainer.train_dataloader
        with isolate_rng(
            include_cuda=torch.cuda.is_available()
        ):  # augmentations, the same in every measurement
            torch.manual_seed(seed)
            random.seed(seed)
            numpy.random.seed(seed % 2**32)
            batch = loader.collate_fn([loader.dataset[index] for index in self._groups[number]])
            batch = trainer.precision_plugin.convert_input(batch)
            batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
            return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        """Every rate that is known at 0."""
        driven = [
            each.place
            for member in self.engine.members.values()
            if isinstance(member, Driver) and member.drives_rates
            for each in member.driven
        ]
        places = {each.identity: each for each in (*rates_in(self.engine.module).values(), *driven)}
        before = [(each, each.plain()) for each in places.values()]
        try:
            for place, _ in before:
                place.set(0.0)
            yield
        finally:
            for place, value in before:
                place.set(value)

    def logged(self) -> dict[str, Any]:
        return dict(self.measured[-1][1]) if self.measured else {}

    def state(self) -> dict[str, Any]:
        return {"measured": [[at, dict(found)] for at, found in self.measured]}

    def stop(self) -> None:
        self._due = None
