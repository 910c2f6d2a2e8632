"""Running the user's model a second time without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric

__all__ = ["Unobserved"]

_LOGGING = ("log", "log_dict")
# Of a torchmetrics Metric: what an update or a forward changes besides its states.
_COUNTERS = ("_update_count", "_computed", "_forward_cache")


class Unobserved:
    """A context for a second pass: evaluation mode, no gradient, and nothing of it is kept.

    The random stream is put back, ``self.log`` is silent, and metrics that the model updates in its
    ``forward`` are as they were. Autocast stays as it is but for its cache: that is keyed by
    parameter, so a cast of the student's weights made earlier in the step would be taken for the
    teacher's. Forward hooks of the user's own fire a second time.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        # Watched in the first pass; after it only those that the model updates in its forward.
        self._metrics = [each for each in module.modules() if isinstance(each, Metric)]
        self._settled = False

    @contextmanager
    def __call__(self, device: torch.device) -> Iterator[None]:
        own = self._module.__dict__
        log: dict[str, Any] = {name: own[name] for name in _LOGGING if name in own}
        modules = [each for each in self._module.modules() if each.training]
        cuda = [device] if device.type == "cuda" else []
        autocast = torch.autocast(
            device.type,
            dtype=torch.get_autocast_dtype(device.type),
            enabled=torch.is_autocast_enabled(device.type),
            cache_enabled=False,
        )
        metrics = [_contents(each) for each in self._metrics]
        # nn.Module.__setattr__ costs a microsecond a call, and .eval() may be overridden by the
        # user; ``training`` is a plain entry of the instance dictionary.
        for each in modules:
            each.__dict__["training"] = False
        own.update(dict.fromkeys(_LOGGING, _silent))
        try:
            with torch.random.fork_rng(devices=cuda), torch.no_grad(), autocast:
                yield
        finally:
            for each in modules:
                each.__dict__["training"] = True
            for name in _LOGGING:
                del own[name]
            own.update(log)
            self._put_back(metrics)

    def _put_back(self, metrics: list[dict[str, Any]]) -> None:
        updated = []
        for metric, contents in zip(self._metrics, metrics, strict=True):
            if metric._update_count != contents["_update_count"]:
                metric.__dict__.update(contents)
                updated.append(metric)
        if not self._settled:
            self._metrics, self._settled = updated, True


def _contents(metric: Metric) -> dict[str, Any]:
    names = (*metric._defaults, *_COUNTERS)
    return {name: deepcopy(metric.__dict__[name]) for name in names}


def _silent(*args: Any, **kwargs: Any) -> None:
    """In place of ``self.log`` while a teacher runs."""
