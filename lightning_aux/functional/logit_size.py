"""Terms that keep logits from growing: spectral decoupling and the z-loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import Measure, mean_over_examples, squared_norm
from .eager import is_eager
from .examples import checked_dim, labelled
from .softmax import softmax

__all__ = ["spectral_decoupling", "z_loss"]


def spectral_decoupling(
    logits: Tensor,
    offset: float | Sequence[float] | Tensor = 0.0,
    target: Tensor | None = None,
    mask: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """Mean over examples of ½ Σ_k (z_k − γ)², an L2 penalty of what the model says.

    Pezeshki et al. 2021, "Gradient Starvation: A Learning Proclivity in Neural Networks",
    arXiv:2011.09468: λ/2 · ‖ŷ‖² in place of weight decay, with an offset γ_y for the examples of
    class y in the experiment with two classes of different size. The paper has one margin logit
    per example; the sum over classes is the same norm of several. The authors' code multiplies the
    mean square by its coefficient without the ½.

    Args:
        logits: z, `(batch, …, classes)`, `(batch, …, 1)` for one margin; differentiated.
        offset: γ: one number for all examples, or one for each class of the target, best as a
            tensor on the device of the logits.
        target: class indices, for an offset per class only.
        mask: the shape of the examples, bool or weights; None keeps all. The sum is divided by the
            number of ALL examples.
        dim: class dimension.

    Returns:
        A scalar, at least 0: float64 for float64 logits, else float32.

    Raises:
        ValueError: for no examples, a missing dimension, a mask or target of another shape, or an
            offset per class without a target.
    """
    dim = checked_dim(logits, mask, dim)
    counted, other = mask, logits
    gamma: float | Tensor  # one for all examples, or one for each class
    if isinstance(offset, int | float):
        gamma = offset
    else:
        if target is None:
            raise ValueError("an offset per class needs a target")
        if logits.shape[dim] > 1 and len(offset) != logits.shape[dim]:
            raise ValueError(f"{len(offset)} offsets for {logits.shape[dim]} classes")
        if target.is_floating_point():
            raise ValueError("an offset per class needs class indices, not probabilities")
        other, counted = labelled(logits, target, mask, dim)

        wide = torch.promote_types(logits.dtype, torch.float32)
        gamma = torch.as_tensor(offset, dtype=wide, device=logits.device).detach()
        asks = logits.is_cpu and is_eager()
        if asks and int(other.max()) >= len(gamma):
            raise ValueError(f"{len(gamma)} offsets, but the target has class {int(other.max())}")

    def away(z: Tensor, y: Tensor) -> Tensor:
        return z - (gamma[y].unsqueeze(dim) if isinstance(gamma, Tensor) else gamma)

    def values(z: Tensor, y: Tensor) -> Tensor:
        return away(z, y).square().sum(dim) / 2

    def slopes(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        slope = away(z, y)
        return slope.square(), slope

    def native(z: Tensor, y: Tensor) -> Tensor:
        return squared_norm(away(z, y))

    measure = Measure(values, slopes, factor=0.5, native=native)
    return mean_over_examples(logits, other, counted, dim, measure)


def z_loss(logits: Tensor, mask: Tensor | None = None, dim: int = -1) -> Tensor:
    """Mean over examples of (log Σ_k exp z_k)², which keeps the normaliser of softmax near 1.

    The auxiliary loss of Chowdhery et al. 2022, "PaLM", arXiv:2204.02311, section 5 (coefficient
    1e-4), against the logit divergence that Wortsman et al. 2023, "Small-scale proxies for
    large-scale Transformer training instabilities", arXiv:2309.14322, study. The gradient is
    2 · log Z · softmax(z).

    Args:
        logits: z, `(batch, …, classes)`, differentiated.
        mask: the shape of the examples, bool or weights; None keeps all. The sum is divided by the
            number of ALL examples.
        dim: class dimension.

    Returns:
        A scalar, at least 0: float64 for float64 logits, else float32. Not finite for a logit of
        +∞, or an example of nothing but −∞.

    Raises:
        ValueError: for no examples, a missing dimension, or a mask of another shape.
    """
    dim = checked_dim(logits, mask, dim)

    def values(z: Tensor, _: Tensor) -> Tensor:
        return torch.logsumexp(z, dim).square()

    def slopes(z: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        q = softmax(z, dim)
        # The largest logit minus the log of its probability, at least 1/K.
        log_z = z.amax(dim, keepdim=True).sub_(q.amax(dim, keepdim=True).log_())
        return log_z.square(), q.mul_(log_z)

    def native(z: Tensor, _: Tensor) -> Tensor:
        log_z = z.exp().sum(dim).log()
        total = squared_norm(log_z)
        # The derivatives are divided by the sum, and by its square.
        if total.item() > 35**2:
            largest = torch.linalg.vector_norm(log_z.detach(), math.inf)
            if largest.item() > 35:
                return total.detach().fill_(math.nan)
        return total

    measure = Measure(values, slopes, slope_factor=2.0, native=native)
    return mean_over_examples(logits, logits, mask, dim, measure)
