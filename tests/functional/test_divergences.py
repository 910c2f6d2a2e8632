"""Divergences equal their definitions, stay finite, and average over all examples."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_aux.functional import (
    DIVERGENCES,
    entropy,
    jensen_shannon_divergence,
    kl_divergence,
    reverse_kl_divergence,
)

NAMES = list(DIVERGENCES)


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
    divergence = DIVERGENCES[name](student, student.detach() + 3.0)
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
