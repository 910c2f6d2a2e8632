"""Distances of features equal their definitions and are safe at zero."""

import pytest
import torch

from lightning_aux.functional import FEATURE_DISTANCES, feature_cosine, feature_mse


def features(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    pair = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return pair[0].requires_grad_(), pair[1]


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5), (2, 3, 4, 4)])
def test_mse_and_cosine_equal_a_loop_over_examples(shape: tuple[int, ...]) -> None:
    student, teacher = features(*shape)
    squares, angles = [], []
    for s, t in zip(student.detach().numpy(), teacher.numpy(), strict=True):
        s, t = s.ravel(), t.ravel()
        squares.append(((s - t) ** 2).mean())
        angles.append(1 - (s @ t) / ((s @ s) ** 0.5 * (t @ t) ** 0.5))
    assert feature_mse(student, teacher).item() == pytest.approx(sum(squares) / shape[0])
    assert feature_cosine(student, teacher).item() == pytest.approx(sum(angles) / shape[0])


@pytest.mark.parametrize("name", list(FEATURE_DISTANCES))
def test_gradients_are_those_of_finite_differences_and_spare_the_teacher(name: str) -> None:
    student, teacher = features(3, 2, 2)
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: FEATURE_DISTANCES[name](s, teacher), (student,))
    FEATURE_DISTANCES[name](student, teacher).backward()
    assert teacher.grad is None


def test_a_vector_of_zeros_has_a_finite_gradient() -> None:
    student = torch.zeros(2, 3, requires_grad=True)
    distance = feature_cosine(student, torch.ones(2, 3))
    distance.backward()
    assert distance.item() == 1
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", list(FEATURE_DISTANCES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    student, teacher = (f.detach().to(dtype) * 1e4 for f in features(4, 300))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = FEATURE_DISTANCES[name](student, teacher)
    assert result.dtype == torch.float32
    expected = FEATURE_DISTANCES[name](student.double(), teacher.double())
    assert result.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", list(FEATURE_DISTANCES))
def test_bad_input_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        FEATURE_DISTANCES[name](torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="no features"):
        FEATURE_DISTANCES[name](torch.zeros(0, 3), torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"\(batch, …\)"):
        feature_cosine(torch.zeros(3), torch.zeros(3))


WEIGHTS = {
    "examples": [1.0, 0.0, 0.5],
    "positions": [[1.0, 0.0, 0.5, 1.0], [0.0] * 4, [1.0, 1.0, 0.0, 0.25]],
}


@pytest.mark.parametrize("of", list(WEIGHTS))
def test_a_mask_equals_a_loop_over_what_counts(of: str) -> None:
    student, teacher = features(3, 4, 5)
    mask = torch.tensor(WEIGHTS[of], dtype=torch.float64)
    per_position = mask.reshape(3, -1).expand(3, 4).numpy()
    squares, angles = 0.0, 0.0
    for s, t, weights in zip(student.detach().numpy(), teacher.numpy(), per_position, strict=True):
        squares += sum(w * ((a - b) ** 2).mean() for a, b, w in zip(s, t, weights, strict=True)) / 4
        dot, of_s, of_t = (
            sum(w * (a @ b) for a, b, w in zip(x, y, weights, strict=True))
            for x, y in ((s, t), (s, s), (t, t))
        )
        if weights.any():
            angle = 1 - dot / (of_s**0.5 * of_t**0.5)
            angles += angle * (weights[0] if of == "examples" else 1)
    with torch.no_grad():  # what is left out may hold anything
        holes = mask == 0
        student[holes], teacher[holes] = torch.nan, torch.inf
    assert feature_mse(student, teacher, mask).item() == pytest.approx(squares / 3)
    assert feature_cosine(student, teacher, mask).item() == pytest.approx(angles / 3)
    (feature_mse(student, teacher, mask) + feature_cosine(student, teacher, mask)).backward()
    assert student.grad is not None
    assert student.grad[holes].count_nonzero() == 0
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", list(FEATURE_DISTANCES))
def test_a_mask_of_another_shape_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"features \(2, 3, 4\), not the shape \(3,\)"):
        FEATURE_DISTANCES[name](torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(3))
    with pytest.raises(ValueError, match=r"features \(2, 3\), not the shape \(2, 3\)"):
        FEATURE_DISTANCES[name](torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3))
