"""Divergences equal their definitions, stay finite, and average over all examples."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import quad
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr, softmax
from torch import Tensor

from lightning_aux.functional import (
    DIVERGENCES,
    alpha_divergence,
    entropy,
    jensen_shannon_divergence,
    kl_divergence,
    logit_cosine,
    logit_mse,
    reverse_kl_divergence,
    total_variation,
)

NAMES = list(DIVERGENCES)
OF_PREDICTIONS = [name for name in NAMES if name not in ("mse", "cosine")]

LOOPS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], float]] = {
    "kl": lambda p, q, t, s: rel_entr(p, q).sum(),
    "reverse_kl": lambda p, q, t, s: rel_entr(q, p).sum(),
    "js": lambda p, q, t, s: jensenshannon(p, q) ** 2,
    # Logits below are so close that nothing is clipped: q/p < 5.
    "alpha": lambda p, q, t, s: max(rel_entr(p, q).sum(), ((q**2 / p).sum() - 1) / 2),
    "tv": lambda p, q, t, s: max(
        abs(sum(p[c] - q[c] for c in range(len(p)) if mask >> c & 1)) for mask in range(2 ** len(p))
    ),
    "mse": lambda p, q, t, s: ((t - s) ** 2).mean(),
    "cosine": lambda p, q, t, s: 1 - t @ s / (t @ t) ** 0.5 / (s @ s) ** 0.5,
}
"""One example, from its probabilities and its logits; total variation by the worst event."""

POWERS = {"tv": 1, "mse": 0, "cosine": 0}
"""Exponent of the temperature that multiplies the divergence; 2 for those that are not here."""


def logits(*shape: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, *shape, generator=generator, dtype=torch.float64) * scale
    return pair[0].requires_grad_(), pair[1]


def f_kl_div(p_logits: Tensor, q_logits: Tensor, temperature: float) -> Tensor:
    """T²·KL(p‖q) by torch's own function, which is told to average over examples, not classes."""
    classes = p_logits.shape[-1]
    log_q = F.log_softmax(q_logits.reshape(-1, classes) / temperature, -1)
    log_p = F.log_softmax(p_logits.reshape(-1, classes) / temperature, -1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(8, 2), (8, 17), (8, 1000), (4, 5, 17)])
def test_f30_kl_is_the_batch_mean_of_torch(shape: tuple[int, ...], temperature: float) -> None:
    student, teacher = logits(*shape)
    torch.testing.assert_close(
        kl_divergence(student, teacher, temperature), f_kl_div(teacher, student, temperature)
    )
    torch.testing.assert_close(
        reverse_kl_divergence(student, teacher, temperature),
        f_kl_div(student, teacher, temperature),
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(8, 2), (8, 17), (4, 5, 17)])
def test_jensen_shannon_is_the_mean_divergence_to_the_middle(
    shape: tuple[int, ...], temperature: float
) -> None:
    student, teacher = logits(*shape)
    p, q = (F.softmax(z / temperature, -1) for z in (teacher, student))
    m = (p + q) / 2
    expected = (p * (p / m).log() + q * (q / m).log()).sum(-1).mean() / 2 * temperature**2
    result = jensen_shannon_divergence(student, teacher, temperature)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(result, jensen_shannon_divergence(teacher, student, temperature))
    assert result <= temperature**2 * math.log(2)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(("shape", "dim"), [((5, 7), -1), ((2, 3, 7), -1), ((2, 7, 3, 2), 1)])
@pytest.mark.parametrize("name", NAMES)
def test_every_divergence_is_the_mean_of_a_loop_over_the_examples(
    name: str, shape: tuple[int, ...], dim: int, temperature: float
) -> None:
    student, teacher = logits(*shape, scale=0.5)
    mask = (
        torch.rand(student.select(dim, 0).shape, generator=torch.Generator().manual_seed(1)) < 0.7
    )
    rows = [z.detach().movedim(dim, -1).reshape(-1, 7).numpy() for z in (student, teacher)]
    expected = 0.0
    for s, t, kept in zip(*rows, mask.flatten().tolist(), strict=True):
        p, q = softmax(t / temperature), softmax(s / temperature)
        expected += kept * LOOPS[name](p, q, t, s) * temperature ** POWERS.get(name, 2)
    result = DIVERGENCES[name](student, teacher, temperature, mask, dim)
    assert result.item() == pytest.approx(expected / mask.numel(), rel=1e-10)


