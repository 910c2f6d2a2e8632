"""Anchors equal a plain loop and the sum of their parts, in value and gradient."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_aux.functional import (
    entropy,
    output_anchor,
    relative_distance,
    reverse_kl_divergence,
    squared_distance,
)


def test_the_distance_of_many_small_parameters_equals_a_loop() -> None:
    module = nn.ModuleList([nn.Linear(3, 2) for _ in range(250)])
    parameters = list(module.parameters())
    anchors = [parameter.detach() + 0.1 * torch.randn_like(parameter) for parameter in parameters]
    distance = squared_distance(parameters, anchors)
    expected = sum(((p - a) ** 2).sum() for p, a in zip(parameters, anchors, strict=True))
    torch.testing.assert_close(distance, expected, rtol=1e-6, atol=0)
    (3 * distance).backward()
    for parameter, anchor in zip(parameters, anchors, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(
            parameter.grad, 6 * (parameter.detach() - anchor), rtol=1e-6, atol=1e-7
        )


def test_the_gradient_is_that_of_finite_differences() -> None:
    tensors = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(3, 2), (4,), ()]
    ]
    anchors = [torch.randn_like(tensor) for tensor in tensors]
    assert torch.autograd.gradcheck(lambda *t: squared_distance(t, anchors), tensors)


def test_no_gradient_reaches_the_anchors_or_frozen_tensors() -> None:
    live, frozen = torch.ones(2, requires_grad=True), torch.ones(2)
    anchors = [torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)]
    squared_distance([live, frozen], anchors).backward()
    assert live.grad is not None
    assert frozen.grad is None
    assert [anchor.grad for anchor in anchors] == [None, None]


def test_moving_the_weights_before_the_backward_pass_does_not_change_it() -> None:
    weight, anchor = torch.full((2,), 3.0, requires_grad=True), torch.ones(2)
    distance = squared_distance([weight], [anchor])
    anchor.zero_()
    distance.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [4, 4]


@pytest.mark.parametrize("anchor_dtype", [torch.float32, torch.bfloat16])
def test_half_precision_weights_are_compared_and_summed_in_float32(
    anchor_dtype: torch.dtype,
) -> None:
    weight = torch.full((5000,), 1.0, dtype=torch.bfloat16, requires_grad=True)
    anchor = torch.full((5000,), 1.0078125, dtype=anchor_dtype)
    distance = squared_distance([weight], [anchor])
    assert distance.dtype == torch.float32
    assert distance.item() == pytest.approx(5000 * 0.0078125**2, rel=1e-6)
    distance.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.float().unique().tolist() == [-0.015625]


def test_a_large_tensor_is_summed_without_loss() -> None:
    weight, anchor = torch.randn(2, 3_000_000, generator=torch.Generator().manual_seed(0))
    expected = (weight.double() - anchor.double()).square().sum().item()
    assert squared_distance([weight], [anchor]).item() == pytest.approx(expected, rel=1e-6)


def test_the_result_has_the_widest_dtype_of_the_list() -> None:
    tensors = [
        torch.ones(2),
        torch.ones(2, dtype=torch.float64),
        torch.ones(2, dtype=torch.float16),
    ]
    distance = squared_distance(tensors, [torch.zeros_like(tensor) for tensor in tensors])
    assert distance.item() == pytest.approx(6, rel=1e-12)
    assert distance.dtype == torch.float64
    assert squared_distance(tensors[2:], [torch.zeros(2)]).dtype == torch.float32


def test_a_distance_of_zero_has_a_gradient_of_zero() -> None:
    weight = torch.ones(3, requires_grad=True)
    squared_distance([weight], [torch.ones(3)]).backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0, 0, 0]


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    weight = torch.ones(3, requires_grad=True)
    distance = squared_distance([weight], [torch.zeros(3)])
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(distance, weight, create_graph=True)


def test_bad_lists_are_named() -> None:
    with pytest.raises(ValueError, match=r"2 tensors .* 1 anchors"):
        squared_distance([torch.zeros(1)] * 2, [torch.zeros(1)])
    with pytest.raises(ValueError, match=r"tensor 1 has shape \(3,\), its anchor \(1,\)"):
        squared_distance([torch.zeros(1), torch.zeros(3)], [torch.zeros(1), torch.zeros(1)])
    with pytest.raises(ValueError, match="no tensors"):
        squared_distance([], [])


def test_the_output_anchor_is_the_divergence_less_the_entropy_bonus() -> None:
    student = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    anchor = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    q, p = torch.softmax(student / 2, -1), torch.softmax(anchor / 2, -1)
    divergence = 4 * (q * (q / p).log()).sum(-1).mean()
    torch.testing.assert_close(output_anchor(student, anchor, 2.0), divergence)
    policy = torch.distributions.Categorical(logits=student)
    expected = divergence - 0.3 * policy.entropy().mean()
    result = output_anchor(student, anchor, 2.0, entropy_weight=0.3)
    torch.testing.assert_close(result, expected)
    result.backward()
    assert anchor.grad is None


def test_the_output_anchor_hands_its_mask_to_both_parts() -> None:
    student, anchor = torch.randn(2, 6, 4)
    mask = torch.tensor([1, 0, 1, 1, 0, 0])
    expected = reverse_kl_divergence(student, anchor, mask=mask) - 0.5 * entropy(student, mask=mask)
    torch.testing.assert_close(output_anchor(student, anchor, 1.0, 0.5, mask), expected)


def test_the_output_anchor_hands_its_class_dimension_to_both_parts() -> None:
    student, anchor = torch.randn(2, 6, 4, 5)
    last = output_anchor(student.movedim(1, -1), anchor.movedim(1, -1), 2.0, 0.5)
    torch.testing.assert_close(output_anchor(student, anchor, 2.0, 0.5, dim=1), last)
    with pytest.raises(ValueError, match=r"\(6, 4, 5\) have no class dimension dim=3"):
        output_anchor(student, anchor, dim=3)


def test_the_entropy_bonus_flattens_the_predictions() -> None:
    student = torch.tensor([[2.0, 0.0]], requires_grad=True)
    output_anchor(student, student.detach(), entropy_weight=1.0).backward()
    assert student.grad is not None
    assert student.grad[0, 0] > 0 > student.grad[0, 1]  # descent lowers the larger logit


# --------------------------------------------------------------------------- relative distance
def spread() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    shapes = [(7, 9), (), (3,), (50, 4), (0,), (1, 70), (2, 3, 5)]
    tensors = [torch.randn(shape) for shape in shapes]
    tensors.append(torch.randn(6, 5).t())  # not contiguous
    return tensors, [each + 0.1 * torch.randn_like(each) for each in tensors]


def in_one_row(tensors: list[torch.Tensor], anchors: list[torch.Tensor]) -> float:
    own, other = (torch.cat([t.double().flatten() for t in each]) for each in (tensors, anchors))
    return float((other - own).norm() / own.norm())


@pytest.mark.parametrize("block", [1, 16, 64, 10**6])
def test_the_relative_distance_is_that_of_one_row_whatever_the_blocks(block, monkeypatch):
    monkeypatch.setattr("lightning_aux.functional.blocks.CPU_BLOCK", block)
    tensors, anchors = spread()
    found = relative_distance(tensors, anchors)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(in_one_row(tensors, anchors), rel=1e-6)


def test_the_relative_distance_makes_no_tensor_larger_than_a_block(monkeypatch):
    """Except one row of what is wider."""
    monkeypatch.setattr("lightning_aux.functional.blocks.CPU_BLOCK", 64)
    half = [torch.randn(80, 8, dtype=torch.bfloat16), torch.randn(4)]
    anchors = [each.float() + 1 for each in half]
    given = {each.untyped_storage().data_ptr() for each in (*half, *anchors)}
    made: list[int] = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
            found = operation(*arguments, **(keywords or {}))
            new = [e for e in tree_leaves(found) if e.untyped_storage().data_ptr() not in given]
            made.extend(each.numel() for each in new)
            return found

    with Noted():
        relative_distance(half, anchors)
    assert max(made) == 64


def test_the_relative_distance_of_half_precision_is_taken_in_float32():
    tensors = [torch.randn(300, dtype=torch.bfloat16) for _ in range(3)]
    anchors = [each.float() + 1e-4 for each in tensors]
    expected = in_one_row(tensors, anchors)
    assert float(relative_distance(tensors, anchors)) == pytest.approx(expected, rel=1e-5)


def test_the_relative_distance_of_what_is_equal_is_nought():
    tensors = [torch.randn(3), torch.zeros(2)]
    assert float(relative_distance(tensors, tensors)) == 0.0
    assert float(relative_distance([torch.zeros(2)], [torch.zeros(2)])) == 0.0
    assert float(relative_distance([], [])) == 0.0
    assert float(relative_distance([torch.zeros(0)], [torch.zeros(0)])) == 0.0


def test_lists_of_different_lengths_have_no_relative_distance():
    with pytest.raises(ValueError, match="shorter"):
        relative_distance([torch.ones(2), torch.ones(2)], [torch.ones(2)])
