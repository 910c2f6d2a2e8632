"""``Offload``: averages in host memory, moved while the device goes on with the next step."""

from __future__ import annotations

import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_aux.engine import AuxiliaryError
from lightning_aux.engine.stand_in import BEFORE_WRITING
from lightning_aux.functional.averages import move_

__all__ = ["Offload", "before_writing", "in_host_memory"]

_Pairs: TypeAlias = tuple[list[Tensor], list[Tensor]]
_DATA = attrgetter("data")
_VERSION = attrgetter("_version")


def in_host_memory(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy there, pinned where a CUDA device is to read and write it by itself."""
    return _room_for(tensor, dtype).copy_(tensor)


def _room_for(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(tensor, dtype=dtype, device="cpu", pin_memory=tensor.is_cuda)


class Copies:
    """Copies from one CUDA device to pinned memory, on a stream of their own.

    Whoever queues them goes on at once, and so does the device, as long as nothing writes to what
    is being read: `before_writing` has it wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Who waits for it sleeps meanwhile.
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def start(self, staging: list[Tensor], values: list[Tensor]) -> None:
        """Copy ``values`` as they are after all that the device has been given to do so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream), torch.no_grad():
            torch._foreach_copy_(staging, values, non_blocking=True)
            self._done.record()

    def before_writing(self) -> None:
        """The device does what it is given from now on when they are done. Nobody waits here."""
        torch.cuda.current_stream(self._device).wait_event(self._done)

    def wait(self) -> None:
        """Return when they are done."""
        self._done.synchronize()


def copies_from(device: torch.device) -> Copies | None:
    """What copies beside the work of ``device``, if it can."""
    return Copies(device) if device.type == "cuda" else None


class _Part:
    """Weights of one device, and the staging memory that they are copied to.

    Args:
        copies: what copies them; ``None``: whoever asks, at once.
        in_order: whether the device waits for the copies before it goes on.
    """

    def __init__(self, copies: Copies | None, in_order: bool) -> None:
        self.copies, self._in_order = copies, in_order
        self.live: list[Tensor] = []
        self.staging: list[Tensor] = []
        self._read: list[Tensor] = []  # kept from being freed, and used again, meanwhile
        self._versions: list[int] = []

    def copy(self) -> None:
        # A parameter may point at other data than when this was made.
        read = list(map(_DATA, self.live))
        if self.copies is None:
            torch._foreach_copy_(self.staging, read)
            return
        self.copies.start(self.staging, read)
        self._read, self._versions = read, list(map(_VERSION, self.live))
        if self._in_order:
            self.before_writing()

    def before_writing(self) -> None:
        if self.copies is None or not self._read:
            return
        self.copies.before_writing()
        self._read = []
        if list(map(_VERSION, self.live)) != self._versions:
            raise AuxiliaryError(
                "weights that require a gradient were written to between two steps of the "
                "optimizer (clamped, normalised), while they were being copied for an average "
                "with offload=True. Leave offload out, or write to them in the optimizer's step."
            )


# By identity of the `Offload`, of those whose copies somebody who writes may have to wait for.
_PARTS: dict[int, list[_Part]] = {}
_HOOKS: list[Any] = []


def before_writing(*_: Any) -> None:
    """Have the devices end the copies under way before what they are given from now on.

    To be called before anything writes to weights outside of an optimizer.

    Raises:
        AuxiliaryError: somebody has written to them already.
    """
    for part in [each for parts in _PARTS.values() for each in parts]:
        part.before_writing()


BEFORE_WRITING.append(before_writing)


def _before_step(
    optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The hook of every optimizer: it writes when its closure, if it has one, has run.

    Lightning's closure is the forward and the backward, which the copies are to run beside.
    """
    place = next((i for i, each in enumerate(args) if i and callable(each)), None)
    closure = kwargs.get("closure") if place is None else args[place]
    if closure is None:
        before_writing()
        return None

    def closure_then_wait() -> Any:
        returned = closure()
        before_writing()
        return returned

    if place is None:
        return args, {**kwargs, "closure": closure_then_wait}
    return (*args[:place], closure_then_wait, *args[place + 1 :]), kwargs


def _leave(who: int) -> None:
    _PARTS.pop(who, None)
    while _HOOKS and not _PARTS:
        _HOOKS[-1].remove()
        _HOOKS.pop()


class Offload:
    """Moves averages in host memory towards weights on a device, while training goes on.

    `move` has the weights copied to staging memory; a thread waits for that and moves the averages.
    On CUDA the copies run beside the next forward and backward: parameters that require a gradient
    are taken to be written to by optimizers alone, whose next step waits, on the device, until they
    are copied. All others (a target network that the user moves) are copied before the device goes
    on. Weights in host memory are copied at once, by the caller.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._moving: Future[None] | None = None
        self._pairs: list[_Pairs] = []
        self._staged: list[_Pairs] = []
        self._parts: list[_Part] = []
        weakref.finalize(self, _leave, id(self))  # for who does not close it

    def move(self, pairs: list[_Pairs], decay: float) -> None:
        """Begin one update, when the one before is done.

        Args:
            pairs: averages in host memory and live weights, as `grouped` returns them: the same
                list as long as these are the same tensors.
            decay: see `move_`.

        Raises:
            AuxiliaryError: see `join`.
        """
        self.join()
        if pairs is not self._pairs:
            self._stage(pairs)
        for part in self._parts:
            part.copy()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "lightning_aux_offload")
        self._moving = self._thread.submit(_move, self._staged, self._parts, decay)

    def join(self) -> None:
        """Wait until the averages are where they should be: to be called before reading them.

        Raises:
            AuxiliaryError: an update has failed, now and whenever they are asked for again.
        """
        if self._moving is not None:
            try:
                self._moving.result()  # Ctrl-C in here leaves it as it is
            except Exception as error:
                raise AuxiliaryError(
                    f"an average in host memory (offload=True) is not what it should be: its "
                    f"update ended with {type(error).__name__}: {error}. Go on from the last "
                    f"checkpoint, without offload if that happens again."
                ) from error
            self._moving = None

    def close(self) -> None:
        """Wait for the update under way, and leave neither a thread nor anything in torch."""
        if self._thread is not None:
            self._thread.shutdown()  # Ctrl-C in here: to be called again
            self._thread = None
        self._pairs = []  # whoever moves it again joins again
        _leave(id(self))

    def _stage(self, pairs: list[_Pairs]) -> None:
        parts: dict[tuple[torch.device, bool], _Part] = {}
        self._staged = []
        for averages, values in pairs:
            staging = [_room_for(each.detach(), each.dtype) for each in values]
            self._staged.append((averages, staging))
            for held, live in zip(staging, values, strict=True):
                in_order = not (isinstance(live, nn.Parameter) and live.requires_grad)
                part = parts.get((live.device, in_order))
                if part is None:
                    part = _Part(copies_from(live.device), in_order)
                    parts[live.device, in_order] = part
                part.staging.append(held)
                part.live.append(live)
        self._pairs, self._parts = pairs, list(parts.values())
        if any(part.copies is not None for part in self._parts):
            _PARTS[id(self)] = self._parts
            if not _HOOKS:
                _HOOKS.append(register_optimizer_step_pre_hook(_before_step))


def _move(staged: list[_Pairs], parts: list[_Part], decay: float) -> None:
    for part in parts:
        if part.copies is not None:
            part.copies.wait()
    for averages, values in staged:
        move_(averages, values, decay)
