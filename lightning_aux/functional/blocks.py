"""Means over examples, computed a block of examples at a time and together with their gradient.

Written out, a loss of `(batch, classes)` logits keeps a copy of the probabilities for each of its
operations. In blocks nothing of that size exists but the gradient, which is needed anyway, and what
is computed on the way stays in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from .precision import at_least_float32

CPU_BLOCK = 2**18
"""Elements of a block on the CPU: in float32 a few of that size fit into its outer caches."""
BLOCK = 2**24
"""Elements of a block elsewhere: enough for a GPU to forget that there are several."""


class Measure(NamedTuple):
    """What is averaged: a number for each example, of one tensor with a gradient and one without.

    Both functions take the two tensors in float32 or float64 and leave them as they are.

    Attributes:
        values: one number per example, by operations that autograd can follow twice.
        slopes: the same numbers, and their derivatives by the first tensor, without autograd.
        factor: of the values that `slopes` returns.
        slope_factor: of the derivatives that it returns.
    """

    values: Callable[[Tensor, Tensor], Tensor]
    slopes: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    factor: float = 1.0
    slope_factor: float = 1.0


def mean_over_examples(
    student: Tensor, teacher: Tensor, mask: Tensor | None, dim: int, measure: Measure
) -> Tensor:
    """Mean of the measure over ALL examples; those that the mask leaves out count 0.

    An example is one position without dimension `dim`. What is masked out may hold anything, NaN
    included. Memory beside the arguments: one tensor like `student` if it needs a gradient, and a
    few blocks.

    Args:
        student: `(…, classes, …)`; the result can be differentiated by it, any number of times.
        teacher: the same shape, or class indices in the shape of the examples; no gradient.
        mask: the shape of the examples, or None.
        dim: the dimension of the classes, from 0.
        measure: what is averaged.

    Returns:
        A scalar: float64 for float64, else float32.
    """
    teacher = teacher.detach()
    mask = None if mask is None else mask.detach()
    # A graph that is being compiled is fused anyway, and a tensor of another class (one that is
    # spread over processes, say) knows operations but not this way of going through them.
    if torch.compiler.is_compiling() or type(student) not in (Tensor, Parameter):
        return _plain(student, teacher, mask, dim, measure)
    if torch.is_grad_enabled() and student.requires_grad:
        mean: Tensor = _Blocks.apply(student, teacher, mask, dim, measure)  # type: ignore[no-untyped-call]
        return mean
    return _values(student, teacher, mask, dim, measure)


class _Blocks(torch.autograd.Function):
    """The gradient is ready after the forward pass and handed over by the first backward pass.

    In float16 it waits for the backward pass instead: what is too small for float16 would be lost
    before the factor of a loss scaler could save it.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor | None, dim: int, measure: Measure
    ) -> Tensor:
        ctx.save_for_backward(student, teacher, mask)
        ctx.dim, ctx.measure, ctx.gradient = dim, measure, None
        if student.dtype == torch.float16:
            return _values(student, teacher, mask, dim, measure)
        mean, ctx.gradient = _gradient(student, teacher, mask, dim, measure)
        return mean

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is not None and not torch.is_grad_enabled():
            return _scaled_(gradient, outer, ctx.dim), None, None, None, None
        student, teacher, mask = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient is to be differentiated too
            mean = _plain(student, teacher, mask, ctx.dim, ctx.measure)
            (gradient,) = torch.autograd.grad(mean, student, outer, create_graph=True)
        elif student.dtype == torch.float16:
            _, gradient = _gradient(student, teacher, mask, ctx.dim, ctx.measure, outer)
        else:  # of a graph that was retained: equal to the first gradient to the last bit
            _, gradient = _gradient(student, teacher, mask, ctx.dim, ctx.measure)
            gradient = _scaled_(gradient, outer, ctx.dim)
        return gradient, None, None, None, None


def _plain(
    student: Tensor, teacher: Tensor, mask: Tensor | None, dim: int, measure: Measure
) -> Tensor:
    values = measure.values(*_cleaned(student, teacher, mask, dim))
    return (values if mask is None else values * mask.to(values.dtype)).mean()


