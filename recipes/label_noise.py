"""Symmetric label noise: the corruption that the noisy-label recipes apply to training labels."""

import torch
from torch import Tensor


def flip_labels(labels: Tensor, fraction: float, num_classes: int, seed: int) -> Tensor:
    """Replace each label, with probability `fraction`, by another class drawn uniformly.

    A flipped label is always wrong, so the expected share of wrong labels is `fraction` itself.
    (The other convention draws from all classes and leaves a share of
    `fraction * (num_classes - 1) / num_classes` wrong.) Which labels flip depends on `seed` alone.

    Args:
        labels: Class indices, `(samples,)`, int64.
        fraction: Probability of a flip, in [0, 1].
        num_classes: Number of classes, at least 2.
        seed: Seed of the generator; the global random state is neither read nor moved.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        ValueError: When `fraction` is outside [0, 1].
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"label_noise is a probability in [0, 1], not {fraction}.")
    generator = torch.Generator().manual_seed(seed)
    flipped = torch.rand(labels.shape, generator=generator) < fraction
    offset = torch.randint(1, num_classes, labels.shape, generator=generator)
    return torch.where(flipped, (labels + offset) % num_classes, labels)
