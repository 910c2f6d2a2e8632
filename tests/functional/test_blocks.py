"""Blocks change nothing but the memory: values, gradients, second derivatives, precision."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_aux.functional import (
    DIVERGENCES,
    blocks,
    confidence_penalty,
    coverage_loss,
    entropy,
    label_smoothing,
    max_suppression,
    sigmoid_divergence,
    soft_cross_entropy,
    spectral_decoupling,
    target_change,
    z_loss,
)
from tests.benchmarks.memory import peak

NAMES = list(DIVERGENCES)
FORMULAS: dict[str, Callable[..., Tensor]] = {
    **DIVERGENCES,
    "entropy": lambda s, t, *rest: entropy(s, *rest),
    # Any numbers serve as targets.
    "soft_cross_entropy": lambda s, t, T, *rest: soft_cross_entropy(s, t, *rest),
}


def labels(logits: Tensor, dim: int) -> Tensor:
    return logits.detach().roll(1, dim).argmax(dim)


# The same with classes instead of a teacher's logits, where there is another at all.
OTHERS: dict[str, Callable[..., Tensor]] = {
    "sigmoid_divergence": sigmoid_divergence,
    "confidence_penalty": lambda s, t, T, mask, dim: confidence_penalty(s, 1.5, mask, dim),
    "coverage_loss": lambda s, t, T, mask, dim: coverage_loss(s, labels(s, dim), 8, mask, dim),
    "difference": lambda s, t, T, mask, dim: coverage_loss(
        s, labels(s, dim), 8, mask, dim, difference=True
    ),
    "coverage_loss of probabilities": lambda s, t, T, mask, dim: coverage_loss(
        s, t.softmax(dim), 8, mask, dim
    ),
    "label_smoothing": lambda s, t, T, mask, dim: label_smoothing(s, labels(s, dim), mask, dim),
    "label_smoothing of probabilities": lambda s, t, T, mask, dim: label_smoothing(
        s, t.softmax(dim), mask, dim
    ),
    "max_suppression": lambda s, t, T, mask, dim: max_suppression(s, mask, dim),
    "spectral_decoupling": lambda s, t, T, mask, dim: spectral_decoupling(s, 0.3, None, mask, dim),
    "offset per class": lambda s, t, T, mask, dim: spectral_decoupling(
        s, [0.1 * k for k in range(s.shape[dim])], labels(s, dim), mask, dim
    ),
    "target_change": lambda s, t, T, mask, dim: target_change(
        s, labels(s, dim), t.softmax(dim), mask, dim
    ),
    "z_loss": lambda s, t, T, mask, dim: z_loss(s, mask, dim),
}
ALL = FORMULAS | OTHERS


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    both = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return both[0].requires_grad_(), both[1]


def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Formulas are written out, as they are in a compiled graph."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.parametrize("size", [1, 7, 30, 10**6])
@pytest.mark.parametrize(
    ("shape", "dim"), [((6, 5), -1), ((6, 5), 0), ((2, 3, 5), -1), ((2, 5, 3, 2), 1), ((5,), 0)]
)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_values_and_gradients_are_those_of_the_formula_written_out(
    name: str,
    masked: bool,
    shape: tuple[int, ...],
    dim: int,
    size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, teacher = pair(*shape)
    mask = torch.rand(teacher.select(dim, 0).shape, generator=torch.Generator().manual_seed(1))
    mask = mask * (mask > 0.3) if masked else None
    monkeypatch.setattr(blocks, "CPU_BLOCK", size)
    monkeypatch.setattr(blocks, "CPU_SMALL", size)
    found = ALL[name](student, teacher, 2.0, mask, dim)
    without = ALL[name](student.detach(), teacher, 2.0, mask, dim)
    (gradient,) = torch.autograd.grad(0.3 * found, student)
    plainly(monkeypatch)
    expected = ALL[name](student, teacher, 2.0, mask, dim)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(without, expected)
    assert not without.requires_grad
    torch.testing.assert_close(gradient, torch.autograd.grad(0.3 * expected, student)[0])


@pytest.mark.parametrize("size", [4, 10**6])
@pytest.mark.parametrize("name", NAMES)
def test_binary_logits_in_blocks(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair(3, 4, 2)
    monkeypatch.setattr(blocks, "CPU_BLOCK", size)
    found = DIVERGENCES[name](student, teacher, 2.0, dim=1, binary=True)
    (gradient,) = torch.autograd.grad(found, student)
    plainly(monkeypatch)
    expected = DIVERGENCES[name](student, teacher, 2.0, dim=1, binary=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])


@pytest.mark.parametrize("name", FORMULAS)
def test_logits_that_are_not_contiguous_are_read_where_they_are(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "CPU_BLOCK", 7)
    student, teacher = pair(5, 3, 4)
    turned = FORMULAS[name](student.permute(1, 2, 0), teacher.permute(1, 2, 0), 2.0, None, -1)
    (gradient,) = torch.autograd.grad(turned, student)
    straight = FORMULAS[name](student, teacher, 2.0, None, 0)
    torch.testing.assert_close(turned, straight)
    torch.testing.assert_close(gradient, torch.autograd.grad(straight, student)[0])


@pytest.mark.parametrize("size", [3, 10**6])
@pytest.mark.parametrize("name", ALL)
def test_a_graph_may_be_gone_through_twice_and_its_gradient_differentiated(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "CPU_BLOCK", size)
    monkeypatch.setattr(blocks, "CPU_SMALL", size)
    student, teacher = pair(3, 5)
    mean = ALL[name](student, teacher, 2.0, None, -1)
    first, second = (
        torch.autograd.grad(mean * scale, student, retain_graph=True)[0] for scale in (1.0, 0.3)
    )
    torch.testing.assert_close(second, 0.3 * first)
    (third,) = torch.autograd.grad(mean, student, create_graph=True)
    torch.testing.assert_close(third, first)
    (penalty,) = torch.autograd.grad((third * student).square().sum(), student)
    plainly(monkeypatch)
    mean = ALL[name](student, teacher, 2.0, None, -1)
    (plain,) = torch.autograd.grad(mean, student, create_graph=True)
    (expected,) = torch.autograd.grad((plain * student).square().sum(), student)
    torch.testing.assert_close(penalty, expected)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_those_of_float32_rounded(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "CPU_BLOCK", 30)
    half, teacher = (z.detach().to(dtype) for z in pair(8, 17))
    whole = half.float().requires_grad_()
    half.requires_grad_()
    (gradient,) = torch.autograd.grad(0.3 * FORMULAS[name](half, teacher, 2.0, None, -1), half)
    expected = 0.3 * FORMULAS[name](whole, teacher.float(), 2.0, None, -1)
    (expected_gradient,) = torch.autograd.grad(expected, whole)
    assert gradient.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.float(), expected_gradient, rtol=1.1 * step, atol=1e-7)


@pytest.mark.parametrize("name", ["kl", "reverse_kl"])
def test_a_loss_scaler_saves_gradients_that_float16_could_not_hold(name: str) -> None:
    student = pair(8192, 20)[0].detach().half()
    student[:, 1:] -= 12  # probabilities of 1e-6, a mean over 8192 examples
    student.requires_grad_()
    (lost,) = torch.autograd.grad(DIVERGENCES[name](student, student.detach() * 0.98), student)
    scaled = 2.0**16 * DIVERGENCES[name](student, student.detach() * 0.98)
    (kept,) = torch.autograd.grad(scaled, student)
    exact = student.detach().double().requires_grad_()
    reference = DIVERGENCES[name](exact, (student.detach() * 0.98).double())
    (expected,) = torch.autograd.grad(2.0**16 * reference, exact)
    assert (lost == 0).float().mean() > 0.9
    torch.testing.assert_close(kept.double(), expected, rtol=0.1, atol=2.0**-23)


# ---------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMULAS)
def test_memory_is_one_gradient_and_a_few_blocks(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "CPU_BLOCK", 2**16)
    shape, a_few = (64, 20_000), 11 * 4 * blocks.CPU_BLOCK
    student, teacher = (z.detach().to(dtype) for z in pair(*shape, dtype=torch.float32))

    def act() -> None:
        (0.3 * FORMULAS[name](student, teacher, 2.0)).backward()

    assert peak(lambda: FORMULAS[name](student, teacher, 2.0)) <= a_few
    student.requires_grad_()
    assert student.nbytes <= peak(act) <= student.nbytes + a_few
    assert a_few < 1.2 * student.nbytes


def test_the_ruler_sees_what_the_formula_written_out_needs() -> None:
    student, teacher = pair(64, 20_000, dtype=torch.float32)

    def act() -> None:
        log_q, p = torch.log_softmax(student, -1), torch.softmax(teacher, -1)
        torch.nn.functional.kl_div(log_q, p, reduction="batchmean").backward()

    assert 4.9 < peak(act) / student.nbytes < 5.1


# -------------------------------------------------------------------------------------- the rest
@pytest.mark.parametrize("name", ALL)
def test_a_compiled_graph_has_the_same_values_and_gradients(name: str) -> None:
    torch._dynamo.reset()
    student, teacher = pair(6, 5)
    compiled = torch.compile(ALL[name], backend="aot_eager", fullgraph=True)
    found, expected = (f(student, teacher, 2.0, None, -1) for f in (compiled, ALL[name]))
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(each, student)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ALL)
def test_transforms_of_functions_go_through_the_formula_written_out(name: str) -> None:
    student, teacher = pair(3, 6, 5)

    def formula(s: Tensor, t: Tensor) -> Tensor:
        return ALL[name](s, t, 2.0, None, -1)

    each = [formula(s, t) for s, t in zip(student, teacher, strict=True)]
    (expected,) = torch.autograd.grad(torch.stack(each).sum(), student)
    values = torch.func.vmap(formula)(student.detach(), teacher)
    torch.testing.assert_close(values, torch.stack(each))
    found = torch.func.vmap(torch.func.grad(formula))(student.detach(), teacher)
    torch.testing.assert_close(found, expected)


def test_a_tensor_of_another_class_goes_through_the_formula_written_out() -> None:
    class Marked(Tensor):
        pass

    student, teacher = pair(6, 5)
    marked = DIVERGENCES["kl"](student.as_subclass(Marked), teacher)
    assert isinstance(marked, Marked)
    torch.testing.assert_close(marked.as_subclass(Tensor), DIVERGENCES["kl"](student, teacher))


@pytest.mark.parametrize("small", [0, 2**14])
@pytest.mark.parametrize("name", ALL)
def test_the_logits_may_be_overwritten_after_the_forward_pass(
    name: str, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "CPU_SMALL", small)
    leaf, teacher = pair(6, 5)
    student = leaf * 1.0
    (expected,) = torch.autograd.grad(ALL[name](student, teacher, 2.0, None, -1), leaf)
    student = leaf * 1.0
    mean = ALL[name](student, teacher, 2.0, None, -1)
    student.mul_(math.pi)
    torch.testing.assert_close(torch.autograd.grad(mean, leaf)[0], expected)


def test_a_normaliser_that_float32_can_hardly_hold_has_all_its_digits() -> None:
    direction = pair(6, 5)[1].flip(1)
    for height in (-60.0, -37.0, -25.0, -95.0, -102.0, -1e4, 25.0, 60.0, 84.0, 1e4, 32.5):
        for weight in (1.0, 1e-7, 2.0**16):
            logits = (height + pair(6, 5)[1]).float().requires_grad_()
            exact = logits.detach().double().requires_grad_()
            found, expected = [], []
            for z, mean, into in (
                (logits, z_loss(logits), found),
                (exact, torch.logsumexp(exact, -1).square().mean(), expected),
            ):
                # In float32 torch's own logsumexp, differentiated twice, loses digits at 1e4.
                twice = abs(height) < 1000
                (first,) = torch.autograd.grad(weight * mean, z, create_graph=twice)
                into += [mean, first / weight]
                if twice:
                    (second,) = torch.autograd.grad((first * direction.to(z.dtype)).sum(), z)
                    into.append(second / weight)
            for one, other in zip(found, expected, strict=True):
                size = other.abs().max().item()
                torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-5 * size)


def test_an_answer_that_is_nearly_impossible_has_all_its_digits() -> None:
    for gap in (10.0, 60.0, 80.0, 92.0, 102.5, 1e4):
        logits = torch.tensor([[gap, 0, 1], [0, 1, 2]]).requires_grad_()
        target = torch.tensor([1, 1])
        found = coverage_loss(logits, target, 8)
        exact = logits.detach().double().requires_grad_()
        log_p = torch.log_softmax(exact, -1)[:, 1]
        wrong = 8 * torch.log1p(-log_p.exp())
        # log(1 − (1 − p)^N) is log p + log N where p is next to nothing.
        some = torch.where(log_p < -30, log_p + math.log(8), torch.log(-torch.expm1(wrong)))
        torch.testing.assert_close(found.double(), -some.mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [40, 4000])
@pytest.mark.parametrize("name", ALL)
def test_a_gradient_has_the_layout_of_the_logits(name: str, rows: int) -> None:
    student, teacher = (each.float() for each in pair(rows, 10))
    student = student.detach().requires_grad_()
    gradients = []
    student.register_hook(gradients.append)
    ALL[name](student, teacher, 2.0, None, -1).backward()
    assert gradients[0].stride() == student.stride()


@pytest.mark.parametrize("small", [0, 2**14])
def test_what_is_not_the_student_gets_no_gradient(
    small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "CPU_SMALL", small)
    student, teacher = pair(6, 5)
    others = {
        "teacher": teacher.softmax(-1).requires_grad_(),
        "mask": torch.rand(6, dtype=torch.float64).requires_grad_(),
        "offset": torch.rand(5, dtype=torch.float64).requires_grad_(),
    }
    target = labels(student, -1)
    for total in (
        DIVERGENCES["kl"](student, others["teacher"], mask=others["mask"]),
        DIVERGENCES["mse"](student, others["teacher"]),
        label_smoothing(student, others["teacher"]),
        target_change(student, target, others["teacher"]),
        spectral_decoupling(student, others["offset"], target),
        spectral_decoupling(student, others["offset"], target, others["mask"]),
        coverage_loss(student, others["teacher"], 8),
    ):
        student.grad = None
        total.backward()
        assert student.grad is not None
    assert all(each.grad is None for each in others.values())


def test_offsets_of_another_precision_leave_the_result_as_it_is() -> None:
    student, _ = pair(6, 5)
    offsets = [0.1 * k for k in range(5)]
    target = labels(student, -1)
    exact = (student - torch.tensor(offsets, dtype=torch.float64)[target][:, None]).square()
    expected = exact.sum(-1).mean() / 2
    found = spectral_decoupling(student, offsets, target)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    wide = torch.tensor(offsets, dtype=torch.float64)
    assert spectral_decoupling(student.float(), wide, target).dtype == torch.float32


@pytest.mark.parametrize("excluded", [False, True])
def test_excluded_classes_are_found_in_every_block(excluded: bool) -> None:
    student, teacher = (each.detach() for each in pair(300, 100))
    if excluded:
        student[:, 7] = teacher[:, 7] = -math.inf
    student.requires_grad_()
    for name in ("kl", "reverse_kl", "js", "alpha", "mse", "cosine"):
        found = DIVERGENCES[name](student, teacher, 2.0)
        (gradient,) = torch.autograd.grad(found, student)
        kept = [k for k in range(100) if not excluded or k != 7]
        rest = student.detach()[:, kept].requires_grad_()
        expected = DIVERGENCES[name](rest, teacher[:, kept], 2.0)
        (of_rest,) = torch.autograd.grad(expected, rest)
        share = len(kept) / 100 if name == "mse" else 1.0  # a mean over classes too
        torch.testing.assert_close(found, share * expected)
        torch.testing.assert_close(gradient[:, kept], share * of_rest)