def _values(
    student: Tensor, teacher: Tensor, mask: Tensor | None, dim: int, measure: Measure
) -> Tensor:
    sums = []
    for part in _parts(student.shape, dim, block_size(student)):
        s, t, m = _cut(student, teacher, mask, dim, part)
        values, _ = measure.slopes(*_cleaned(s, t, m, dim))
        sums.append((values if m is None else values * m.to(values.dtype)).sum())
    return _sum(sums) * (measure.factor / _count(student, dim))


def _gradient(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    dim: int,
    measure: Measure,
    outer: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the mean, and its gradient times `outer` in the dtype of `student`."""
    count = _count(student, dim)
    factor: Tensor | float = measure.slope_factor / count
    if outer is not None:
        factor = factor * outer
    parts = list(_parts(student.shape, dim, block_size(student)))
    gradient = None if parts == [None] else torch.empty_like(student)
    sums = []
    for part in parts:
        s, t, m = _cut(student, teacher, mask, dim, part)
        values, slope = measure.slopes(*_cleaned(s, t, m, dim))
        if m is not None:
            weight = m.to(values.dtype)
            values, slope = values * weight, slope.mul_(weight.unsqueeze(dim))
        sums.append(values.sum())
        if gradient is None:
            gradient = slope.mul_(factor).to(student.dtype)
        else:
            torch.mul(slope, factor, out=gradient[part])
    assert gradient is not None
    return _sum(sums) * (measure.factor / count), gradient


def _scaled_(gradient: Tensor, factor: Tensor, dim: int) -> Tensor:
    """Times the factor, which itself is not rounded to half precision."""
    if gradient.dtype == factor.dtype:
        return gradient.mul_(factor)
    for part in _parts(gradient.shape, dim, block_size(gradient)):
        block = gradient if part is None else gradient[part]
        block.copy_(block.to(factor.dtype).mul_(factor))
    return gradient


def _cleaned(
    student: Tensor, teacher: Tensor, mask: Tensor | None, dim: int
) -> tuple[Tensor, Tensor]:
    """Both in the precision of the computation, and 0 where they do not count."""
    if mask is not None:
        # Padding may hold anything, NaN included, and 0·NaN is NaN, in the gradient too.
        left_out = (mask == 0).unsqueeze(dim)
        student = student.masked_fill(left_out, 0)
        if teacher.ndim == student.ndim:
            teacher = teacher.masked_fill(left_out, 0)
    student = at_least_float32(student)
    return student, teacher.to(student.dtype) if teacher.is_floating_point() else teacher


Part = tuple[slice, ...]


def _cut(
    student: Tensor, teacher: Tensor, mask: Tensor | None, dim: int, part: Part | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    if part is None:
        return student, teacher, mask
    examples = part[:dim] + part[dim + 1 :]
    other = teacher[part if teacher.ndim == student.ndim else examples]
    return student[part], other, None if mask is None else mask[examples]


def _parts(shape: torch.Size, dim: int, size: int) -> Iterator[Part | None]:
    """Slices that cut a tensor into parts of at most `size` elements, if one example is not more.

    The outermost dimensions are cut, whatever the place of `dim`, so nothing is transposed; None
    stands for all of it.
    """
    if math.prod(shape) <= size:
        yield None
        return
    along = next((d for d, length in enumerate(shape) if d != dim and length > 1), None)
    if along is None:
        yield None
        return
    step = max(1, size * shape[along] // math.prod(shape))
    for start in range(0, shape[along], step):
        length = min(step, shape[along] - start)
        inner = torch.Size([*shape[:along], length, *shape[along + 1 :]])
        for part in _parts(inner, dim, size):
            slices = list(part or [slice(None)] * len(shape))
            slices[along] = slice(start, start + length)
            yield tuple(slices)


def block_size(tensor: Tensor) -> int:
    """How many elements of ``tensor`` are looked at at a time."""
    return CPU_BLOCK if tensor.device.type == "cpu" else BLOCK


def _count(tensor: Tensor, dim: int) -> int:
    return math.prod(tensor.shape[:dim]) * math.prod(tensor.shape[dim + 1 :])


def _sum(sums: list[Tensor]) -> Tensor:
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()
