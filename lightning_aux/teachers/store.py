"""``WeightStore``: a second set of values for a module's parameters and buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_aux.engine import AuxiliaryError
from lightning_aux.engine.distributed import fully_sharded_modules
from lightning_aux.functional import ema_update_
from lightning_aux.functional.shards import gathered, is_sharded, local, part_of

__all__ = ["WeightStore"]

_Pairs: TypeAlias = tuple[list[Tensor], list[Tensor]]
# What the module holds while other values are in place: parameters; of sharded ones the parts and
# their contents; buffers by name here, holder and key.
_Kept: TypeAlias = tuple[
    list[Tensor], list[Tensor], list[Tensor], list[tuple[str, dict[str, Any], str, Tensor]]
]
_HALF = (torch.float16, torch.bfloat16)


class WeightStore:
    """Values by name for every parameter and persistent buffer of a module; no module is copied.

    Tied parameters and shared buffers are held once and stay tied. Parameters in half precision
    have float32 values here: an average with a decay near one would otherwise never move.
    Parameters are cached; buffers are looked up on each use, since modules may replace, add and
    remove them. Non-persistent buffers (rotary caches, masks) are made from the configuration and
    have no values here: the live ones serve every set of weights.

    Of parameters sharded by ``fully_shard`` (FSDP2) each process holds the values of its own part:
    an update touches nothing else, and `state_dict` gathers them.

    Args:
        module: whose weights these are.
        buffers: ``"copy"`` takes floating-point buffers (BatchNorm statistics) from the live
            module at every update, ``"average"`` averages them like parameters. Integer and
            boolean buffers are always copied.

    Raises:
        AuxiliaryError: the module has parameters that no batch has given a shape yet.
    """

    def __init__(self, module: nn.Module, buffers: Literal["copy", "average"] = "copy") -> None:
        named = dict(module.named_parameters())
        lazy = [name for name, parameter in named.items() if is_lazy(parameter)]
        if lazy:
            raise AuxiliaryError(
                f"{', '.join(map(repr, lazy))} has no shape yet, so there is nothing to average. "
                f"Run one batch through the module before Trainer.fit, for example in "
                f"configure_model."
            )
        self._gathering = fully_sharded_modules(module)
        if self._gathering:  # a forward without backward may have left whole parameters in place
            self._reshard()
            named = dict(module.named_parameters())
        self._names = list(named)
        self._live = list(named.values())
        self._sharded = [place for place, each in enumerate(self._live) if is_sharded(each)]
        self._values = [_float32(parameter.detach()) for parameter in self._live]
        self._averages = buffers == "average"
        self._owners = [
            (f"{prefix}." if prefix else "", owner._buffers, owner._non_persistent_buffers_set)
            for prefix, owner in module.named_modules()
        ]
        self._kept: _Kept | None = None
        self.buffers: dict[str, Tensor] = {}
        self._plan = self._follow(self.buffers)
        self._planned_for: list[tuple[int, torch.Size] | None] | None = None
        self._agree()

    def _agree(self) -> None:
        """Give every process the buffers of the first.

        ``ddp`` makes the live ones equal before every step. FSDP2 does not, and no two processes
        would have the same teacher.
        """
        if self._gathering:
            for buffer in self.buffers.values():
                dist.broadcast(buffer, 0)

    def update(self, decay: float) -> None:
        """Move the average of the parameters: values ← decay · values + (1 − decay) · live."""
        if self._sharded:
            ema_update_(list(map(local, self._values)), list(map(local, self._live)), decay)
        else:
            ema_update_(self._values, cast("list[Tensor]", self._live), decay)

    def update_buffers(self, decay: float) -> None:
        """Take the live module's buffers, or average those that are averaged, with ``decay``.

        A buffer whose shape or dtype has changed, or that is new, starts from the live value; one
        that is gone is gone here too.
        """
        now = [
            None if buffer is None else (id(buffer), buffer.shape)
            for _, held, _ in self._owners
            for buffer in held.values()
        ]
        if now != self._planned_for:  # mostly the same: looking at each costs more than moving all
            self._plan, self._planned_for = self._follow(self.buffers), now
        self._plan.run(decay)
        self._agree()

    def _follow(self, buffers: dict[str, Tensor]) -> _Plan:
        """Make ``buffers`` like the live ones by name, shape and dtype; how to move them then."""
        live = {name: buffer for name, _, _, buffer in self._places()}
        for name in buffers.keys() - live.keys():
            del buffers[name]
        plan = _Plan()
        for name, now in live.items():
            if name not in buffers or not _alike(buffers[name], now):
                buffers[name] = now.detach().clone()
            plan.add(buffers[name], now, self._averages and now.is_floating_point())
        return plan

    def _places(self) -> list[tuple[str, dict[str, Any], str, Tensor]]:
        """Name here, holder and key of every persistent buffer of the live module."""
        names: dict[int, str] = {}  # a buffer that several modules share goes by its first name
        return [
            (names.setdefault(id(buffer), prefix + key), held, key, buffer)
            for prefix, held, unsaved in self._owners
            for key, buffer in held.items()
            if buffer is not None and key not in unsaved
        ]

    def pairs(self) -> tuple[list[nn.Parameter], list[Tensor]]:
        """The trainable parameters and, in the same order, their values here."""
        chosen = [place for place, each in enumerate(self._live) if each.requires_grad]
        return [self._live[place] for place in chosen], [self._values[place] for place in chosen]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the module these values for the time of a ``with`` block.

        Data pointers are exchanged, so whoever else holds the parameters (an RNN's flat weights,
        a list in the user's code) sees the exchange too, and the student's graph is untouched. A
        buffer that is not as it was at the last update (a cache that has just grown) stays live.
        Of sharded parameters the contents are exchanged, since FSDP2 gathers from the memory that
        it knows; whole parameters that a forward has left in place are given up before and after.
        """
        try:
            self._exchange()
            yield
        finally:
            self.restore()

    def _exchange(self) -> None:
        kept = [parameter.data for parameter in self._live]
        shards = [local(kept[place]) for place in self._sharded]
        contents = [shard.clone() for shard in shards]
        places = self._places()
        self._reshard()
        self._kept = kept, shards, contents, places  # noted before anything changes
        if shards:
            torch._foreach_copy_(shards, [local(self._values[place]) for place in self._sharded])
        for parameter, value in zip(self._live, self._values, strict=True):
            if not is_sharded(value):
                parameter.data = value if value.dtype == parameter.dtype else value.to(parameter)
        for name, held, key, buffer in places:
            ours = self.buffers.get(name)
            if ours is not None and _alike(ours, buffer):
                held[key] = ours

    def restore(self) -> None:
        """Give the module its own values back, where it has not got them.

        To be called again if Ctrl-C interrupts it.
        """
        if self._kept is None:
            return
        kept, shards, contents, places = self._kept
        if shards:
            torch._foreach_copy_(shards, contents)
        for parameter, data in zip(self._live, kept, strict=True):
            if not is_sharded(data):
                parameter.data = data
        for _, held, key, buffer in places:
            held[key] = buffer
        self._reshard()
        self._kept = None

    def _reshard(self) -> None:
        """Give up gathered parameters: the next forward or backward gathers what is there then."""
        for module in self._gathering:
            module.reshard()

    def state_dict(self, pending: float | None = None) -> dict[str, Tensor]:
        """All values by the names that the module's own ``named_parameters`` gives.

        Sharded values are gathered one after the other, on the CPU of every process: all processes
        have to call this together.

        Args:
            pending: with a decay, buffers are copies as ``update_buffers(pending)`` would leave
                them; the store itself does not change.
        """
        buffers = self.buffers
        if pending is not None:
            buffers = {name: buffer.clone() for name, buffer in buffers.items()}
            self._follow(buffers).run(pending)
        values = [gathered(each).cpu() if is_sharded(each) else each for each in self._values]
        return dict(zip(self._names, values, strict=True)) | buffers

    def load_state_dict(
        self, state: dict[str, Tensor], asked_by: str, buffers: dict[str, Tensor] | None = None
    ) -> None:
        """Take values by name; they keep this store's devices.

        Args:
            state: what `state_dict` returned, or that of the module itself.
            asked_by: begins the message of an error.
            buffers: taken in place of those in ``state``, whatever the live module has: its own
                may have changed shape since these were saved.

        Raises:
            AuxiliaryError: a name is missing or a shape differs.
        """
        own = dict(zip(self._names, self._values, strict=True))
        if buffers is None:
            own |= self.buffers
        else:
            self._planned_for = None
            self.buffers = {
                name: saved.to(self.buffers.get(name, saved).device, copy=True)
                for name, saved in buffers.items()
            }
        missing = [name for name in own if name not in state]
        if missing:
            raise AuxiliaryError(
                f"{asked_by}: the saved weights lack {', '.join(map(repr, missing[:5]))}"
                f"{' and more' if len(missing) > 5 else ''}. They belong to another model."
            )
        for name, value in own.items():
            if state[name].shape != value.shape:
                raise AuxiliaryError(
                    f"{asked_by}: {name!r} has shape {tuple(state[name].shape)} in the saved "
                    f"weights and {tuple(value.shape)} in the model. They belong to another model."
                )
            local(value).copy_(part_of(state[name], value))
        self._agree()


class _Plan:
    """Pairs of buffers and live ones, together for each device and dtype."""

    def __init__(self) -> None:
        self._averages: _Pairs = ([], [])
        self._copies: dict[tuple[torch.device, torch.dtype], _Pairs] = {}

    def add(self, held: Tensor, live: Tensor, averaged: bool) -> None:
        alike = (held.device, held.dtype)
        ours, theirs = self._averages if averaged else self._copies.setdefault(alike, ([], []))
        ours.append(held)
        theirs.append(live)

    @torch.no_grad()
    def run(self, decay: float) -> None:
        if self._averages[0]:
            ema_update_(*self._averages, decay)
        for held, live in self._copies.values():
            torch._foreach_copy_(held, live)


def _float32(value: Tensor) -> Tensor:
    return value.to(torch.float32, copy=True) if value.dtype in _HALF else value.clone()


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
