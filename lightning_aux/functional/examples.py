"""Examples, their masks and their labels: what every formula of logits begins and ends with.

An example is one position of the logits without the class dimension: `(batch, classes)` has `batch`
examples, `(batch, length, classes)` has `batch * length`. Examples that a mask leaves out, or whose
label is `IGNORED`, count 0, and the mean is still over ALL examples. Their number is the same on
every process and in every accumulated batch, the number of those that count is not: only so does
the mean of the gradients of two half batches equal the gradient of the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .eager import is_eager
from .precision import at_least_float32

IGNORED = -100
"""The class index of an example without a label, as in torch's and Hugging Face's losses."""


def shape_of_examples(logits: Tensor, dim: int) -> list[int]:
    """The shape of `logits` without their class dimension, which index targets and masks have.

    Raises:
        ValueError: when they have no dimension `dim`.
    """
    if not -logits.ndim <= dim < logits.ndim:
        raise ValueError(f"logits of shape {tuple(logits.shape)} have no class dimension dim={dim}")
    shape = list(logits.shape)
    del shape[dim]
    return shape


def checked_dim(logits: Tensor, mask: Tensor | None, dim: int) -> int:
    """The class dimension counted from 0, if there are logits and the mask has the right shape.

    Raises:
        ValueError: otherwise.
    """
    examples = shape_of_examples(logits, dim)
    if logits.numel() == 0:
        raise ValueError(f"no examples to average over: the logits are {tuple(logits.shape)}")
    if mask is not None:
        checked_mask(mask, examples)
    return dim % logits.ndim


def checked_classes(logits: Tensor, mask: Tensor | None, dim: int) -> int:
    """The same for formulas of a softmax, which of one logit is 1 whatever the logit is.

    Raises:
        ValueError: as `checked_dim`, and for one class.
    """
    dim = checked_dim(logits, mask, dim)
    if logits.shape[dim] == 1:
        raise ValueError(
            f"there is one class in logits of shape {tuple(logits.shape)}, which has probability 1 "
            f"whatever its logit. A prediction of yes or no needs two here: (−z/2, z/2) for z."
        )
    return dim


def checked_mask(mask: Tensor, examples: list[int]) -> Tensor:
    """The mask, which has to have the shape of the examples.

    Raises:
        ValueError: it has another.
    """
    if list(mask.shape) != examples:
        raise ValueError(
            f"mask must have the shape of the examples {tuple(examples)} (the logits without their "
            f"class dimension), not {tuple(mask.shape)}"
        )
    return mask


def prepared(logits: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """The logits in float32 at least, and 0 where an example does not count.

    Padding may hold anything, NaN included, and 0·NaN is NaN, in the gradient too.

    Raises:
        ValueError: as `checked_dim`.
    """
    checked_dim(logits, mask, dim)
    if mask is not None:
        logits = logits.masked_fill((mask == 0).unsqueeze(dim), 0)
    return at_least_float32(logits)


def labelled(
    logits: Tensor, target: Tensor, mask: Tensor | None, dim: int
) -> tuple[Tensor, Tensor | None]:
    """The target, checked, and a mask that also leaves out examples without a label.

    Args:
        logits: `(batch, …, classes)`.
        target: class indices in the shape of the examples, where `IGNORED` stands for none; or
            probabilities in the shape of the logits.
        mask: the shape of the examples, or None.
        dim: class dimension.

    Returns:
        The target, in which every class index is valid, in int64; probabilities as they are. And
        the mask.

    Raises:
        ValueError: for a target of another shape, or one that is neither indices nor floats.
    """
    examples = shape_of_examples(logits, dim)
    if target.is_floating_point() and target.shape == logits.shape:
        return target, mask
    if target.is_floating_point() or target.dtype == torch.bool or list(target.shape) != examples:
        raise ValueError(
            f"the target must be class indices of shape {tuple(examples)}, or probabilities of "
            f"shape {tuple(logits.shape)}, but is {target.dtype} of shape {tuple(target.shape)}"
        )
    target = target.long()
    asks = mask is None and target.is_cpu and is_eager()
    if asks and target.numel() and int(target.min()) >= 0:
        return target, None  # asking is free on the CPU, and a mask costs one more pass
    known = target != IGNORED
    mask = known if mask is None else checked_mask(mask, examples) * known  # weights stay weights
    return target.masked_fill(mask == 0, 0), mask


def expected(values: Tensor, target: Tensor, dim: int) -> Tensor:
    """For each example Σ_c y_c·values_c, with y the target as `labelled` returns it."""
    if target.is_floating_point():  # 0·(−inf) = 0, in the gradient too
        return (target.to(values.dtype) * torch.where(target > 0, values, 0)).sum(dim)
    return values.gather(dim, target.unsqueeze(dim)).squeeze(dim)
