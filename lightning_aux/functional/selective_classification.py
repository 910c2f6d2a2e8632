"""How well a confidence score tells right predictions from wrong ones.

A selective classifier answers where its confidence is highest and abstains elsewhere. At coverage
k/n it answers the k most confident of n examples, and its risk is the share of errors among them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .precision import at_least_float32

__all__ = [
    "area_under_risk_coverage",
    "coverage_at_risk",
    "max_softmax_score",
    "normalized_max_logit",
    "risk_at_coverage",
    "risk_coverage_curve",
]


def max_softmax_score(logits: Tensor, dim: int = -1) -> Tensor:
    """The log-odds log(p / (1 − p)) of the maximum softmax probability p, which rank as p does.

    p itself rounds to 1 in float32 for a margin of 17 between the logits, which makes ties of the
    most confident examples; these differ as long as the logits do. ``score.sigmoid()`` is p.

    Args:
        logits: z, `(batch, …, classes)`, at least two classes.
        dim: class dimension.

    Returns:
        The shape of the examples: float64 for float64 logits, else float32.

    Raises:
        ValueError: for fewer than two classes.
    """
    z = _at_least_two_classes(logits, dim)
    top, where = z.max(dim, keepdim=True)
    others = z.scatter(dim, where, -math.inf).logsumexp(dim)
    return top.squeeze(dim) - others


def normalized_max_logit(
    logits: Tensor, p: float = 4.0, centre: bool = False, dim: int = -1
) -> Tensor:
    """max_k z_k / ‖z‖_p, which ranks well where label smoothing has spoilt the softmax.

    Xia et al. 2025, "Towards Understanding Why Label Smoothing Degrades Selective Classification
    and How to Fix It", arXiv:2403.14715; Cattelan & Silva 2024, "How to Fix a Broken Confidence
    Estimator", arXiv:2305.15508, with the logits centred: z − mean(z). Softmax does not change when
    a constant is added to all logits; this score does, unless they are centred.

    Args:
        logits: z, `(batch, …, classes)`, at least two classes; three where they are centred.
        p: of the norm, above 0; ``inf`` too.
        centre: whether the mean over classes is subtracted first.
        dim: class dimension.

    Returns:
        The shape of the examples, 0 where all logits are 0: float64 for float64 logits, else
        float32.

    Raises:
        ValueError: for p ≤ 0, or too few classes: of two centred logits the score is a constant.
    """
    if not p > 0:
        raise ValueError(f"p={p} is no norm: it must be above 0")
    z = _at_least_two_classes(logits, dim)
    if centre:
        if z.shape[dim] == 2:
            raise ValueError(
                "two centred logits are (a, −a), whose normalised maximum is the same for every "
                "example. Leave centre=True out."
            )
        z = z - z.mean(dim, keepdim=True)
    tiny = torch.finfo(z.dtype).tiny
    z = z / z.abs().amax(dim, keepdim=True).clamp_min(tiny)  # so that no power overflows
    score: Tensor = z.amax(dim) / torch.linalg.vector_norm(z, p, dim).clamp_min(tiny)
    return score


def risk_coverage_curve(confidence: Tensor, error: Tensor) -> Tensor:
    """The risk at the coverages 1/n, 2/n, …, 1, examples of equal confidence in random order.

    The risk at a coverage that ends among equals is its mean over all orders of them, so it does
    not depend on the order of the examples.

    Args:
        confidence: ``(n,)``, any scale.
        error: ``(n,)``, 1 for a wrong prediction and 0 for a right one.

    Returns:
        ``(n,)`` float64; NaN if a confidence is.
    """
    ranked, order = confidence.sort(descending=True)
    wrong = error[order].double()
    group = ranked.diff(prepend=ranked[:1]).ne(0).cumsum(0)
    size = group.bincount()
    among_equals = group.bincount(wrong) / size
    taken = torch.arange(1, len(wrong) + 1, device=wrong.device)
    risks = among_equals[group].cumsum(0) / taken
    return torch.where(confidence.isnan().any(), math.nan, risks)


def area_under_risk_coverage(confidence: Tensor, error: Tensor) -> Tensor:
    """AURC = (1/n) Σ_k risk_k over k = 1 … n: lower is better.

    The mean of Geifman, Uziel & El-Yaniv 2019, "Bias-Reduced Uncertainty Estimation for Deep Neural
    Classifiers", arXiv:1805.08206. Others add the point (0, 0) and take trapezoids, which is
    another number. With `area_under_risk_coverage(-error, error)`, that of a perfect order of the
    same predictions, subtracted it is E-AURC.

    Args:
        confidence: ``(n,)``, any scale.
        error: ``(n,)``, 1 for a wrong prediction and 0 for a right one.

    Returns:
        A float64 scalar, NaN for no examples.
    """
    return risk_coverage_curve(confidence, error).mean()


def coverage_at_risk(risks: Tensor, risk: float) -> Tensor:
    """The largest coverage whose risk is at most ``risk``; 0 if there is none.

    Args:
        risks: ``(n,)``, from `risk_coverage_curve`.
        risk: between 0 and 1.
    """
    within = (risks <= risk + 1e-12).nonzero()
    last = within[-1, 0] + 1 if len(within) else risks.new_zeros((), dtype=torch.long)
    return last.double() / len(risks)


def risk_at_coverage(risks: Tensor, coverage: float) -> Tensor:
    """The risk where at least the share ``coverage`` of the examples is answered.

    Args:
        risks: ``(n,)``, from `risk_coverage_curve`.
        coverage: above 0, at most 1.
    """
    return risks[max(math.ceil(coverage * len(risks) - 1e-9), 1) - 1]


def _at_least_two_classes(logits: Tensor, dim: int) -> Tensor:
    if not -logits.ndim <= dim < logits.ndim or logits.shape[dim] < 2:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} have no two classes in dimension {dim}. One "
            f"logit z of a binary classifier is the pair (0, z)."
        )
    return at_least_float32(logits)
