"""C5: under `bf16-mixed` training stays near float32, and teachers use their own weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_aux import EMATeacher, FrozenTeacher, Objective, Step
from tests.contract.models import Classifier
from tests.contract.training import (
    callbacks,
    every_term,
    fit,
    largest_difference,
    loader,
    seeded,
    weights,
)


@every_term
def test_bf16_mixed_trains_near_float32(entry: str) -> None:
    """Every logged number is finite and every weight within 2e-2 after ten steps."""

    def run(precision: Any) -> dict[str, Tensor]:
        module = seeded(Classifier, norm=True)
        fit(module, callbacks(entry, 0.5), precision=precision)
        return weights(module)

    half, full = run("bf16-mixed"), run("32-true")
    assert all(value.isfinite().all() for value in half.values())
    assert 0 < largest_difference(half, full) < 2e-2


class Collects(Objective):
    """Keeps a teacher's logits and the student's of every step."""

    def __init__(self, teacher: str) -> None:
        super().__init__()
        self.teacher = teacher
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def loss(self, step: Step) -> Tensor:
        taught = step.teacher(self.teacher).logits
        self.seen.append((step.input(), taught.detach(), step.logits.detach()))
        return step.logits.float().square().mean()


class OwnAutocast(Classifier):
    """Opens autocast itself, with its cache on, and calls backward inside."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("kind", "model", "precision"),
    [(Classifier, {}, "bf16-mixed"), (OwnAutocast, {"manual": True}, "32-true")],
    ids=["Lightning's autocast", "the user's own autocast"],
)
def test_under_autocast_a_teacher_answers_with_its_own_weights(
    tmp_path: Path, kind: type[Classifier], model: dict[str, Any], precision: Any
) -> None:
    """Autocast caches its casts by parameter: the student's must not stand in for the teacher's."""
    torch.manual_seed(9)
    other = Classifier().eval()
    torch.save(other.state_dict(), tmp_path / "other.pt")
    collects = Collects("frozen")
    teacher = FrozenTeacher(checkpoint=tmp_path / "other.pt")
    fit(seeded(kind, **model), [teacher, collects], precision=precision)
    assert len(collects.seen) == 10
    for x, taught, own in collects.seen:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = other(x)
        assert torch.equal(taught, expected)
        assert not torch.equal(own, expected)


def test_under_autocast_the_students_backward_uses_its_own_weights() -> None:
    """The same training with and without a teacher's forward in the middle of every step."""

    class Looks(Objective):
        observes = True

        def loss(self, step: Step) -> Tensor:
            return (step.teacher("ema").logits - step.logits).square().mean()

    def run(added: list[Any]) -> dict[str, Tensor]:
        module = seeded(Classifier, norm=True)
        fit(module, added, loader(), precision="bf16-mixed")
        return weights(module)

    looked = run([EMATeacher(decay=0.5), Looks(weight=0.0)])
    assert largest_difference(looked, run([])) == 0


def test_an_average_of_bfloat16_weights_moves() -> None:
    """In bfloat16 itself a decay of 0.999 would round to no change at all."""
    teacher = EMATeacher(decay=0.999)
    module = seeded(Classifier)
    start = {name: value.clone() for name, value in weights(module).items()}
    fit(module, [teacher], precision="bf16-true")
    averaged = teacher.state()["weights"]
    assert averaged["head.weight"].dtype == torch.float32
    moved = (averaged["head.weight"] - start["head.weight"].bfloat16().float()).abs().max()
    assert 0 < moved < 2e-2
