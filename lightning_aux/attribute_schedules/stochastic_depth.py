"""``StochasticDepthSchedule``: residual blocks that are left out at random, by a schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal
from zlib import crc32

import torch
from torch import Tensor, nn

from lightning_aux.attribute_schedules.driver import Driven, Driver
from lightning_aux.attribute_schedules.dropout import (
    Mode,
    Profile,
    check_rates,
    rate_schedule,
)
from lightning_aux.attribute_schedules.places import AttributePlace
from lightning_aux.engine import AuxiliaryError, Engine, Progress
from lightning_aux.engine.distributed import data_rank
from lightning_aux.engine.patches import Patches
from lightning_aux.engine.taps import modules_at, plain_path
from lightning_aux.schedule import Schedule

__all__ = ["StochasticDepthSchedule"]


class StochasticDepthSchedule(Driver):
    """Leaves residual blocks out at random, for models that have no stochastic depth of their own.

    Huang, Sun, Liu, Sedra & Weinberger 2016, "Deep Networks with Stochastic Depth",
    arXiv:1603.09382: of a block ``x ↦ x + f(x)`` the branch ``f(x)`` is dropped with a rate that
    rises linearly with depth. Here, as in timm and in "Dropout Reduces Underfitting"
    (arXiv:2303.01500), each sample decides for itself and what is kept is divided by ``1 − rate``,
    so that nothing has to be scaled at test time: ``x + (block(x) − x)·m / (1 − rate)``, ``m`` of
    0 or 1. A block that is computed is never skipped: this regularises, it does not save time.

    Masks come from random numbers of our own, the same for a recomputed forward (activation
    checkpointing) and after a resume; a block that runs twice in one training step has one mask.
    In evaluation, and while the rate is 0, the blocks are the user's. Works in a compiled model
    without recompiling.

    Args:
        p: the rate of the last block while it is on, in [0, 1), or all of it as a schedule.
        blocks: module path or glob of the residual blocks, or a list of them. A block maps its
            first argument to a tensor of the same shape, or to a tuple that begins with one.
        mode: as for `DropoutSchedule`.
        until: likewise.
        start: likewise.
        shape: likewise.
        profile: ``"linear"``: 0 in the first block to ``p`` in the last; ``"constant"``.
        per: ``"sample"``, or ``"batch"``: a block is left out for the whole batch of a process.
        name: unique name for logs and checkpoints.
        optimizer: with several optimizers, the index of the one whose steps are counted.

    Raises:
        AuxiliaryError: as for `DropoutSchedule`, and for a path that names no module; in the first
            step, whatever the rate, for a block that changes the shape of its input or returns it.
    """

    drives_rates = True

    def __init__(
        self,
        p: float | str | Schedule,
        blocks: str | list[str],
        mode: Mode = "standard",
        until: str | int | None = None,
        start: str | int | None = None,
        shape: Literal["constant", "linear", "cosine"] = "constant",
        profile: Profile = "linear",
        per: Literal["sample", "batch"] = "sample",
        name: str = "stochastic_depth_schedule",
        optimizer: int = 0,
    ) -> None:
        super().__init__(name, optimizer)
        self.blocks = [blocks] if isinstance(blocks, str) else list(blocks)
        self.schedule = rate_schedule(name, p, mode, until, start, shape)
        for key, value, known in (
            ("profile", profile, ("constant", "linear")),
            ("per", per, ("sample", "batch")),
        ):
            if value not in known:
                raise AuxiliaryError(
                    f"{name}: {key}={value!r} is neither {known[0]!r} nor {known[1]!r}."
                )
        self.profile = profile
        self.per = per
        self._patches = Patches()
        self._batch = torch.zeros((), dtype=torch.int64)  # on the CPU, as all that ops read here

    def find(self, engine: Engine) -> list[Driven]:
        found: dict[str, nn.Module] = {}
        for glob in self.blocks:
            found |= modules_at(engine.module, glob, self.name)
        order = [plain_path(path) for path, _ in engine.module.named_modules()]
        paths = sorted(found, key=order.index)
        # A glob crosses dots: of nested matches the outer one is the block.
        outer = [path for path in paths if not any(path.startswith(f"{one}.") for one in paths)]
        linear = self.profile == "linear" and len(outer) > 1
        driven = []
        for depth, path in enumerate(outer):  # each block is a layer, wherever it is nested
            block = _Block(self.name, path, found[path], self._batch, self.per)
            factor = depth / (len(outer) - 1) if linear else 1.0
            kind = type(found[path]).__name__
            driven.append(Driven(_BlockRate(path, block, "rate"), self.schedule, factor, kind))
        return driven

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        super().start(engine, state)
        _RUN["seed"] = torch.initial_seed()
        check_rates(self.name, self.schedule, engine.bind(self.schedule, self.name), engine)
        for each in self.driven:
            block = each.place.owner
            forward = block.module.forward
            self._patches.wrap(block.module, "forward", block.around(forward))

    def before_step(self, now: Progress) -> None:
        super().before_step(now)
        trainer = self.engine.trainer
        batch, rank = trainer.fit_loop.epoch_loop.total_batch_idx, data_rank(trainer.strategy)
        self._batch.fill_(crc32(repr((batch, rank, self.engine.seed)).encode()))

    def logged(self) -> dict[str, Any]:
        return {} if not self._now or self._now[0] is None else {"p": self._now[0]}

    def stop(self) -> None:
        self._patches.undo()
        super().stop()

    def state(self) -> dict[str, Any]:
        return {}  # the rates are ours, and no number of the user's


class _BlockRate(AttributePlace):
    """The rate of a block, which the block itself does not hold."""

    @property
    def identity(self) -> tuple[int, str, int | None]:
        return id(self.owner.module), "left out", None


class _Block:
    """One residual block, its rate, and what distinguishes its random numbers."""

    def __init__(self, name: str, path: str, module: nn.Module, batch: Tensor, per: str) -> None:
        self.name = name
        self.path = path
        self.module = module
        self._per_sample = per == "sample"
        self._batch = batch
        self._salt = torch.tensor(crc32(f"{name}/{path}".encode()))
        self._rate = 0.0
        self._held = torch.zeros((), dtype=torch.float64)

    @property
    def rate(self) -> float:
        return self._rate

    @rate.setter
    def rate(self, value: float) -> None:
        self._rate = value
        self._held.fill_(value)

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def maybe_left_out(*arguments: Any, **keywords: Any) -> Any:
            returned = forward(*arguments, **keywords)
            if not self.module.training:
                return returned
            given = arguments[0] if arguments else next(iter(keywords.values()))
            sequence = isinstance(returned, tuple | list)
            output = returned[0] if sequence else returned
            self._check(given, output)  # whatever the rate: an error now, not in a late phase
            compiling = torch.compiler.is_compiling()
            # A number that is read while compiling would be a constant of the graph.
            if not compiling and self._rate == 0.0:
                return returned
            draw = torch.ops.lightning_aux.kept if compiling else kept
            mask = draw(output.detach(), self._held, self._batch, self._salt, self._per_sample)
            mixed = given + (output - given) * mask
            return type(returned)([mixed, *returned[1:]]) if sequence else mixed

        return maybe_left_out

    def _check(self, given: Any, output: Any) -> None:
        alike = isinstance(given, Tensor) and isinstance(output, Tensor)
        if alike and given.shape == output.shape and output is not given:
            return
        what = (
            "returns its input itself"
            if alike and output is given
            else f"makes {tuple(output.shape)} of {tuple(given.shape)}"
            if alike
            else "does not map a tensor to a tensor"
        )
        raise AuxiliaryError(
            f"{self.name}: the block {self.path!r} {what}, so there is nothing to pass on where it "
            f"is left out. Name only blocks that keep the shape, for example "
            f"blocks=['layer1.*', 'layer2.1']."
        )


_RUN = {"seed": 0}
"""Torch's seed when training began; the passes that we add to a step have others."""


