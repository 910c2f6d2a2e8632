"""Means over examples, computed a block of examples at a time and together with their gradient.

Written out, a loss of `(batch, classes)` logits keeps a copy of the probabilities for each of its
operations. In blocks nothing of that size exists but the gradient, which is needed anyway, and what
is computed on the way stays in the cache. (What is not larger than a few blocks is one.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from .eager import is_eager
from .precision import HALF, at_least_float32

CPU_BLOCK = 2**18
"""Elements of a block on the CPU: in float32 a few of that size fit into its outer caches."""
CPU_WHOLE = 4
"""As many blocks on the CPU are still one: to divide costs another tensor for the gradient."""
CPU_SMALL = 2**14
"""Elements of a tensor on the CPU for which one call of Python in the backward pass is a cost."""
BLOCK = 2**24
"""Elements of a block elsewhere: enough for a GPU to forget that there are several."""


Slopes: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Measure(NamedTuple):
    """What is averaged: a number for each example, of one tensor with a gradient and one without.

    All functions take the two tensors in float32 or float64 and leave them as they are.

    Attributes:
        values: one number per example, by operations that autograd can follow twice.
        slopes: terms whose sum is that number, and its derivatives by the first tensor, without
            autograd. The terms have the shape of the examples, or one more dimension, that of the
            classes.
        factor: of the terms that `slopes` returns.
        slope_factor: of the derivatives that it returns.
        quick: `slopes` for numbers that need no care, such as finite ones. Its terms are NaN or
            infinite wherever it is not to be believed, and then `slopes` is asked too; only on the
            CPU, where looking at a value does not mean waiting for it. None instead of terms that
            will not be believed saves the rest.
        native: the sum of the values over `factor`, by few operations that autograd follows and
            none of which keeps the first tensor, which may be overwritten afterwards. For small
            tensors on the CPU, where a call of Python in the backward pass takes longer than all
            of them. NaN or infinite wherever it or its derivatives are not to be believed.
    """

    values: Callable[[Tensor, Tensor], Tensor]
    slopes: Slopes
    factor: float = 1.0
    slope_factor: float = 1.0
    quick: Callable[[Tensor, Tensor], tuple[Tensor, Tensor] | None] | None = None
    native: Callable[[Tensor, Tensor], Tensor] | None = None


def mean_over_examples(
    student: Tensor, teacher: Tensor, mask: Tensor | None, dim: int, measure: Measure
) -> Tensor:
    """Mean of the measure over ALL examples; those that the mask leaves out count 0.

    An example is one position without dimension `dim`. What is masked out may hold anything, NaN
    included. Memory beside the arguments: one tensor like `student` if it needs a gradient, and
    some blocks; as many tensors where it is not larger than `CPU_WHOLE` of them.

    Args:
        student: `(…, classes, …)`; the result can be differentiated by it, any number of times.
        teacher: the same shape, or class indices in the shape of the examples; no gradient.
        mask: the shape of the examples, or None.
        dim: the dimension of the classes, from 0.
        measure: what is averaged.

    Returns:
        A scalar: float64 for float64, else float32.
    """
    teacher = teacher.detach() if teacher.requires_grad else teacher
    mask = mask.detach() if mask is not None and mask.requires_grad else mask
    # A graph that is being compiled is fused anyway. A tensor that is transformed, or of another
    # class (spread over processes, say), knows operations but not this way of going through them.
    if type(student) not in (Tensor, Parameter) or not is_eager():
        return _plain(student, teacher, mask, dim, measure)
    if torch.is_grad_enabled() and student.requires_grad:
        if measure.native is not None and mask is None and _is_small(student):
            total = measure.native(student, _like(teacher, student))
            if math.isfinite(total.item()):
                return total * (measure.factor / _count(student, dim))
        mean: Tensor = _Blocks.apply(student, teacher, mask, dim, measure)  # type: ignore[no-untyped-call]
        return mean
    return _values(student, teacher, mask, dim, measure)


class _Blocks(torch.autograd.Function):
    """The derivatives are ready after the forward pass, the first backward pass scales them.

    In float16 they wait for the backward pass: what is too small for float16 would be lost before
    the factor of a loss scaler could save it.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor | None, dim: int, measure: Measure
    ) -> Tensor:
        ctx.save_for_backward(student, teacher, mask)
        ctx.rest = dim, measure, student.is_contiguous()
        ctx.slope = None
        if student.dtype == torch.float16:
            return _values(student, teacher, mask, dim, measure)
        mean, ctx.slope = _slope(student, teacher, mask, dim, measure)
        return mean

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        slope, ctx.slope = ctx.slope, None
        dim, measure, contiguous = ctx.rest
        if slope is not None and not torch.is_grad_enabled():
            return _scaled_(slope, outer, dim, measure, contiguous), None, None, None, None
        student, teacher, mask = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient is to be differentiated too
            mean = _plain(student, teacher, mask, dim, measure)
            (gradient,) = torch.autograd.grad(mean, student, outer, create_graph=True)
        elif student.dtype == torch.float16:
            _, gradient = _slope(student, teacher, mask, dim, measure, outer)
        else:  # of a graph that was retained: equal to the first to the last bit
            _, slope = _slope(student, teacher, mask, dim, measure)
            gradient = _scaled_(slope, outer, dim, measure, contiguous)
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
        total, _ = _of_block(*_cut(student, teacher, mask, dim, part), dim, measure)
        sums.append(total)
    return _sum(sums).mul_(measure.factor / _count(student, dim))


