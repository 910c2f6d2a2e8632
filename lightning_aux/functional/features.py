"""Distances between the features (hidden states) of a student and a teacher."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import cosine_similarity

from .precision import at_least_float32


def feature_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of the squared differences over all elements.

    Args:
        student: features of any shape with the batch first, differentiated.
        teacher: features of the same shape; detached.
        mask: `(batch,)` or `(batch, length, …)`, the first dimensions of the features: bool or
            weights; None keeps all. What it leaves out may hold anything, and counts 0; the sum is
            divided by the number of ALL elements.

    Returns:
        A scalar: float64 for float64 features, else float32.

    Raises:
        ValueError: for different shapes, an empty batch, or a mask of another shape.
    """
    student, teacher = _pair(student, teacher)
    if mask is None:
        return (student - teacher).square().mean()
    student, teacher, weight = _masked(student, teacher, mask)
    return ((student - teacher).square() * weight).mean()


def feature_cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the batch of 1 − cos(s, t), the features of each example flattened to one vector.

    A vector of zeros has cosine 0 to everything and receives a finite gradient. Args and result as
    in `feature_mse`; weights of positions weigh their part of the inner products, those of examples
    their distance.

    Raises:
        ValueError: for different shapes, an empty batch, features of fewer than two dimensions, or
            a mask of another shape.
    """
    student, teacher = _pair(student, teacher)
    if student.ndim < 2:
        raise ValueError(
            f"feature_cosine needs features (batch, …), not the shape {tuple(student.shape)}"
        )
    counted: Tensor | None = None
    if mask is not None:
        student, teacher, weight = _masked(student, teacher, mask)
        counted = weight.flatten()
        if mask.ndim > 1:
            student, teacher = student * weight.sqrt(), teacher * weight.sqrt()
            counted = (weight.flatten(1).amax(1) > 0).to(student.dtype)
    distance = 1 - cosine_similarity(student.flatten(1), teacher.flatten(1), dim=1)
    return (distance if counted is None else distance * counted).mean()


FEATURE_DISTANCES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "mse": feature_mse,
    "cosine": feature_cosine,
}


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise ValueError(
            "student and teacher features must have the same shape, but are "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}; choose another layer or project"
        )
    if student.numel() == 0:
        raise ValueError(
            f"no features to compare: their shape is {tuple(student.shape)}; drop empty batches"
        )
    return at_least_float32(student), at_least_float32(teacher.detach())


def _masked(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both with 0 where they do not count, and the weights in a shape that broadcasts to them."""
    if not 0 < mask.ndim < student.ndim or mask.shape != student.shape[: mask.ndim]:
        raise ValueError(
            f"mask must have the first dimensions of the features {tuple(student.shape)}, not the "
            f"shape {tuple(mask.shape)}; channels have to stand behind the positions, where "
            f"movedim(1, -1) puts them"
        )
    weight = mask.detach().to(student.dtype).reshape(*mask.shape, *[1] * (student.ndim - mask.ndim))
    left_out = weight == 0  # which may hold NaN, and 0·NaN is NaN
    return student.masked_fill(left_out, 0), teacher.masked_fill(left_out, 0), weight