def kept(like: Tensor, rate: Tensor, batch: Tensor, salt: Tensor, per_sample: bool) -> Tensor:
    """For each sample ``1 / (1 − rate)``, or 0 with the probability ``rate``.

    A function of its arguments, so that a forward that is computed again has the same masks; and of
    the seed of the random stream where that is not the one of the run.

    Args:
        like: ``(batch, …)``; the result is ``(batch, 1, …)`` of its dtype.
        rate: one number, on the CPU, as ``batch`` and ``salt``, which tell one draw from another.
        batch: an integer.
        salt: an integer.
        per_sample: one draw for each sample, or one for all.
    """
    p = float(rate)
    # Together with the position in the batch these are hashed, not added: near seeds are unlike.
    stream = torch.initial_seed()
    stream = 0 if stream == _RUN["seed"] else stream
    seed = crc32(repr((int(batch), int(salt), stream)).encode())
    generator = torch.Generator(device=like.device).manual_seed(seed)
    count = like.shape[0] if per_sample else 1
    numbers = torch.rand(count, generator=generator, device=like.device)
    mask = (numbers >= p).to(like.dtype) / max(1.0 - p, 1e-12)
    shape = [like.shape[0]] + [1] * (like.ndim - 1)
    return mask.expand(like.shape[0]).reshape(shape).contiguous()


_operator = torch.library.custom_op("lightning_aux::kept", kept, mutates_args=())


@_operator.register_fake
def _(like: Tensor, rate: Tensor, batch: Tensor, salt: Tensor, per_sample: bool) -> Tensor:
    return like.new_empty([like.shape[0]] + [1] * (like.ndim - 1))
