"""How many bytes of tensors a callback holds, beside those of the user's module."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_aux.engine import Attached, Engine

__all__ = ["bytes_of_head", "held"]


def held(member: Attached, module: nn.Module, others: Iterable[Attached]) -> int:
    """Bytes of the storages that ``member`` holds and neither ``module`` nor ``others`` do.

    Followed are containers, modules, and objects of our classes or of the member's own package.
    """
    packages = {"lightning_aux", type(member).__module__.partition(".")[0]}
    own = {_key(each) for each in (*module.parameters(), *module.buffers())}
    found = {_key(each): _size(each) for each in _tensors(member, [module, *others], packages)}
    return sum(size for key, size in found.items() if key not in own)


def bytes_of_head(head: Any, optimizers: Iterable[Any]) -> int:
    """Bytes of the gradients of a head and of what the optimizers remember of it."""
    if not isinstance(head, nn.Module):
        return 0
    count = 0
    for parameter in head.parameters():
        remembered = [
            each
            for optimizer in optimizers
            for each in optimizer.state.get(parameter, {}).values()
            if isinstance(each, Tensor)
        ]
        gradient = [] if parameter.grad is None else [parameter.grad]
        count += sum(each.numel() * each.element_size() for each in (*gradient, *remembered))
    return count


def _tensors(member: Any, without: Iterable[Any], packages: set[str]) -> Iterator[Tensor]:
    waiting, seen = deque([member]), set(map(id, without))
    kept = []  # what is made on the way stays, so that its id is nobody else's
    while waiting:
        here = waiting.popleft()
        if id(here) in seen:
            continue
        seen.add(id(here))
        kept.append(here)
        if isinstance(here, Tensor):
            yield here
        elif isinstance(here, nn.Module):
            waiting += [*here.parameters(), *here.buffers()]
        elif isinstance(here, Mapping):
            waiting += [*here.keys(), *here.values()]
        elif isinstance(here, list | tuple | set | frozenset | deque):
            waiting += here
        elif not isinstance(here, Engine | type) and _of(here) in packages:
            waiting += getattr(here, "__dict__", {}).values()


def _of(here: Any) -> str:
    return type(here).__module__.partition(".")[0]


def _key(tensor: Tensor) -> Any:
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (RuntimeError, NotImplementedError):  # a tensor of a class of its own
        return id(tensor)


def _size(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):
        return tensor.numel() * tensor.element_size()