def test_entropy_is_that_of_torch_distributions() -> None:
    student, _ = logits(4, 5, 17)
    expected = torch.distributions.Categorical(logits=student / 3).entropy().mean()
    torch.testing.assert_close(entropy(student, temperature=3), expected)
    uniform = entropy(torch.zeros(2, 10, dtype=torch.float64))
    torch.testing.assert_close(uniform, torch.tensor(math.log(10), dtype=torch.float64))


def test_two_classes_have_the_closed_form() -> None:
    student = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)  # q = (3/4, 1/4)
    teacher = torch.zeros(1, 2, dtype=torch.float64)  # p = (1/2, 1/2)
    assert kl_divergence(student, teacher).item() == pytest.approx(math.log(4 / 3) / 2)
    reverse = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert reverse_kl_divergence(student, teacher).item() == pytest.approx(reverse)


@pytest.mark.parametrize("name", NAMES)
def test_equal_predictions_have_divergence_zero_and_no_gradient(name: str) -> None:
    student, _ = logits(4, 9)
    # The first four do not see a constant; of the others two are of logits, and the gradient of
    # total variation does not shrink with the difference.
    shift = 3.0 if name in ("kl", "reverse_kl", "js", "alpha") else 0.0
    divergence = DIVERGENCES[name](student, student.detach() + shift)
    (gradient,) = torch.autograd.grad(divergence, student)
    assert divergence.item() == pytest.approx(0, abs=1e-15)
    assert gradient.abs().max() < 1e-15


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    student, teacher = logits(3, 2, 5)
    mask = torch.tensor([[1, 0], [1, 1], [0, 1]], dtype=torch.bool)
    divergence = DIVERGENCES[name]
    assert torch.autograd.gradcheck(lambda s: divergence(s, teacher, 2.0), (student,))
    assert torch.autograd.gradcheck(lambda s: divergence(s, teacher, 2.0, mask), (student,))
    assert torch.autograd.gradcheck(lambda s: entropy(s, 2.0, mask), (student,))


