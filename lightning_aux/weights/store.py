"""``WeightStore``: a second set of values for a module's parameters and buffers."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_aux.engine import AuxiliaryError
from lightning_aux.engine.distributed import fully_sharded_modules
from lightning_aux.engine.taps import plain_path
from lightning_aux.functional.anchors import relative_distance
from lightning_aux.functional.averages import ema_update_, grouped, move_
from lightning_aux.functional.precision import HALF
from lightning_aux.functional.shards import is_sharded, local, part_of, saved
from lightning_aux.weights.offload import Offload, before_writing, in_host_memory
from lightning_aux.weights.registrations import Registrations

__all__ = ["WeightStore"]

_Pairs: TypeAlias = tuple[list[Tensor], list[Tensor]]
# What the module holds while other values are in place: parameters, and what they pointed at; of
# sharded ones the parts and their contents; buffers by name here, holder and key.
_Place: TypeAlias = tuple[str, dict[str, Any], str, Tensor]
_Kept: TypeAlias = tuple[list[nn.Parameter], list[Tensor], list[Tensor], list[Tensor], list[_Place]]
Versions: TypeAlias = list[tuple[int, int | None]]
# By identity of the module: the stores whose values are in it, the latest last.
_IN_PLACE: dict[int, list[WeightStore]] = {}
_PART = attrgetter("_local_tensor")  # of a DTensor; ``to_local`` costs microseconds
_SHAPE = attrgetter("shape")


class WeightStore:
    """Values by name for every parameter and persistent buffer of a module; no module is copied.

    Tied parameters and shared buffers are held once and stay tied. What is averaged in half
    precision has float32 values here: an average with a decay near one would otherwise never move.
    A parameter that appears later (an adapter) has its live value from then on. Non-persistent
    buffers (rotary caches, masks) are made from the configuration and have no values here: the
    live ones serve every set of weights.

    Of parameters sharded by ``fully_shard`` (FSDP2) each process holds the values of its own part:
    an update touches nothing else, and `state_dict` gathers them.

    The memory is one copy of the parameters and persistent buffers. Lists are cached and made
    again only when torch reports that a parameter or module was registered: `close` ends that.

    With ``offload`` the values of parameters are in host memory (pinned, where the device is CUDA),
    and `update` returns before it is done: a thread moves them while the device goes on with the
    next step. Whoever reads them waits for it. Values are those without ``offload``.

    Attributes:
        module: whose weights these are.
        buffers: the values of its persistent buffers, by name.
        written: names of the buffers that the user's code has written in an evaluation: in the
            next one they are the live ones.

    Args:
        module: whose weights these are.
        buffers: ``"copy"`` takes floating-point buffers (BatchNorm statistics) from the live
            module at every update, ``"average"`` averages them like parameters. Integer and
            boolean buffers are always copied.
        offload: whether the values of parameters are in host memory; buffers, which are small, stay
            where those of the module are.

    Raises:
        AuxiliaryError: the module has parameters that no batch has given a shape yet, or, with
            ``offload``, sharded ones.
    """

    def __init__(
        self,
        module: nn.Module,
        buffers: Literal["copy", "average"] = "copy",
        offload: bool = False,
    ) -> None:
        self.module = module
        self._offload = Offload() if offload else None
        self._gathering = fully_sharded_modules(module)
        self._averages = buffers == "average"
        self._kept: _Kept | None = None
        self._given: dict[str, tuple[Tensor, int | None]] = {}  # copies of buffers, and versions
        self._again: tuple[bool, dict[str, Tensor] | None] = False, None
        weakref.finalize(self, Registrations.leave, id(self))  # for who does not close it
        Registrations.watch(id(self))
        self._live: list[nn.Parameter] = []
        self._held: dict[str, Tensor] = {}
        self._owners: list[tuple[str, nn.Module]] = []
        self.buffers: dict[str, Tensor] = {}
        self.written: set[str] = set()
        self._list()
        self._plan = self._follow_buffers(self.buffers)
        self._planned_for: list[int] | None = None
        self._agree()

    # ----------------------------------------------------------------- what the module is made of
    def _list(self) -> None:
        """Cache what there is to move, with a live value for each parameter that is new."""
        self._reshard()  # a forward without backward may have left whole parameters in place
        named = {plain_path(name): each for name, each in self.module.named_parameters()}
        lazy = [name for name, parameter in named.items() if is_lazy(parameter)]
        if lazy:
            raise AuxiliaryError(
                f"{', '.join(map(repr, lazy))} has no shape yet, so there is nothing to average. "
                f"Run one batch through the module before Trainer.fit, for example in "
                f"configure_model."
            )
        sharded = [name for name, each in named.items() if is_sharded(each)]
        if sharded and self._offload is not None:
            raise AuxiliaryError(
                f"{', '.join(map(repr, sharded[:3]))}{' and more' if sharded[3:] else ''} of "
                f"{type(self.module).__name__} are sharded, and offload=True holds whole "
                f"parameters. Leave it out: each process holds the average of its own part."
            )
        # Somebody who wraps a module renames what is in it: here it keeps the name it had at first.
        known = {id(one): name for one, name in zip(self._live, self._held, strict=True)}
        names = [known.get(id(parameter), name) for name, parameter in named.items()]
        if len(set(names)) < len(names):  # the wrapper has a parameter of that name too
            names = list(named)
        before, self._held = self._held, {}
        kept = {known.get(id(parameter)) for parameter in named.values()}
        for name, parameter in zip(names, named.values(), strict=True):
            first = known.get(id(parameter))
            if first is None and name not in kept:
                first = name  # another parameter in the place of one that is gone
            value = None if first is None else before.get(first)
            if value is None or value.shape != parameter.shape:
                value = self._copy_of(parameter.detach())
            self._held[name] = value
        self._live = list(named.values())
        self._values = list(self._held.values())
        self._sharded = [place for place, each in enumerate(self._live) if is_sharded(each)]
        self._moves: list[_Pairs] | None = None  # made by the first update
        self._held_parts: list[Tensor] = []
        self._parts_for: list[int] = []
        prefixes = {id(owner): prefix for prefix, owner in self._owners}
        self._owners = [
            (prefixes.get(id(owner), plain_path(f"{path}.") if path else ""), owner)
            for path, owner in self.module.named_modules()
        ]
        self._holders = [owner._buffers for _, owner in self._owners]
        self._planned_for = None
        self._listed = Registrations.count

    def _copy_of(self, parameter: Tensor) -> Tensor:
        if self._offload is None:
            return _float32(parameter)
        half = parameter.dtype in HALF
        return in_host_memory(parameter, torch.float32 if half else parameter.dtype)

    def close(self) -> None:
        """Leave neither anything in torch nor a thread; the store works on, more slowly."""
        Registrations.leave(id(self))
        if self._offload is not None:
            self._offload.close()

    def follow(self) -> None:
        """Take up parameters that have appeared, and forget those that are gone."""
        if self._listed != Registrations.count or not Registrations.watched_by(id(self)):
            self._list()

    @property
    def ties(self) -> dict[str, str]:
        """Further names of tied parameters and shared buffers, and the name they go by here."""
        first: dict[int, str] = {}
        names = [
            *self.module.named_parameters(remove_duplicate=False),
            *self.module.named_buffers(remove_duplicate=False),
        ]
        known = [
            (plain_path(name), first.setdefault(id(each), plain_path(name))) for name, each in names
        ]
        return {name: other for name, other in known if name != other}

    def _agree(self) -> None:
        """Give every process the buffers of the first.

        ``ddp`` makes the live ones equal before every step. FSDP2 does not, and no two processes
        would have the same teacher.
        """
        if self._gathering:
            together: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
            for buffer in self.buffers.values():
                together.setdefault((buffer.dtype, buffer.device), []).append(buffer)
            for buffers in together.values():
                flat = torch.cat([each.flatten() for each in buffers])
                dist.broadcast(flat, 0)
                parts = torch.split(flat, [each.numel() for each in buffers])
                for buffer, part in zip(buffers, parts, strict=True):
                    buffer.copy_(part.view_as(buffer))

    # -------------------------------------------------------------------------------- moving
    def update(self, decay: float) -> None:
        """Move the average of the parameters: values ← decay · values + (1 − decay) · live.

        Raises:
            AuxiliaryError: with ``offload``, the update before this one has failed; as whatever
                reads the values.
        """
        self.follow()
        parts = list(map(_PART, map(self._live.__getitem__, self._sharded)))
        if self._moves is None or list(map(id, parts)) != self._parts_for:
            # FSDP2 keeps the memory of its parts but for the time before the first forward.
            live = self._live if not parts else list(map(local, self._live))
            values = self._values if not parts else self.parts()
            self._moves = grouped(values, cast("list[Tensor]", live))
            self._held_parts, self._parts_for = parts, list(map(id, parts))
        if self._offload is not None:
            self._offload.move(self._moves, decay)
            return
        for averages, values in self._moves:
            move_(averages, values, decay)

    def update_buffers(self, decay: float) -> None:
        """Take the live module's buffers, or average those that are averaged, with ``decay``.

        A buffer whose shape has changed, or that is new, starts from the live value; one that is
        gone is gone here too.
        """
        self.follow()
        # In one go through C: looking at each buffer costs more than moving all of them.
        now = list(map(id, chain.from_iterable(map(dict.values, self._holders))))
        if now != self._planned_for or not self._plan.fits():
            self._plan, self._planned_for = self._follow_buffers(self.buffers), now
        self._plan.run(decay)
        self._agree()

    @torch.no_grad()
    def mean_of(self, others: Sequence[WeightStore]) -> None:
        """Take the mean of the values of ``others``, which belong to the same module.

        See `mean_of_buffers` for buffers.
        """
        self.follow()
        for each in others:
            each.follow()
        _mean_(self.parts(), [each.parts() for each in others])
        self.buffers = mean_of_buffers([each.buffers for each in others])
        self._planned_for = None

    @torch.no_grad()
    def give(self) -> None:
        """Write these values into the live module, which keeps its tensors."""
        self.follow()
        self._reshard()
        before_writing()  # of another store's weights too
        torch._foreach_copy_([local(each) for each in self._live], self.parts())
        for name, _, _, buffer in self._places():
            ours = self.buffers.get(name)
            if ours is not None and _fits(ours, buffer):
                buffer.copy_(ours)

    def values(self) -> list[Tensor]:
        """The values of the parameters, in the order of ``named_parameters``."""
        self._join()
        return self._values

    def parts(self) -> list[Tensor]:
        """The same, of sharded ones the parts that are here."""
        return [local(each) for each in self.values()]

    def _join(self) -> None:
        """Wait for an update that is under way."""
        if self._offload is not None:
            self._offload.join()

    def _follow_buffers(self, buffers: dict[str, Tensor]) -> _Plan:
        """Make ``buffers`` like the live ones by name and shape; how to move them then."""
        live = {name: buffer for name, _, _, buffer in self._places()}
        for name in buffers.keys() - live.keys():
            del buffers[name]
        plan = _Plan()
        for name, now in live.items():
            averaged = self._averages and now.is_floating_point()
            dtype = torch.float32 if averaged and now.dtype in HALF else now.dtype
            held = buffers.get(name)
            if held is None or not _fits(held, now):
                buffers[name] = now.detach().to(dtype, copy=True)
            elif held.dtype != dtype or held.device != now.device:  # the module was cast or moved
                buffers[name] = held.to(now.device, dtype)
            plan.add(buffers[name], now, averaged)
        return plan

    def buffers_after(self, decay: float) -> dict[str, Tensor]:
        """Copies of the buffers as ``update_buffers(decay)`` would leave them."""
        self.follow()
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        self._follow_buffers(buffers).run(decay)
        return buffers

    def _places(self) -> list[_Place]:
        """Name here, holder and key of every persistent buffer of the live module."""
        names: dict[int, str] = {}  # a buffer that several modules share goes by its first name
        return [
            (names.setdefault(id(buffer), prefix + key), owner._buffers, key, buffer)
            for prefix, owner in self._owners
            for key, buffer in owner._buffers.items()
            if buffer is not None and key not in owner._non_persistent_buffers_set
        ]

    def versions(self) -> Versions:
        """Which parameters there are, and how often each has been written to.

        Moving or casting the module changes neither, nor does `in_place`.
        """
        self._reshard()
        return [(id(each), _version(each)) for each in self.module.parameters()]

    def pairs(self) -> tuple[list[nn.Parameter], list[Tensor]]:
        """The trainable parameters and, in the same order, their values here.

        With ``offload`` they are copies on the device of the parameters.
        """
        self.follow()
        values = self.values()
        if self._offload is not None:
            pairs = zip(values, self._live, strict=True)
            values = [value.to(live.device, non_blocking=True) for value, live in pairs]
        chosen = self._trainable()
        return [self._live[place] for place in chosen], [values[place] for place in chosen]

    def distance(self) -> Tensor:
        """How far these values are from the trainable parameters, see `relative_distance`.

        With ``offload`` the update under way is waited for, and no whole copy is on the device.
        """
        self.follow()
        values, chosen = self.values(), self._trainable()
        return relative_distance([self._live[p] for p in chosen], [values[p] for p in chosen])

    def _trainable(self) -> list[int]:
        return [place for place, each in enumerate(self._live) if each.requires_grad]

    @contextmanager
    def in_place(
        self, evaluating: bool = False, buffers: dict[str, Tensor] | None = None
    ) -> Iterator[None]:
        """Give the module these values for the time of a ``with`` block.

        Data pointers are exchanged, so whoever else holds the parameters (an RNN's flat weights,
        a list in the user's code) sees the exchange too, and the student's graph is untouched. A
        buffer that is not as it was at the last update (a cache that has just grown) stays live.
        Of sharded parameters the contents are exchanged, since FSDP2 gathers from the memory that
        it knows; whole parameters that a forward has left in place are given up before and after.

        Another store may have its values in the module already: the block ends with those.

        Args:
            evaluating: whether the user's own code runs meanwhile. What it counts in integer and
                boolean buffers, and what it writes into others, stays.
            buffers: values in place of those of this store.

        Raises:
            AuxiliaryError: another store's values are in place of these.
        """
        if self._kept is not None:
            if _IN_PLACE[id(self.module)][-1] is not self:
                raise AuxiliaryError(
                    f"these weights are in {type(self.module).__name__} already, under others. "
                    f"Take the others out first."
                )
            yield
            return
        try:
            self._exchange(evaluating, buffers)
            yield
        finally:
            self.restore()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The module with its own values again, for a time within `in_place`, of any store."""
        there = [each for each in _IN_PLACE.get(id(self.module), ()) if each._kept is not None]
        for each in reversed(there):
            each.restore()
        try:
            yield
        finally:
            # Of tensors that are made in inference mode nobody can say whether they were written.
            with torch.inference_mode(False), torch.no_grad():
                for each in there:
                    each._exchange(*each._again)

    def _exchange(self, evaluating: bool, buffers: dict[str, Tensor] | None) -> None:
        self.follow()
        values = self.values()
        self._again = evaluating, buffers
        buffers = self.buffers if buffers is None else buffers
        kept = [parameter.data for parameter in self._live]
        shards = [local(kept[place]) for place in self._sharded]
        contents = [shard.clone() for shard in shards]
        places = self._places()
        self._reshard()
        self._given = {}
        # Noted before anything changes.
        self._kept = self._live, kept, shards, contents, places
        _IN_PLACE.setdefault(id(self.module), []).append(self)
        if shards:
            torch._foreach_copy_(shards, [local(values[place]) for place in self._sharded])
        for parameter, value in zip(self._live, values, strict=True):
            if not is_sharded(value):
                fits = value.dtype == parameter.dtype and value.device == parameter.device
                parameter.data = value if fits else value.to(parameter)
        for name, held, key, buffer in places:
            ours = buffers.get(name)
            counts = evaluating and not buffer.is_floating_point()
            if ours is None or counts or (evaluating and name in self.written):
                continue
            if not evaluating and _alike(ours, buffer):
                held[key] = ours
            elif _fits(ours, buffer):
                if name not in self._given:  # one for all modules that share it
                    copy = ours.to(buffer.device, buffer.dtype, copy=True)
                    self._given[name] = copy, _version(copy)
                held[key] = self._given[name][0]

    def restore(self) -> None:
        """Give the module its own values back, where it has not got them.

        To be called again if Ctrl-C interrupts it.
        """
        if self._kept is None:
            return
        there = _IN_PLACE.get(id(self.module), [])
        for later in reversed(there[there.index(self) + 1 :] if self in there else []):
            later.restore()
        live, kept, shards, contents, places = self._kept
        if shards:
            torch._foreach_copy_(shards, contents)
        for parameter, data in zip(live, kept, strict=True):
            if not is_sharded(data):
                parameter.data = data
        evaluating, _ = self._again
        for name, held, key, buffer in places:
            if not evaluating or not self._keeps_what_was_written(name, held, key, buffer):
                held[key] = buffer
        self._reshard()
        self._kept = None
        if self in there:
            there.remove(self)
        if not there:
            _IN_PLACE.pop(id(self.module), None)

    def _keeps_what_was_written(
        self, name: str, held: dict[str, Any], key: str, buffer: Tensor
    ) -> bool:
        """Have the buffer what the user's code has written meanwhile; whether in another tensor."""
        now = held.get(key)
        given, version = self._given.get(name, (buffer, None))
        if now is buffer or (now is given and _version(given) == version):
            return False
        self.written.add(name)
        if now is given and not buffer.is_inference():
            with torch.no_grad():
                buffer.copy_(given)
            return False
        return True

    def _reshard(self) -> None:
        """Give up gathered parameters: the next forward or backward gathers what is there then."""
        for module in self._gathering:
            module.reshard()

    def state_dict(self, buffers: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """All values by the names that the module's own ``named_parameters`` gives.

        Sharded values are gathered one after the other, on the CPU: all processes have to call this
        together. See `saved` for who keeps them.

        Args:
            buffers: values in place of those of this store.
        """
        self.follow()
        held = {name: saved(each) for name, each in zip(self._held, self.values(), strict=True)}
        return held | (self.buffers if buffers is None else buffers)

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
        self.follow()
        self._join()
        state = {plain_path(str(name)): value for name, value in state.items()}
        own = dict(self._held)
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
        self._live: list[Tensor] = []
        self._shapes: list[torch.Size] = []
        self._averages: _Pairs = ([], [])
        self._copies: dict[tuple[torch.device, torch.dtype], _Pairs] = {}

    def add(self, held: Tensor, live: Tensor, averaged: bool) -> None:
        alike = (held.device, held.dtype)
        ours, theirs = self._averages if averaged else self._copies.setdefault(alike, ([], []))
        ours.append(held)
        theirs.append(live)
        self._shapes.append(live.shape)
        self._live.append(live)

    def fits(self) -> bool:
        """Whether the live buffers still have the shapes they had."""
        return list(map(_SHAPE, self._live)) == self._shapes

    @torch.no_grad()
    def run(self, decay: float) -> None:
        if self._averages[0]:
            ema_update_(*self._averages, decay)
        for held, live in self._copies.values():
            torch._foreach_copy_(held, live)


def mean_of_buffers(sets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of sets of buffers, by name; of those in half precision in float32.

    Integer and boolean buffers, and all that not every set has in one shape, are the last one's.
    """
    newest = sets[-1]
    shared = [
        name
        for name, each in newest.items()
        if each.is_floating_point()
        and all(name in other and _fits(each, other[name]) for other in sets)
    ]
    means = {name: each.clone() for name, each in newest.items()}
    means |= {name: _float32(newest[name]) for name in shared}
    _mean_(
        [means[name] for name in shared],
        [[each[name].to(means[name]) for name in shared] for each in sets],
    )
    return means


def _mean_(means: list[Tensor], lists: list[list[Tensor]]) -> None:
    """Each of ``means`` becomes the mean of the tensors at its place in ``lists``."""
    if not means:
        return
    torch._foreach_zero_(means)
    for each in lists:
        torch._foreach_add_(means, each)
    torch._foreach_div_(means, len(lists))


def _float32(value: Tensor) -> Tensor:
    return value.to(torch.float32, copy=True) if value.dtype in HALF else value.clone()


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


def _fits(one: Tensor, other: Tensor) -> bool:
    """Whether the values of a buffer can be put in the place of another's."""
    floats = one.is_floating_point() and other.is_floating_point()
    return one.shape == other.shape and (floats or one.dtype == other.dtype)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
