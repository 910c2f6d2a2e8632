"""Distances between the features (hidden states) of a student and a teacher."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import cosine_similarity

from .precision import at_least_float32


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of the squared differences over all elements.

    Args:
        student: features of any shape with the batch first, differentiated.
        teacher: features of the same shape; detached.

    Returns:
        A scalar: float64 for float64 features, else float32.

    Raises:
        ValueError: for different shapes or an empty batch.
    """
    student, teacher = _pair(student, teacher)
    return (student - teacher).square().mean()


def feature_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the batch of 1 − cos(s, t), the features of each example flattened to one vector.

    A vector of zeros has cosine 0 to everything and receives a finite gradient. Args and result as
    in `feature_mse`.

    Raises:
        ValueError: for different shapes, an empty batch, or features of fewer than two dimensions.
    """
    student, teacher = _pair(student, teacher)
    if student.ndim < 2:
        raise ValueError(
            f"feature_cosine needs features (batch, …), not the shape {tuple(student.shape)}"
        )
    return (1 - cosine_similarity(student.flatten(1), teacher.flatten(1), dim=1)).mean()


FEATURE_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
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