def test_the_gradient_of_kl_is_the_difference_of_the_predictions() -> None:
    student, teacher = logits(6, 7)
    (gradient,) = torch.autograd.grad(kl_divergence(student, teacher, 2.0), student)
    expected = 2.0 * (F.softmax(student / 2, -1) - F.softmax(teacher / 2, -1)) / 6
    torch.testing.assert_close(gradient, expected.detach())


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    student, teacher = logits(3, 5)
    teacher.requires_grad_()
    DIVERGENCES[name](student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_can_be_differentiated_again(name: str) -> None:
    student, teacher = logits(3, 2, 4)
    mask = torch.tensor([[1, 0], [1, 1], [0, 1]], dtype=torch.bool)
    divergence = DIVERGENCES[name]
    assert torch.autograd.gradgradcheck(lambda s: divergence(s, teacher, 2.0, mask), (student,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_two_backwards_of_one_graph_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    """The factor is one that rounds."""
    student, teacher = (each.detach().to(dtype) for each in logits(64, 10))
    student.requires_grad_()
    loss = 0.3 * DIVERGENCES[name](student, teacher)
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert first.any()


@pytest.mark.parametrize("name", NAMES)
def test_f30_the_gradient_keeps_its_size_when_the_temperature_changes(name: str) -> None:
    student, teacher = logits(16, 10)
    norms = []
    for temperature in (8.0, 16.0, 32.0, 64.0):
        divergence = DIVERGENCES[name](student, teacher, temperature)
        norms.append(torch.autograd.grad(divergence, student)[0].norm().item())
    assert max(norms) / min(norms) < 1.1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_f30_a_mask_drops_examples_but_still_divides_by_all(name: str, kind: torch.dtype) -> None:
    student, teacher = logits(4, 3, 17)
    mask = torch.rand(4, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    kept = DIVERGENCES[name](student[mask], teacher[mask], 2.0)
    result = DIVERGENCES[name](student, teacher, 2.0, mask.to(kind))
    torch.testing.assert_close(result, kept * mask.sum() / 12)


@pytest.mark.parametrize("name", [*NAMES, "entropy"])
def test_halves_with_different_masks_average_to_the_whole(name: str) -> None:
    student, teacher = logits(8, 5)
    mask = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1], dtype=torch.bool)

    def term(rows: slice) -> Tensor:
        if name == "entropy":
            return entropy(student[rows], mask=mask[rows])
        return DIVERGENCES[name](student[rows], teacher[rows], mask=mask[rows])

    (whole,) = torch.autograd.grad(term(slice(0, 8)), student)
    halves = (term(slice(0, 4)) + term(slice(4, 8))) / 2
    torch.testing.assert_close(torch.autograd.grad(halves, student)[0], whole)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_masked_out_may_be_anything(name: str) -> None:
    student, teacher = logits(3, 5)
    with torch.no_grad():
        student[1] = math.nan
    teacher[1] = -math.inf
    mask = torch.tensor([True, False, True])
    divergence = DIVERGENCES[name](student, teacher, mask=mask)
    (gradient,) = torch.autograd.grad(divergence, student)
    assert divergence.isfinite()
    assert gradient.isfinite().all()
    assert (gradient[1] == 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_huge_logits_stay_finite_in_every_precision(name: str, dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, 1e4, -1e4]], dtype=dtype)
    divergence = DIVERGENCES[name](student, teacher)
    divergence.backward()
    assert divergence.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert divergence.isfinite()
    assert student.grad is not None
    assert student.grad.dtype == dtype
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    student, teacher = (z.detach().to(dtype) for z in logits(16, 1000))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = DIVERGENCES[name](student, teacher)
    assert result.dtype == torch.float32
    expected = DIVERGENCES[name](student.double(), teacher.double())
    assert result.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_class_that_both_exclude_is_as_if_it_were_not_there(name: str) -> None:
    student, teacher = logits(4, 6)
    excluded = torch.tensor([[True, False, False, True, False, False]])
    with torch.no_grad():
        student.masked_fill_(excluded, -math.inf)
    teacher.masked_fill_(excluded, -math.inf)
    kept = (~excluded[0]).nonzero()[:, 0]
    smaller = student.detach()[:, kept].requires_grad_()
    divergence = DIVERGENCES[name](student, teacher, 2.0)
    expected = DIVERGENCES[name](smaller, teacher[:, kept], 2.0)
    if name == "mse":  # a mean over all classes
        expected = expected * 4 / 6
    torch.testing.assert_close(divergence, expected)
    (gradient,) = torch.autograd.grad(divergence, student)
    (expected_gradient,) = torch.autograd.grad(expected, smaller)
    torch.testing.assert_close(gradient[:, kept], expected_gradient)
    assert (gradient[:, excluded[0]] == 0).all()
    assert entropy(student).isfinite()


def test_a_class_that_only_one_side_excludes() -> None:
    one = torch.tensor([[0.0, -math.inf]], requires_grad=True)
    both = torch.zeros(1, 2)
    assert kl_divergence(one, both).item() == math.inf
    assert reverse_kl_divergence(one, both).item() == pytest.approx(math.log(2))
    middle = 0.5 * (math.log(4 / 3) + 0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    divergence = jensen_shannon_divergence(one, both)
    assert divergence.item() == pytest.approx(middle)
    assert torch.autograd.grad(divergence, one)[0].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_among_the_logits_is_not_hidden(name: str) -> None:
    student, teacher = logits(3, 5)
    for broken in (student.detach().clone(), teacher.clone()):
        broken[1, 2] = math.nan
        pair = (broken, teacher) if broken is not teacher else (student, broken)
        assert DIVERGENCES[name](*pair).isnan()
        assert DIVERGENCES[name](pair[0].requires_grad_(), pair[1]).isnan()


# ---------------------------------------------------------------------------------------- alpha
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [1e-6, -1e-6])
def test_alpha_tends_to_both_kl_divergences_at_its_ends(step: float, dtype: torch.dtype) -> None:
    student, teacher = (z.detach().to(dtype) for z in logits(6, 9))
    student.requires_grad_()
    for end, limit in ((1.0, kl_divergence), (0.0, reverse_kl_divergence)):
        expected = limit(student, teacher, 2.0)
        (expected_gradient,) = torch.autograd.grad(expected, student)
        for alpha in (end, end + step):
            result = alpha_divergence(
                student, teacher, 2.0, alpha_min=alpha, alpha_max=alpha, clip=math.inf
            )
            (gradient,) = torch.autograd.grad(result, student)
            torch.testing.assert_close(result, expected, rtol=2e-5, atol=1e-6)
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", [-1.0, 0.5, 2.0])
def test_alpha_without_a_clip_is_the_power_divergence(alpha: float) -> None:
    """At ½ four times the squared Hellinger distance, at −1 and 2 half of a χ²."""
    student, teacher = logits(6, 9)
    q, p = F.softmax(student, -1), F.softmax(teacher, -1)
    expected = {
        0.5: 2 * (p.sqrt() - q.sqrt()).square().sum(-1).mean(),
        -1.0: ((p - q).square() / p).sum(-1).mean() / 2,
        2.0: ((p - q).square() / q).sum(-1).mean() / 2,
    }[alpha]
    result = alpha_divergence(student, teacher, alpha_min=alpha, alpha_max=alpha, clip=math.inf)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("alpha", [-2.0, -1.0, 1.5, 3.0])
def test_alpha_clips_the_importance_weight_in_the_gradient(alpha: float) -> None:
    """The surrogate of the published code: −Σ q·ρ·log q, with q and ρ constants."""
    student, teacher = logits(6, 9, scale=2.0)
    q, p = F.softmax(student, -1).detach(), F.softmax(teacher, -1)
    weight = (p / q) ** alpha
    assert 5 < (weight > 5).sum() < 49
    rho = weight.clamp(max=5) / alpha + 1 / alpha / (alpha - 1)
    surrogate = -(q * rho * F.log_softmax(student, -1)).sum(-1).mean()
    (expected,) = torch.autograd.grad(surrogate, student)
    result = alpha_divergence(student, teacher, alpha_min=alpha, alpha_max=alpha)
    (gradient,) = torch.autograd.grad(result, student)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("alpha", [-2.0, -1.0, 1.5, 3.0])
def test_alpha_with_a_clip_is_the_integral_of_its_gradient(alpha: float) -> None:
    student, teacher = logits(4, 5, scale=2.0)
    expected = 0.0
    for s, t in zip(student.detach().numpy(), teacher.numpy(), strict=True):
        for q, p in zip(softmax(s), softmax(t), strict=True):
            integral = quad(lambda u: -min(u**-alpha, 5) / alpha, 1, q / p, limit=200)[0]
            expected += p * integral / 4
    result = alpha_divergence(student, teacher, alpha_min=alpha, alpha_max=alpha)
    assert result.item() == pytest.approx(expected, rel=1e-6)


def test_alpha_is_the_larger_one_in_each_example() -> None:
    student, teacher = logits(32, 5, scale=2.0)
    low, high = (
        [alpha_divergence(s, t, alpha_min=a, alpha_max=a).item() for s, t in pairs]
        for a, pairs in (
            (-1.0, list(zip(student, teacher, strict=True))),
            (1.0, list(zip(student, teacher, strict=True))),
        )
    )
    assert 4 < sum(a > b for a, b in zip(low, high, strict=True)) < 28
    expected = sum(map(max, low, high)) / 32
    assert alpha_divergence(student, teacher).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"clip": 0.5}, "clip must be at least 1"), ({"alpha_min": -math.inf}, "alpha_min .* finite")],
)
def test_alpha_refuses_what_makes_no_divergence(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        alpha_divergence(torch.zeros(2, 3), torch.zeros(2, 3), **arguments)


# --------------------------------------------------------------------------------------- binary
@pytest.mark.parametrize("name", ["kl", "reverse_kl"])
def test_binary_is_the_divergence_of_all_outcomes_of_the_labels(name: str) -> None:
    student, teacher = logits(4, 3)
    expected = 0.0
    for s, t in zip(student.detach(), teacher, strict=True):
        q, p = (
            np.array(
                [
                    math.prod(
                        float(torch.sigmoid(z[c] / 2 if outcome >> c & 1 else -z[c] / 2))
                        for c in range(3)
                    )
                    for outcome in range(8)
                ]
            )
            for z in (s, t)
        )
        expected += LOOPS[name](p, q, p, q) * 4 / 4
    result = DIVERGENCES[name](student, teacher, 2.0, binary=True)
    assert result.item() == pytest.approx(expected)


@pytest.mark.parametrize("name", OF_PREDICTIONS)
def test_a_binary_logit_is_two_classes_of_which_one_has_logit_zero(name: str) -> None:
    student, teacher = logits(4, 3)
    mask = torch.tensor([True, True, False, True])
    two = [torch.stack([z, torch.zeros_like(z)], -1) for z in (student, teacher)]
    each = sum(DIVERGENCES[name](two[0][:, c], two[1][:, c], 2.0, mask) for c in range(3))
    result = DIVERGENCES[name](student, teacher, 2.0, mask, binary=True)
    if name == "alpha":  # the larger one after the sum over the labels, not of each label
        assert 0.5 * each.item() < result.item() <= each.item()
        return
    torch.testing.assert_close(result, each)
    (gradient,) = torch.autograd.grad(result, student)
    (expected,) = torch.autograd.grad(each, student)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", NAMES)
def test_one_binary_logit_may_have_a_dimension_or_not(name: str) -> None:
    student, teacher = logits(6)
    mask = torch.tensor([1, 0, 1, 1, 1, 0])
    result = DIVERGENCES[name](student, teacher, 2.0, mask, binary=True)
    expected = DIVERGENCES[name](student[:, None], teacher[:, None], 2.0, mask, binary=True)
    torch.testing.assert_close(result, expected)
    assert torch.autograd.grad(result, student)[0].shape == (6,)


def test_binary_kl_is_the_binary_cross_entropy_less_that_of_the_teacher() -> None:
    student, teacher = logits(4, 3, 5)
    p = teacher.sigmoid()
    own = F.binary_cross_entropy_with_logits(teacher, p, reduction="none").sum(1).mean()
    expected = F.binary_cross_entropy_with_logits(student, p, reduction="none").sum(1).mean() - own
    result = kl_divergence(student, teacher, dim=1, binary=True)
    torch.testing.assert_close(result, expected)
    (gradient,) = torch.autograd.grad(result, student)
    torch.testing.assert_close(gradient, (student.sigmoid() - p).detach() / 20)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_huge_binary_logits_stay_finite(name: str, dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [0.0, 1e4, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, 1e4, -1e4]], dtype=dtype)
    divergence = DIVERGENCES[name](student, teacher, binary=True)
    divergence.backward()
    assert divergence.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


