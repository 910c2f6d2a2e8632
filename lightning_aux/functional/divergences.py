"""Divergences between the predictions of a student and a teacher, and the entropy of one of them.

All are means over examples. An example is one position of the logits without the class dimension:
`(batch, classes)` has `batch` examples, `(batch, length, classes)` has `batch * length`.

A mask sets the contribution of the examples it leaves out to zero, and the sum is still divided by
the number of ALL examples. The number of examples is the same on every process and in every
accumulated batch, the number of masked ones is not: only so does the mean of the gradients of two
half batches equal the gradient of the whole batch.

With `binary=True` every logit is a prediction of its own with probability σ(z/T), the softmax over
the two logits (z, 0): the divergence is that of these two classes, summed over the labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from .blocks import Measure, excludes, mean_over_examples
from .examples import checked_classes, checked_dim
from .softmax import log_softmax, softmax


def kl_divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    dim: int = -1,
    binary: bool = False,
) -> Tensor:
    """Forward Kullback-Leibler divergence T²·KL(p‖q), the distillation loss.

    T² · mean over examples of Σ_c p_c log(p_c / q_c) with p = softmax(teacher/T) and
    q = softmax(student/T). The factor T² keeps the size of the gradient when T changes (Hinton,
    Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531,
    section 2 and eq. 2 to 4).

    Memory: beside the logits one tensor in the shape and dtype of the student's, which becomes its
    gradient, and blocks of a fixed size; without a gradient only these.

    Args:
        student: logits `(batch, …, classes)`, differentiated.
        teacher: logits of the same shape; detached.
        temperature: T, above 0.
        mask: the shape of the examples, bool or 0/1 weights; None keeps all. See the module for
            what it divides by.
        dim: class dimension; with `binary` that of the labels.
        binary: the logits are those of independent labels, `(batch, labels)`, or of one,
            `(batch, 1)` or `(batch,)`. For both KL divergences this is the divergence of the joint
            distribution of the labels.

    Returns:
        A scalar in nats: float64 for float64 logits, else float32. Logits may be −inf: a class of
        probability 0 under p contributes 0, one that only q excludes makes the divergence infinite.

    Raises:
        ValueError: for different shapes, no examples, a temperature that is not above 0, a class
            dimension that the logits do not have, or a mask that does not have the shape of the
            examples.
    """
    return _mean(_of_predictions(_kl, _kl_slopes), student, teacher, temperature, mask, dim, binary)


def reverse_kl_divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    dim: int = -1,
    binary: bool = False,
) -> Tensor:
    """Reverse Kullback-Leibler divergence T²·KL(q‖p), which seeks modes instead of covering them.

    T² · mean over examples of Σ_c q_c log(q_c / p_c); p, q, arguments, memory, result and errors as
    in `kl_divergence`.
    """
    measure = _of_predictions(_reverse_kl, _reverse_kl_slopes)
    return _mean(measure, student, teacher, temperature, mask, dim, binary)


def jensen_shannon_divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    dim: int = -1,
    binary: bool = False,
) -> Tensor:
    """Jensen-Shannon divergence T²·(½KL(p‖m) + ½KL(q‖m)) with m = (p + q)/2.

    It is symmetric and at most T²·log 2, also where one side excludes a class (Lin 1991,
    "Divergence Measures Based on the Shannon Entropy", IEEE Trans. Inf. Theory 37(1)).
    p, q, arguments, memory, result and errors as in `kl_divergence`.
    """
    measure = _of_predictions(_js, _js_slopes, part=0.5)
    return _mean(measure, student, teacher, temperature, mask, dim, binary)


def alpha_divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    dim: int = -1,
    binary: bool = False,
    alpha_min: float = -1.0,
    alpha_max: float = 1.0,
    clip: float = 5.0,
) -> Tensor:
    """Adaptive α-divergence T²·max(D_α₋(p‖q), D_α₊(p‖q)), the larger one in each example.

    D_α(p‖q) = 1/(α(α−1)) Σ_c q_c [(p_c/q_c)^α − 1]: a large α punishes a student that is too sure,
    a small one a student that is not sure enough. It is KL(p‖q) at α = 1 and KL(q‖p) at α = 0.

    Outside of 0 ≤ α ≤ 1 the gradient has no bound, and the importance weight in it is clipped:
    ∂D_α/∂q_c = −min((p_c/q_c)^α, clip)/α, as in the authors' code, which leaves α = 1 alone too.
    There the weights are constants of a surrogate loss; here the value is the one that has this
    gradient: beyond the border a class goes on linearly. That is again an f-divergence, at least 0
    and always finite. The choice between the two compares these values; the authors compare sums
    with clipped weights, which are smaller where something is clipped.

    Wang, Gong, Li, Liu and Chandra (2021), "AlphaNet: Improved Training of Supernets with
    Alpha-Divergence", arXiv:2102.07954, with `loss_ops.py` of facebookresearch/AlphaNet. The
    defaults are those of its configuration; the temperature, with the factor T² that every
    D_α shares for predictions close to each other, is an addition.

    Args:
        student: as in `kl_divergence`, as are teacher, temperature, mask, dim and binary.
        teacher: see above.
        temperature: see above.
        mask: see above.
        dim: see above.
        binary: see above; the larger one is chosen after the sum over the labels.
        alpha_min: α₋.
        alpha_max: α₊; equal to `alpha_min` for the divergence of a single α.
        clip: the largest importance weight, at least 1; `math.inf` for none.

    Raises:
        ValueError: as in `kl_divergence`, and for a clip below 1 or an α that is not finite.
    """
    if not clip >= 1:
        raise ValueError(f"clip must be at least 1, where student and teacher agree, not {clip}")
    for alpha in (alpha_min, alpha_max):
        if not math.isfinite(alpha):
            raise ValueError(f"alpha_min and alpha_max must be finite, not {alpha}")

    both = (alpha_min, alpha_max)

    def formula(log_q: Tensor, log_p: Tensor, classes: _Classes) -> Tensor:
        q, p = (_Logged(log_q, log_q.exp()), _Logged(log_p, log_p.exp()))
        low, high = (classes.total(_alpha_terms(q, p, each, clip)) for each in both)
        return torch.maximum(low, high)

    def slopes(
        log_q: Tensor, log_p: Tensor, classes: _Classes, careful: bool
    ) -> tuple[Tensor, Tensor]:
        q, p = (_Logged(log_q, log_q.exp()), _Logged(log_p, log_p.exp()))
        log_ratio = log_p - log_q
        (low, first), (high, second) = (
            _alpha_slopes(q, p, log_ratio, each, clip, classes, careful) for each in both
        )
        slope = torch.where(classes.spread(low > high), first, second)
        return torch.maximum(low, high), _through_softmax_(slope, q.exp, classes)[1]

    return _mean(_of_predictions(formula, slopes), student, teacher, temperature, mask, dim, binary)


def total_variation(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    dim: int = -1,
    binary: bool = False,
) -> Tensor:
    """Total variation distance T·½ Σ_c |p_c − q_c|, at most T.

    The factor is T, not T²: differences of probabilities shrink as 1/T, the terms of the other
    divergences as its square. Where p_c = q_c the derivative is that of 0. p, q, arguments, memory,
    result and errors as in `kl_divergence`.
    """
    measure = _of_predictions(_tv, _tv_slopes, power=1, part=0.5, logs=False)
    return _mean(measure, student, teacher, temperature, mask, dim, binary)


def logit_mse(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    dim: int = -1,
    binary: bool = False,
) -> Tensor:
    """Mean over examples and classes of the squared difference of the logits.

    The temperature cancels: T² times the mean of (s/T − t/T)² is that of (s − t)². For logits with
    mean zero T²·KL tends to half of it as T grows (Hinton et al. 2015, eq. 4). `binary` makes no
    difference. Logits that are −inf on both sides contribute 0. Arguments, memory, dtype of the
    result and errors as in `kl_divergence`.
    """
    return _mean(_mse, student, teacher, temperature, mask, dim, binary)


def logit_cosine(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    dim: int = -1,
    binary: bool = False,
) -> Tensor:
    """Mean over examples of 1 − cos(s, t), the logits of an example being one vector.

    A cosine knows no scale, so there is no temperature in it and no factor; `binary` makes no
    difference. A class that is −inf on both sides is left out; on one side it gives NaN. A vector
    of zeros has cosine 0 to everything, and the gradient that a vector of length 1 at a right angle
    would have. Arguments, memory, dtype of the result and errors as in `kl_divergence`.
    """
    return _mean(_cosine, student, teacher, temperature, mask, dim, binary)


def entropy(
    logits: Tensor, temperature: float = 1.0, mask: Tensor | None = None, dim: int = -1
) -> Tensor:
    """Entropy −Σ_c q_c log q_c of q = softmax(logits/T), mean over examples, in nats.

    Args, result and errors as in `kl_divergence`; there is no factor T².
    """
    _check_temperature(temperature)
    dim = checked_classes(logits, mask, dim)

    def values(logits: Tensor, _: Tensor) -> Tensor:
        log_q = log_softmax(logits / temperature, dim)
        return -_product(log_q.exp(), log_q).sum(dim)

    def slopes(logits: Tensor, _: Tensor, careful: bool = True) -> tuple[Tensor, Tensor]:
        log_q = log_softmax(logits if temperature == 1 else logits / temperature, dim)
        q = log_q.exp()
        terms = _product_(q, log_q, careful)
        total = terms.sum(dim, keepdim=True)
        return total, terms.sub_(q.mul_(total))

    def quick(logits: Tensor, same: Tensor) -> tuple[Tensor, Tensor] | None:
        return None if excludes(logits) else slopes(logits, same, careful=False)

    measure = Measure(values, slopes, -1.0, -1 / temperature, quick)
    return mean_over_examples(logits, logits, mask, dim, measure)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "kl": kl_divergence,
    "reverse_kl": reverse_kl_divergence,
    "js": jensen_shannon_divergence,
    "alpha": alpha_divergence,
    "tv": total_variation,
    "mse": logit_mse,
    "cosine": logit_cosine,
}


# What is measured in one block: made from the temperature, the class dimension, `binary`, and the
# number of classes.
_Make = Callable[[float, int, bool, int], Measure]


class _Classes(NamedTuple):
    """Where the classes of one distribution are, in a block of (log) probabilities."""

    dim: int  # of the classes; of the labels if they are binary, whose two classes are last
    binary: bool

    @property
    def axis(self) -> int:
        return -1 if self.binary else self.dim

    def terms(self, terms: Tensor) -> Tensor:
        """As `Measure.slopes` may return them."""
        return self.total(terms) if self.binary else terms

    def total(self, terms: Tensor) -> Tensor:
        """The sum over what belongs to one example."""
        each = terms.sum(self.axis)
        return each.sum(self.dim) if self.binary else each

    def spread(self, examples: Tensor) -> Tensor:
        """One number per example, in a shape that broadcasts to the terms."""
        each = examples.unsqueeze(self.dim)
        return each.unsqueeze(-1) if self.binary else each


def _mean(
    make: _Make,
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    mask: Tensor | None,
    dim: int,
    binary: bool,
) -> Tensor:
    if student.shape != teacher.shape:
        raise ValueError(
            "student and teacher logits must have the same shape, but are "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    _check_temperature(temperature)
    if binary and student.ndim == 1:
        student, teacher = student.unsqueeze(-1), teacher.unsqueeze(-1)
    dim = checked_dim(student, mask, dim)
    measure = make(temperature, dim, binary, student.shape[dim])
    return mean_over_examples(student, teacher, mask, dim, measure)


def _check_temperature(temperature: float) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be finite and above 0, not {temperature}")


def _of_predictions(
    formula: Callable[[Tensor, Tensor, _Classes], Tensor],
    slopes: Callable[[Tensor, Tensor, _Classes, bool], tuple[Tensor, Tensor]],
    power: int = 2,
    part: float = 1.0,
    logs: bool = True,
) -> _Make:
    """A divergence of q and p with the factor T to the `power`.

    `formula` gives the value of each example from log q and log p; `slopes` the same over `part`,
    and their derivatives by the logits of q over `part`, and may overwrite log q and log p. Unless
    it is to be careful, the values may be NaN or infinite where a log is. Without `logs` both get
    q and p.
    """

    def make(temperature: float, dim: int, binary: bool, width: int) -> Measure:
        if width == 1 and not binary:
            raise ValueError(
                "there is one class, which has probability 1 whatever its logit: compare the "
                "values themselves (divergence 'mse'), or say binary=True where each logit is a "
                "prediction of its own"
            )
        factor, classes = temperature**power, _Classes(dim, binary)

        def soften(logits: Tensor) -> Tensor:
            if temperature != 1:
                logits = logits / temperature
            if binary:
                one = logsigmoid if logs else torch.sigmoid
                return torch.stack([one(logits), one(-logits)], -1)
            return log_softmax(logits, dim) if logs else softmax(logits, dim)

        def values(student: Tensor, teacher: Tensor) -> Tensor:
            return factor * formula(soften(student), soften(teacher), classes)

        def in_closed_form(
            student: Tensor, teacher: Tensor, careful: bool = True
        ) -> tuple[Tensor, Tensor]:
            terms, slope = slopes(soften(student), soften(teacher), classes, careful)
            return terms, slope[..., 0].contiguous() if binary else slope

        def quick(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor] | None:
            if excludes(student, teacher):
                return None
            return in_closed_form(student, teacher, careful=False)

        return Measure(
            values,
            in_closed_form,
            part * factor,
            part * factor / temperature,
            quick if logs else None,
        )

    return make


def _product(p: Tensor, values: Tensor) -> Tensor:
    """p·values with 0·(±inf) = 0, in the gradient too."""
    return p * torch.where(p > 0, values, 0)


def _product_(p: Tensor, values: Tensor, careful: bool) -> Tensor:
    """The same without autograd, or p·values; `values` may be overwritten."""
    return (torch.where(p > 0, values, 0) if careful else values).mul_(p)


def _through_softmax_(slope: Tensor, q: Tensor, classes: _Classes) -> tuple[Tensor, Tensor]:
    """From q·∂/∂q to the derivative by the logits; returns the sum of the first, and the latter."""
    total = slope.sum(classes.axis, keepdim=True)
    return classes.terms(total), slope.sub_(q.mul_(total))


def _kl(log_q: Tensor, log_p: Tensor, classes: _Classes) -> Tensor:
    return classes.total(_product(log_p.exp(), log_p - log_q))


def _kl_slopes(
    log_q: Tensor, log_p: Tensor, classes: _Classes, careful: bool
) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    terms = classes.terms(_product_(p, log_p.sub_(log_q), careful))
    return terms, log_q.exp_().sub_(p)


def _reverse_kl(log_q: Tensor, log_p: Tensor, classes: _Classes) -> Tensor:
    return _kl(log_p, log_q, classes)


def _reverse_kl_slopes(
    log_q: Tensor, log_p: Tensor, classes: _Classes, careful: bool
) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    return _through_softmax_(_product_(q, log_q.sub_(log_p), careful), q, classes)


def _js(log_q: Tensor, log_p: Tensor, classes: _Classes) -> Tensor:
    # The gradient of logaddexp at (−inf, −inf) is NaN, so classes that both exclude step aside.
    excluded = torch.isneginf(log_p) & torch.isneginf(log_q)
    log_m = torch.logaddexp(log_p.masked_fill(excluded, 0), log_q.masked_fill(excluded, 0))
    log_m = log_m - math.log(2)
    return (_kl(log_m, log_p, classes) + _kl(log_m, log_q, classes)) / 2


def _js_slopes(
    log_q: Tensor, log_p: Tensor, classes: _Classes, careful: bool
) -> tuple[Tensor, Tensor]:
    q, p = log_q.exp(), log_p.exp()
    log_m = (q + p).log_().sub_(math.log(2))
    of_p = _product_(p, log_p.sub_(log_m), careful)
    of_q = _product_(q, log_q.sub_(log_m), careful)
    terms = classes.terms(of_p.add_(of_q))
    return terms, _through_softmax_(of_q, q, classes)[1]


def _tv(q: Tensor, p: Tensor, classes: _Classes) -> Tensor:
    return classes.total((q - p).abs()) / 2


def _tv_slopes(q: Tensor, p: Tensor, classes: _Classes, careful: bool) -> tuple[Tensor, Tensor]:
    difference = q - p
    terms = classes.terms(torch.abs(difference, out=p))
    return terms, _through_softmax_(difference.sign_().mul_(q), q, classes)[1]


class _Logged(NamedTuple):
    """Probabilities with their logarithms."""

    log: Tensor
    exp: Tensor


def _alpha_terms(q: _Logged, p: _Logged, alpha: float, clip: float) -> Tensor:
    if alpha in (0, 1):
        a, b = (p, q) if alpha else (q, p)
        return _product(a.exp, a.log - b.log)
    # D_α(p‖q) = D_{1−α}(q‖p): the exponent of at most ½ loses no digits near α = 0 and 1.
    a, b, power = (q, p, alpha) if alpha < 0.5 else (p, q, 1 - alpha)
    log_ratio = torch.where(a.exp > 0, b.log - a.log, 0)
    if power >= 0 or clip == math.inf:
        return a.exp * torch.expm1(power * log_ratio) / (alpha * (alpha - 1))
    border = math.log(clip) / abs(alpha)  # where (p/q)^α = clip
    until = a.exp * torch.expm1(power * log_ratio.clamp_min(-border)) / (alpha * (alpha - 1))
    if alpha < 0:  # a = q is too large for b = p
        return until + clip / (1 - alpha) * relu(a.exp - (b.log + border).exp())
    return until + clip / alpha * relu((a.log - border).exp() - b.exp)


def _alpha_slopes(
    q: _Logged,
    p: _Logged,
    log_ratio: Tensor,
    alpha: float,
    clip: float,
    classes: _Classes,
    careful: bool,
) -> tuple[Tensor, Tensor]:
    """The value of each example, and q·∂D_α/∂q up to a multiple of q, which a softmax ignores."""
    weight = p.exp if alpha >= 0.5 else q.exp
    kept = torch.where(weight > 0, log_ratio, 0) if careful else log_ratio.clone()
    if alpha == 1:
        return classes.total(kept.mul_(weight)), p.exp.neg()
    if alpha == 0:
        terms = kept.mul_(weight).neg_()
        return classes.total(terms), terms
    clipped = clip < math.inf and not 0 <= alpha <= 1
    border = math.log(clip) / abs(alpha) if clipped else math.inf  # where (p/q)^α = clip
    if alpha < 0.5:  # −q·((p/q)^α − 1)/α
        if clipped:
            kept.clamp_min_(-border)
        excess = kept.mul_(alpha).expm1_().mul_(q.exp)
        value, slope = classes.total(excess), excess.div(-alpha)
        beyond = q.exp - (p.log + border).exp_() if clipped else None
    else:  # −q·(p/q)^α/α
        if clipped:
            kept.clamp_max_(border)
        excess = kept.mul_(alpha - 1).expm1_().mul_(p.exp)
        value, slope = classes.total(excess), excess.add_(p.exp)
        slope = (torch.minimum(slope, q.exp * clip) if clipped else slope).div_(-alpha)
        beyond = (p.log - border).exp_().sub_(q.exp) if clipped else None
    value = value / (alpha * (alpha - 1))
    if beyond is not None:  # a line from the border on
        value = value + clip / max(alpha, 1 - alpha) * classes.total(beyond.relu_())
    return value, slope


def _mse(temperature: float, dim: int, binary: bool, classes: int) -> Measure:
    def finite(logits: Tensor) -> Tensor:  # −inf − (−inf) would be NaN
        return logits.clamp_min(torch.finfo(logits.dtype).min)

    def values(student: Tensor, teacher: Tensor) -> Tensor:
        return (finite(student) - finite(teacher)).square().mean(dim)

    def quick(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        d = student - teacher
        return torch.linalg.vector_norm(d, dim=dim).square_(), d

    def slopes(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return quick(finite(student), finite(teacher))

    return Measure(values, slopes, 1 / classes, 2 / classes, quick)


def _cosine(temperature: float, dim: int, binary: bool, classes: int) -> Measure:
    def cleaned(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        excluded = torch.isneginf(student) & torch.isneginf(teacher)
        return student.masked_fill(excluded, 0), teacher.masked_fill(excluded, 0)

    def norm(vectors: Tensor, ask: bool = False) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
        if ask and length.amin().item() > 0:
            return length
        return length.masked_fill(length == 0, 1)

    def values(student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = cleaned(student, teacher)
        return 1 - (student / norm(student) * (teacher / norm(teacher))).sum(dim)

    def quick(student: Tensor, teacher: Tensor, ask: bool = True) -> tuple[Tensor, Tensor]:
        length = norm(student, ask)
        s, t = student / length, teacher / norm(teacher, ask)
        cosine = (s * t).sum(dim, keepdim=True)
        return 1 - cosine, s.mul_(cosine).sub_(t).div_(length)

    def slopes(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return quick(*cleaned(student, teacher), ask=False)

    return Measure(values, slopes, quick=quick)