def _slope(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    dim: int,
    measure: Measure,
    outer: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the mean, and its derivatives in the dtype of `student`.

    In half precision these are multiplied by all factors, `outer` being one, before they are
    rounded; otherwise not yet, so that it happens once and for all.
    """
    factor: Tensor | float | None = None
    if student.dtype in HALF:
        factor = measure.slope_factor / _count(student, dim)
        factor = factor if outer is None else factor * outer
    size = block_size(student)
    if student.numel() <= (CPU_WHOLE * size if student.is_cpu else size):
        total, slope = _of_block(student, teacher, mask, dim, measure)
        slopes = slope if factor is None else torch.empty_like(student).copy_(slope.mul_(factor))
    else:
        slopes, sums = torch.empty_like(student), []
        for part in _parts(student.shape, dim, size):
            total, slope = _of_block(*_cut(student, teacher, mask, dim, part), dim, measure)
            sums.append(total)
            slopes[part] = slope if factor is None else slope.mul_(factor)
        total = _sum(sums)
    return total.mul_(measure.factor / _count(student, dim)), slopes


def _sum(totals: list[Tensor]) -> Tensor:
    return totals[0] if len(totals) == 1 else torch.stack(totals).sum()


def _of_block(
    student: Tensor, teacher: Tensor, mask: Tensor | None, dim: int, measure: Measure
) -> tuple[Tensor, Tensor]:
    """The sum over the examples that count, and slopes, 0 for those that do not."""
    student, teacher = _cleaned(student, teacher, mask, dim)
    weight = None if mask is None else mask.to(student.dtype)
    if measure.quick is not None and student.is_cpu:
        found = measure.quick(student, teacher)
        if found is not None:
            total, slope = _weighted(*found, weight, dim)
            if math.isfinite(total.item()):
                return total, slope
    return _weighted(*measure.slopes(student, teacher), weight, dim)


def _weighted(
    terms: Tensor, slope: Tensor, weight: Tensor | None, dim: int
) -> tuple[Tensor, Tensor]:
    if weight is None:
        return terms.sum(), slope
    values = terms.sum(dim) if terms.ndim == slope.ndim else terms
    return values.mul(weight).sum(), slope.mul_(weight.unsqueeze(dim))


def _scaled_(slope: Tensor, outer: Tensor, dim: int, measure: Measure, contiguous: bool) -> Tensor:
    """Times the factors of which `_slope` has not made use; they are not rounded."""
    if slope.dtype == outer.dtype:
        factor = measure.slope_factor / _count(slope, dim)
        scale = outer.item() * factor if outer.is_cpu else outer * factor
        if contiguous and not slope.is_contiguous():
            whole = torch.empty_like(slope, memory_format=torch.contiguous_format)
            return torch.mul(slope, scale, out=whole)
        return slope.mul_(scale)
    for part in _parts(slope.shape, dim, block_size(slope)):
        block = slope[part]
        block.copy_(block.to(outer.dtype).mul_(outer))
    return slope


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
    return student, _like(teacher, student)


def _like(teacher: Tensor, student: Tensor) -> Tensor:
    """In the same precision, if it is not class indices."""
    if teacher.dtype == student.dtype or not teacher.is_floating_point():
        return teacher
    return teacher.to(student.dtype)


Part = tuple[slice, ...]


def _cut(
    student: Tensor, teacher: Tensor, mask: Tensor | None, dim: int, part: Part
) -> tuple[Tensor, Tensor, Tensor | None]:
    examples = part[:dim] + part[dim + 1 :]
    other = teacher[part if teacher.ndim == student.ndim else examples]
    return student[part], other, None if mask is None else mask[examples]


def _parts(shape: torch.Size, dim: int, size: int) -> Iterator[Part]:
    """Slices that cut a tensor into parts of at most `size` elements, if one example is not more.

    The outermost dimensions are cut, whatever the place of `dim`, so nothing is transposed; no
    slice at all stands for all of it.
    """
    along = next((d for d, length in enumerate(shape) if d != dim and length > 1), None)
    if along is None or math.prod(shape) <= size:
        yield ()
        return
    step = max(1, size * shape[along] // math.prod(shape))
    for start in range(0, shape[along], step):
        length = min(step, shape[along] - start)
        inner = torch.Size([*shape[:along], length, *shape[along + 1 :]])
        for part in _parts(inner, dim, size):
            slices = list(part or [slice(None)] * len(shape))
            slices[along] = slice(start, start + length)
            yield tuple(slices)


def excludes(*logits: Tensor) -> bool:
    """Whether a −∞ is in one of some large tensors, where to try in vain would take long."""
    large = logits[0].numel() > CPU_SMALL
    return large and any(each.amin().item() == -math.inf for each in logits)


def squared_norm(tensor: Tensor) -> Tensor:
    """The sum of the squares of a small tensor, by the fewest steps of autograd."""
    flat = tensor.flatten()
    return flat.dot(flat)


def _is_small(tensor: Tensor) -> bool:
    """Whether it is on the CPU and small, and needs no other precision."""
    small = tensor.numel() <= CPU_SMALL
    return small and tensor.is_cpu and tensor.dtype not in HALF


def block_size(tensor: Tensor) -> int:
    """How many elements of ``tensor`` are looked at at a time."""
    return CPU_BLOCK if tensor.is_cpu else BLOCK


def _count(tensor: Tensor, dim: int) -> int:
    return tensor.numel() // tensor.shape[dim]
