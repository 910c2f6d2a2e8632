"""Softmax along a short dimension, in the layout in which the CPU computes it fast."""

from __future__ import annotations

import torch
from torch import Tensor

_VECTOR = {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 0)
"""Bytes of one of the processor's vectors. Rows that do not fill one are computed number by number.
"""
_WORTH = 1024
"""Numbers from which on the copy that changes the layout costs less than it saves."""


def log_softmax(logits: Tensor, dim: int) -> Tensor:
    """``torch.log_softmax``; of ten classes several times as fast. Equal up to rounding."""
    if not _narrow(logits, dim):
        return torch.log_softmax(logits, dim)
    return torch.log_softmax(logits.movedim(dim, 0).contiguous(), 0).movedim(0, dim)


def softmax(logits: Tensor, dim: int) -> Tensor:
    """``torch.softmax``, likewise."""
    if not _narrow(logits, dim):
        return torch.softmax(logits, dim)
    return torch.softmax(logits.movedim(dim, 0).contiguous(), 0).movedim(0, dim)


def _narrow(logits: Tensor, dim: int) -> bool:
    """Whether rows are shorter than a vector, and there are enough of them.

    A compiler chooses its own layout, and a tensor of another class knows operations only.
    """
    return (
        2 < logits.shape[dim] < _VECTOR // logits.itemsize
        and logits.stride(dim) == 1
        and logits.numel() >= _WORTH
        and logits.device.type == "cpu"
        and type(logits) is Tensor
        and not torch.compiler.is_compiling()
    )
