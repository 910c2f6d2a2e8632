"""Running the user's model a second time without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["unobserved"]


@contextmanager
def unobserved(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode, no gradient, and the random stream put back afterwards.

    Autocast stays as it is but for its cache: it is keyed by parameter, so a cast of the student's
    weights made earlier in the step would be taken for the teacher's.
    """
    modules = [each for each in module.modules() if each.training]
    cuda = [device] if device.type == "cuda" else []
    autocast = torch.autocast(
        device.type,
        dtype=torch.get_autocast_dtype(device.type),
        enabled=torch.is_autocast_enabled(device.type),
        cache_enabled=False,
    )
    # nn.Module.__setattr__ costs a microsecond a call, and .eval() may be overridden by the user;
    # ``training`` is a plain entry of the instance dictionary.
    for each in modules:
        each.__dict__["training"] = False
    try:
        with torch.random.fork_rng(devices=cuda), torch.no_grad(), autocast:
            yield
    finally:
        for each in modules:
            each.__dict__["training"] = True
