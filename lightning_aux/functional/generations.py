"""How much of the ground truth a generation of self-distillation should see."""

from __future__ import annotations

from torch import Tensor

from .precision import at_least_float32


def optimal_target_weight(target: Tensor, with_target: Tensor, with_teacher: Tensor) -> Tensor:
    """The weight α of the ground truth in α·y + (1 − α)·f_teacher that predicts held-out data best.

    Where the fit is linear in its targets (kernel ridge regression; a network only nearly), the
    prediction for weight α is α·g₁ + (1 − α)·g₀, so that the best α is a projection in one
    dimension: ⟨y − g₀, g₁ − g₀⟩ / ‖g₁ − g₀‖² (Borup & Andersen 2021, "Even your Teacher Needs
    Guidance: Ground-Truth Targets Dampen Regularization Imposed by Self-Distillation",
    arXiv:2102.13088, which states that there is a closed form; this one is derived from it).

    Args:
        target: y of held-out data, or its one-hot form, any shape.
        with_target: g₁, held-out predictions of the generation trained on y alone, same shape.
        with_teacher: g₀, those of the generation trained on the teacher's predictions alone.

    Returns:
        A scalar; outside of [0, 1] when neither end is on the way to y.

    Raises:
        ValueError: for shapes that differ, or two generations that predict the same.
    """
    if not target.shape == with_target.shape == with_teacher.shape:
        raise ValueError(
            f"shapes differ: target {tuple(target.shape)}, with_target "
            f"{tuple(with_target.shape)}, with_teacher {tuple(with_teacher.shape)}"
        )
    teacher = at_least_float32(with_teacher)
    along = at_least_float32(with_target) - teacher
    length = along.square().sum()
    if not length > 0:
        raise ValueError("both generations predict the same: every weight is as good")
    return ((at_least_float32(target) - teacher) * along).sum() / length