# --------------------------------------------------------------------------------------- limits
def test_kl_of_hot_predictions_is_half_the_mse_of_centred_logits() -> None:
    student, teacher = logits(6, 9)
    student, teacher = (z - z.mean(-1, keepdim=True) for z in (student, teacher))
    hot = kl_divergence(student, teacher, 1e4)
    assert hot.item() == pytest.approx(logit_mse(student, teacher).item() / 2, rel=1e-3)
    assert logit_mse(student, teacher, 7.0).item() == logit_mse(student, teacher).item()


def test_total_variation_is_at_most_the_temperature() -> None:
    one = torch.tensor([[300.0, 0.0]])
    assert total_variation(one, one.flip(1), 3.0).item() == pytest.approx(3.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_vector_of_zeros_has_a_finite_gradient_of_its_cosine(dtype: torch.dtype) -> None:
    student = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    distance = logit_cosine(student, torch.full((2, 3), 2.0, dtype=dtype))
    distance.backward()
    assert distance.item() == 1
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.full_like(student, -0.5 / 3**0.5))


def test_the_class_dimension_may_be_any() -> None:
    student, teacher = logits(4, 5, 3)
    mask = torch.rand(4, 3) < 0.5
    result = kl_divergence(student, teacher, mask=mask, dim=1)
    expected = kl_divergence(student.transpose(1, 2), teacher.transpose(1, 2), mask=mask)
    torch.testing.assert_close(result, expected)


