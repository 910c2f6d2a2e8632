"""Label smoothing and MaxSup, against torch's own label smoothing and the paper's identities."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lightning_aux.functional import label_smoothing, max_suppression


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=torch.float64) * 3


def gradient(function, logits: torch.Tensor) -> torch.Tensor:
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    ("shape", "dim"), [((7, 5), -1), ((4, 3, 5), -1), ((4, 5, 2, 3), 1)], ids=str
)
def test_cross_entropy_and_term_are_torchs_smoothed_cross_entropy(shape, dim, epsilon) -> None:
    z = drawn(*shape)
    classes = shape[dim]
    y = torch.randint(classes, z.select(dim, 0).shape)

    def ours(z):
        return F.cross_entropy(z.movedim(dim, 1), y) + epsilon * label_smoothing(z, y, dim=dim)

    def theirs(z):
        return F.cross_entropy(z.movedim(dim, 1), y, label_smoothing=epsilon)

    torch.testing.assert_close(ours(z), theirs(z), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient(ours, z), gradient(theirs, z), atol=1e-6, rtol=0)


def test_probabilities_as_the_target() -> None:
    z, y = drawn(6, 4), drawn(6, 4, seed=1).softmax(1)
    smoothed = 0.8 * y + 0.2 / 4
    ours = F.cross_entropy(z, y) + 0.2 * label_smoothing(z, y)
    torch.testing.assert_close(ours, F.cross_entropy(z, smoothed))


def test_max_suppression_is_label_smoothing_where_the_prediction_is_right() -> None:
    z = drawn(64, 10)
    right = z.argmax(1)
    torch.testing.assert_close(max_suppression(z), label_smoothing(z, right), atol=1e-6, rtol=0)
    assert max_suppression(z) > label_smoothing(z, (right + 1) % 10)


def test_max_suppression_has_the_papers_gradient() -> None:
    z = drawn(5, 4)
    expected = torch.full((5, 4), -1 / 4, dtype=torch.float64)
    expected[torch.arange(5), z.argmax(1)] += 1
    torch.testing.assert_close(gradient(max_suppression, z), expected / 5)


def test_examples_without_a_label_or_outside_of_the_mask_count_zero() -> None:
    z, y = drawn(4, 3), torch.tensor([0, -100, 2, 1])
    z[3] = torch.nan
    mask = torch.tensor([True, True, True, False])
    by_hand = sum(z[i, y[i]] - z[i].mean() for i in (0, 2)) / 4
    torch.testing.assert_close(label_smoothing(z, y, mask), by_hand)
    slope = gradient(lambda leaf: label_smoothing(leaf, y, mask), z)
    assert slope.isfinite().all()
    assert slope[1].eq(0).all()
    assert slope[3].eq(0).all()


def test_half_precision_is_computed_in_float32() -> None:
    z = (drawn(8, 100) * 1e3).bfloat16()
    assert max_suppression(z).dtype == torch.float32
    torch.testing.assert_close(max_suppression(z), max_suppression(z.double()).float())


@pytest.mark.parametrize(
    ("target", "found"),
    [
        (torch.zeros(3, dtype=torch.long), r"\(4,\)"),
        (torch.zeros(4), "float32"),
        (torch.zeros(4, dtype=torch.bool), "bool"),
        (torch.zeros(4, 1, dtype=torch.long), r"\(4, 1\)"),
    ],
)
def test_a_target_that_does_not_fit_is_an_error_with_both_shapes(target, found) -> None:
    with pytest.raises(ValueError, match=found):
        label_smoothing(drawn(4, 3), target)


def test_an_empty_batch_and_a_missing_dimension_are_errors() -> None:
    with pytest.raises(ValueError, match="no examples"):
        max_suppression(drawn(0, 3))
    with pytest.raises(ValueError, match="dim=2"):
        max_suppression(drawn(4, 3), dim=2)


def test_weights_of_a_mask_stay_weights_beside_examples_without_a_label() -> None:
    z, weight = drawn(4, 3), torch.tensor([0.1, 1.0, 0.5, 1.0], dtype=torch.float64)
    y = torch.tensor([0, 2, 1, -100])
    by_hand = sum(weight[i] * (z[i, y[i]] - z[i].mean()) for i in range(3)) / 4
    torch.testing.assert_close(label_smoothing(z, y, weight), by_hand)


def test_a_label_behind_the_mask_may_be_any_number() -> None:
    z, y, mask = drawn(3, 4), torch.tensor([1, 255, -1]), torch.tensor([True, False, False])
    torch.testing.assert_close(label_smoothing(z, y, mask), (z[0, 1] - z[0].mean()) / 3)
