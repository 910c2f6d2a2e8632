"""``WeightStore``: a second set of values for a module's parameters and buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_aux.engine import AuxiliaryError
from lightning_aux.functional import ema_update_

__all__ = ["WeightStore"]

_HALF = (torch.float16, torch.bfloat16)


class WeightStore:
    """Values by name for every parameter and buffer of a module; nothing else is copied.

    Tied parameters are held once and stay tied. Parameters in half precision have float32
    values here: an average with a decay near one would otherwise never move. Buffers are looked
    up by name on each use, since modules may replace them; parameters are cached.

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
        self._names = list(named)
        self._live = list(named.values())
        self._values = [_float32(parameter.detach()) for parameter in self._live]
        self._averages = buffers == "average"
        self._owners: list[tuple[str, dict[str, Any], str]] = []
        self._optional: set[str] = set()  # buffers that the module itself never saves
        seen: set[int] = set()
        for prefix, owner in module.named_modules():
            for key, buffer in owner._buffers.items():
                if buffer is not None and id(buffer) not in seen:
                    seen.add(id(buffer))
                    name = f"{prefix}.{key}" if prefix else key
                    self._owners.append((name, owner._buffers, key))
                    if key in owner._non_persistent_buffers_set:
                        self._optional.add(name)
        self._buffers = [held[key].detach().clone() for _, held, key in self._owners]

    def update(self, decay: float) -> None:
        """Move the average: values ← decay · values + (1 − decay) · live."""
        ema_update_(self._values, [parameter.detach() for parameter in self._live], decay)
        if self._averages and self._buffers:
            live = [held[key].detach() for _, held, key in self._owners]
            moving = [place for place, each in enumerate(live) if each.is_floating_point()]
            if moving:
                shadows = [self._buffers[place] for place in moving]
                ema_update_(shadows, [live[place] for place in moving], decay)

    def copy_buffers(self) -> None:
        """Take the live module's buffers (all but the averaged ones)."""
        for place, (_, held, key) in enumerate(self._owners):
            live = held[key]
            if not (self._averages and live.is_floating_point()):
                self._buffers[place].copy_(live)

    def pairs(self) -> tuple[list[nn.Parameter], list[Tensor]]:
        """The trainable parameters and, in the same order, their values here."""
        chosen = [place for place, each in enumerate(self._live) if each.requires_grad]
        return [self._live[place] for place in chosen], [self._values[place] for place in chosen]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the module these values for the time of a ``with`` block.

        Data pointers are exchanged, so whoever else holds the parameters (an RNN's flat weights,
        a list in the user's code) sees the exchange too, and the student's graph is untouched.
        """
        kept = [parameter.data for parameter in self._live]
        buffers = [held[key] for _, held, key in self._owners]
        try:
            for parameter, value in zip(self._live, self._values, strict=True):
                parameter.data = value if value.dtype == parameter.dtype else value.to(parameter)
            for (_, held, key), value in zip(self._owners, self._buffers, strict=True):
                held[key] = value
            yield
        finally:
            for parameter, data in zip(self._live, kept, strict=True):
                parameter.data = data
            for (_, held, key), buffer in zip(self._owners, buffers, strict=True):
                held[key] = buffer

    def state_dict(self) -> dict[str, Tensor]:
        """All values by the names that the module's own ``named_parameters`` gives."""
        weights = dict(zip(self._names, self._values, strict=True))
        return weights | {
            name: value for (name, _, _), value in zip(self._owners, self._buffers, strict=True)
        }

    def load_state_dict(self, state: dict[str, Tensor], asked_by: str) -> None:
        """Take values by name; they keep this store's devices.

        Raises:
            AuxiliaryError: a name is missing or a shape differs.
        """
        own = self.state_dict()
        missing = [name for name in own if name not in state and name not in self._optional]
        if missing:
            raise AuxiliaryError(
                f"{asked_by}: the saved weights lack {', '.join(map(repr, missing[:5]))}"
                f"{' and more' if len(missing) > 5 else ''}. They belong to another model."
            )
        for name, value in own.items():
            if name not in state:
                continue
            if state[name].shape != value.shape:
                raise AuxiliaryError(
                    f"{asked_by}: {name!r} has shape {tuple(state[name].shape)} in the saved "
                    f"weights and {tuple(value.shape)} in the model. They belong to another model."
                )
            value.copy_(state[name])


def _float32(value: Tensor) -> Tensor:
    return value.to(torch.float32, copy=True) if value.dtype in _HALF else value.clone()