def test_all_masked_is_zero_with_a_zero_gradient() -> None:
    student, teacher = logits(2, 3)
    divergence = kl_divergence(student, teacher, mask=torch.zeros(2))
    assert divergence.item() == 0
    assert (torch.autograd.grad(divergence, student)[0] == 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d(torch.zeros(2, 3), torch.zeros(2, 4)), r"same shape.*\(2, 3\) and \(2, 4\)"),
        (lambda d: d(torch.zeros(2, 3), torch.zeros(2, 3), 0.0), "temperature .* above 0, not 0"),
        (lambda d: d(torch.zeros(2, 3), torch.zeros(2, 3), math.nan), "temperature"),
        (
            lambda d: d(torch.zeros(2, 3), torch.zeros(2, 3), mask=torch.ones(2, 3)),
            r"mask must have the shape of the examples \(2,\)",
        ),
        (lambda d: d(torch.zeros(0, 3), torch.zeros(0, 3)), "no examples"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_named(
    name: str, call: Callable[[Callable[..., Tensor]], Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(DIVERGENCES[name])


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "js", "alpha", "tv"])
def test_one_class_is_refused_since_its_probability_never_changes(name: str) -> None:
    student, teacher = torch.randn(2, 5, 1)
    with pytest.raises(ValueError, match="one class"):
        DIVERGENCES[name](student, teacher)
    assert DIVERGENCES[name](student, teacher, binary=True) > 0
    assert DIVERGENCES["mse"](student, teacher) > 0
