"""``GradientDirection``: whether mini-batch gradients agree, and with the gradient of all data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, cast
from zlib import crc32

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_aux.attribute_schedules.driver import Driver
from lightning_aux.attribute_schedules.rates import rates_in
from lightning_aux.engine import Attached, AuxiliaryError, Engine, Progress
from lightning_aux.engine.distributed import (
    anywhere,
    data_rank,
    processes,
    shards_parameters,
)
from lightning_aux.engine.random_states import drawing_from
from lightning_aux.functional.gradient_directions import variance_of_sum
from lightning_aux.schedule import Interval, ScheduleError, Time

__all__ = ["GradientDirection"]

Value = TypeVar("Value")


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

    The gradients are those of the user's own loss with respect to all trainable parameters, at the
    weights themselves also where a step has others (`QuantizedWeights`, a variational
    `ParameterAnchor`). The
    mini-batches are drawn once from the training dataset, by random numbers of our own, and are
    the same in every measurement and after a resume. The paper takes the whole data for ĝ; here it
    is a sample unless ``full`` says otherwise.

    A measurement costs ``batches + full`` times the forward and backward of one batch, and the
    memory of two gradients. Several processes share the batches, each as many as the others; an
    error on one of them is one on all. Under a gradient scaler the loss is scaled down until its
    gradient fits into float16; a mini-batch whose gradient is not finite even so is left out, with
    a warning. Training is bit-identical to training without; what ``training_step`` changes besides
    logs, metrics, buffers and the random streams is not undone.

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
        self._looked = -1
        self._scale = 1.0
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
        self._looked = self.measured[-1][0] if self.measured else -1
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
        seed = engine.seed % 2**62
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
        if not self._due(now.steps) or self._looked >= now.steps:
            return
        self._looked = now.steps
        began = time.perf_counter()
        found = self._measure()
        if found:
            self.measured.append((now.steps, {**found, "seconds": time.perf_counter() - began}))

    def _measure(self) -> dict[str, float]:
        """Both statistics from the sums of unit gradients and of whole ones; or nothing."""
        parameters = [each for each in self.engine.module.parameters() if each.requires_grad]
        scaler = getattr(self.engine.trainer.precision_plugin, "scaler", None)
        # A direction does not know of a factor; float16 does.
        self._scale = 1.0 if scaler is None else float(scaler.get_scale())
        directions = [torch.zeros_like(each, dtype=torch.float32) for each in parameters]
        total = [torch.zeros_like(each) for each in directions]
        # The sum of norms, and how many gradients there are of each kind.
        sums = torch.zeros(3, device=directions[0].device)
        count, whole = self._counts()
        for gradient, norm in self._gradients(count, parameters):
            torch._foreach_add_(directions, torch._foreach_div(gradient, norm.clamp_min(1e-30)))
            sums[0] += norm
            sums[1] += 1
        with self._without_dropout():
            for gradient, _ in self._gradients(whole, parameters):
                torch._foreach_add_(total, gradient)
                sums[2] += 1
        if processes() > 1:
            for each in (*directions, *total, sums):
                dist.all_reduce(each)
        norms, compared, averaged = sums.tolist()
        if left_out := int(count - compared + whole - averaged):
            rank_zero_warn(
                f"lightning_aux: {self.name} has left out {left_out} of {count + whole} "
                f"mini-batches after {self._looked} optimizer steps: their gradients are not finite"
            )
        if compared < 2 or averaged < 1:
            return {}
        squared = torch.stack(torch._foreach_norm(directions)).square().sum()
        length = torch.stack(torch._foreach_norm(total)).norm()
        along = torch.stack(
            [each.sum() for each in torch._foreach_mul(directions, total)]
        ).sum() / length.clamp_min(1e-30)
        return {
            "variance": float(variance_of_sum(squared, int(compared))),
            "error": float((1 - along / compared) / 2),
            "norm": norms / compared,
        }

    def _gradients(
        self, count: int, parameters: list[Any]
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        """The finite gradients of this process's mini-batches, each with its norm.

        Every process computes as many, since its model may communicate with theirs: some compute
        one that counts elsewhere.
        """
        rank = data_rank(self.engine.trainer.strategy)
        for first in range(0, count, processes()):
            number = first + rank
            gradient, norm = self._gradient(number % count, parameters)
            if number < count and bool(norm.isfinite()):
                yield gradient, norm

    def _gradient(self, number: int, parameters: list[Any]) -> tuple[list[Tensor], Tensor]:
        """With a loss scaled down, on all processes, until it fits into the precision."""
        seed = (self._seed + crc32(f"{self.name} {number}".encode())) % 2**62
        device = self.engine.trainer.strategy.root_device
        while True:
            batch = self._together(partial(self._batch, number, seed))
            gradient = self._together(partial(self._of, batch, seed, parameters))
            norm = torch.stack(torch._foreach_norm(gradient)).norm()
            if self._scale <= 1.0 or not anywhere(not bool(norm.isfinite()), device):
                return gradient, norm
            self._scale = max(1.0, self._scale / 16)

    def _of(self, batch: Any, seed: int, parameters: list[Any]) -> list[Tensor]:
        loss = self.engine.passes.loss_of(batch, seed, self.name) * self._scale
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [
            torch.zeros_like(parameter, dtype=torch.float32)
            if each is None
            else each.float() / self._scale
            for each, parameter in zip(gradients, parameters, strict=True)
        ]

    def _together(self, work: Callable[[], Value]) -> Value:
        """What ``work`` returns, or an error on every process if it raised one on some."""
        failure: Exception | None = None
        try:
            done = work()
        except Exception as error:
            failure = error
        if anywhere(failure is not None, self.engine.trainer.strategy.root_device):
            raise failure or AuxiliaryError(
                f"{self.name}: a mini-batch could not be measured on another process; the error is "
                f"in the output of that process."
            )
        return done

    def _batch(self, number: int, seed: int) -> Any:
        trainer = self.engine.trainer
        loader = trainer.train_dataloader
        # Augmentations: the same in every measurement.
        with drawing_from(seed, trainer.strategy.root_device):
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
