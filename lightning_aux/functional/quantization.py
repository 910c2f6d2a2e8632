"""Uniform quantisation of tensors in buckets, each between its own least and greatest value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .precision import at_least_float32

_NARROW = 1024  # buckets that a smaller tensor does not fill: fewer widths, so fewer kernels


def quantize(
    tensor: Tensor, bits: int = 4, bucket: int = 256, generator: torch.Generator | None = None
) -> Tensor:
    """The tensor with ``s = 2^bits`` values in every bucket of consecutive elements.

    With β the least value of a bucket and α its range, v̂ = (v − β) / α is rounded to the nearest
    multiple of 1 / (s − 1), and the result is α·v̂ + β (Polino, Pascanu & Alistarh 2018, "Model
    compression via distillation and quantization", arXiv:1802.05668, section 2; a range below
    1e-10 counts as one). The last bucket of a tensor may be smaller, and a tensor with fewer
    elements is one bucket. Computed in float32 at least; no gradient.

    Args:
        tensor: any shape, floating point.
        bits: of each element, 1 to 16.
        bucket: elements that share α and β, at least 2.
        generator: on the tensor's device, rounds at random: up with the probability of what is
            left over v̂, so that the expectation is the tensor. Default: to the nearest, of two
            equally near ones the even multiple.

    Returns:
        A tensor of the same shape and dtype.

    Raises:
        ValueError: ``bits`` or ``bucket`` out of range.
    """
    (values,) = Buckets([tensor], bucket).quantize([tensor], bits, generator)
    return values.to(tensor.dtype)


class Buckets:
    """Memory in which tensors of given shapes are quantised together, again and again.

    Each is padded with its last value to whole rows of ``bucket`` elements, which changes neither
    the least nor the greatest value of a row. Views are made once, so that a call costs a few
    operations on all tensors at once.

    Args:
        like: the tensors, or others of their shapes, dtypes and devices.
        bucket: elements of a row; tensors that are smaller have rows of their own width.
    """

    def __init__(self, like: Sequence[Tensor], bucket: int) -> None:
        if bucket < 2:
            raise ValueError(f"bucket={bucket}: at least two elements share a range")
        kinds: dict[tuple[int, torch.device, torch.dtype], list[int]] = {}
        for place, each in enumerate(like):
            own = 1 << (each.numel() - 1).bit_length() if each.numel() else 0
            dtype = at_least_float32(each[:0] if each.dim() else each).dtype
            kinds.setdefault((min(bucket, max(_NARROW, own)), each.device, dtype), []).append(place)
        self._rows: list[Tensor] = []
        self._parts: list[Tensor] = [each.detach() for each in like]
        self._pads: list[Tensor] = []
        self._last: list[Tensor] = []
        for (width, device, dtype), places in kinds.items():
            sizes = [like[place].numel() for place in places]
            padded = [size + -size % width for size in sizes]
            flat = torch.empty(sum(padded), device=device, dtype=dtype)
            for place, size, part in zip(places, sizes, torch.split(flat, padded), strict=True):
                self._parts[place] = part[:size].view(like[place].shape)
                if 0 < size < len(part):
                    self._pads.append(part[size:])
                    self._last.append(part[size - 1].expand(len(part) - size))
            self._rows.append(flat.view(-1, width))

    @torch.no_grad()
    def quantize(
        self, tensors: Sequence[Tensor], bits: int, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """Each tensor quantised as by `quantize`, in float32 at least.

        The results share this memory: the next call overwrites them.
        """
        if not 1 <= bits <= 16:
            raise ValueError(f"bits={bits}: from 1 to 16")
        if self._parts:
            torch._foreach_copy_(self._parts, [each.detach() for each in tensors])
        if self._pads:
            torch._foreach_copy_(self._pads, self._last)
        for rows in self._rows:
            _quantize_(rows, 2**bits - 1, generator)
        return self._parts


def _quantize_(rows: Tensor, steps: int, generator: torch.Generator | None) -> None:
    if not rows.numel():
        return
    least, greatest = rows.aminmax(dim=1, keepdim=True)
    span = greatest - least
    span = torch.where(span < 1e-10, torch.ones_like(span), span)
    rows.sub_(least).div_(span).mul_(steps)
    if generator is None:
        rows.round_()
    else:
        over = rows.frac()
        rows.floor_().add_(torch.empty_like(rows).uniform_(generator=generator) < over)
    rows.div_(steps).mul_(span).add_(least)
