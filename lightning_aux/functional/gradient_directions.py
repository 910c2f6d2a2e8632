"""How much the gradients of mini-batches agree in direction, with each other and with the full one.

Liu, Xu, Jin, Shen and Darrell 2023, "Dropout Reduces Underfitting", arXiv:2303.01500, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor


def direction_variance(gradients: Tensor) -> Tensor:
    """Gradient direction variance: the mean over all pairs of ``(1 − cos(gᵢ, gⱼ)) / 2``.

    Args:
        gradients: ``(n, d)``, n at least 2, one flat gradient per mini-batch.

    Returns:
        A scalar in [0, 1]: 0 for gradients that all point the same way.
    """
    unit = torch.nn.functional.normalize(gradients.float(), dim=1)
    return variance_of_sum(unit.sum(0).square().sum(), len(unit))


def direction_error(gradients: Tensor, full: Tensor) -> Tensor:
    """Gradient direction error: the mean over mini-batches of ``(1 − cos(gᵢ, ĝ)) / 2``.

    Args:
        gradients: ``(n, d)``, one flat gradient per mini-batch.
        full: ``(d,)``, the gradient of all data.

    Returns:
        A scalar in [0, 1].
    """
    cosines = torch.nn.functional.cosine_similarity(gradients.float(), full.float()[None], dim=1)
    return (1 - cosines.mean()) / 2


def variance_of_sum(squared: Tensor, count: int) -> Tensor:
    """`direction_variance` from the squared norm of the sum of ``count`` unit gradients.

    ‖Σ uᵢ‖² = n + Σ over pairs i ≠ j of cos(gᵢ, gⱼ): no gradient has to be kept.
    """
    cosine = (squared - count) / (count * (count - 1))
    return (1 - cosine) / 2
