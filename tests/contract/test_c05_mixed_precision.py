"""C5: in half precision terms are the hand-written ones, and teachers use their own weights.

With `bf16-mixed` the weights are float32 and training stays near that in float32. With `bf16-true`
the weights themselves are bfloat16, which teachers and memories are not.
"""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_aux import EarlyLearningRegularization, EMATeacher, FrozenTeacher, Objective, Step
from lightning_aux.registry import ENTRIES
from lightning_aux.teachers import Teacher
from tests.contract.models import Classifier
from tests.contract.references import HandWritten, Reference, Taught, reference
from tests.contract.training import (
    callbacks,
    every_entry,
    every_term,
    fit,
    largest_difference,
    loader,
    seeded,
    weights,
)

TRAINED = [name for name, entry in ENTRIES.items() if entry.objective or not entry.inert]


every_half_precision = pytest.mark.parametrize(
    "precision",
    [pytest.param(each, marks=pytest.mark.vouches(each)) for each in ("bf16-mixed", "bf16-true")],
)


@pytest.mark.vouches("bf16-mixed")
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


# ------------------------------------------------------------- against the term written by hand
class Rounded(nn.Module):
    """Part of a model with float32 values, which computes with them rounded to `dtype`."""

    def __init__(self, part: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.part = part.float()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return deepcopy(self.part).to(self.dtype)(x.to(self.dtype)).float()


class InFloat32(Reference):
    """A reference whose formulas see float32 logits and whose averages are kept in float32.

    Everything else, the user's model and its own loss included, is in the precision of the run.
    """

    def __init__(self, inner: Reference, dtype: torch.dtype) -> None:
        self.inner, self.dtype = inner, dtype

    def begin(self, module: Classifier) -> None:
        self.inner.begin(module)
        if isinstance(self.inner, Taught):
            parts = [Rounded(part, self.dtype) for part in self.inner.teacher]
            self.inner.teacher = nn.Sequential(*parts).eval().requires_grad_(False)

    def before(self, module: Classifier, steps: int, total: int) -> None:
        self.inner.before(module, steps, total)

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        return self.inner.term(module, batch, logits.float())

    def stepped(self, module: Classifier) -> None:
        self.inner.stepped(module)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Root of the sum of squares over all weights."""
    assert one.keys() == other.keys()
    return math.sqrt(sum(float((one[k].double() - other[k].double()).square().sum()) for k in one))


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@every_half_precision
@pytest.mark.parametrize("entry", TRAINED)
def test_in_half_precision_training_is_that_of_the_hand_written_term(
    entry: str, precision: Any, manual: bool
) -> None:
    """Equal but for rounding: the gradients at the logits are added up in another order.

    In bfloat16 one such sum may round to a neighbour (2⁻⁸ of it), and with bf16-true so may a
    weight. That is one place here and there, and over ten steps less than two units (2⁻⁷ of the
    largest weight) in any of them; a term that is wrong by a factor moves all of them.
    """
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32

    def run(term: Reference | None) -> dict[str, Tensor]:
        model = {"dropout": 0.2, "norm": True, "manual": manual}
        if term is not None:
            hand = seeded(HandWritten, InFloat32(term, dtype), 2.0, **model)
            fit(hand, data=loader(indexed=True), precision=precision)
            return weights(hand)
        module = seeded(Classifier, **model)
        fit(module, callbacks(entry, 2.0), loader(), precision=precision)
        return weights(module)

    expected, actual, without = run(reference(entry)), run(None), run(Reference())
    assert {value.dtype for value in actual.values() if value.is_floating_point()} == {dtype}
    largest = max(1.0, *(float(each.abs().max()) for each in expected.values()))
    assert largest_difference(actual, expected) < 2**-6 * largest
    assert distance(actual, expected) < 0.05 * distance(expected, without)


@every_half_precision
@every_entry
def test_teachers_and_memories_are_float32_in_every_precision(entry: str, precision: Any) -> None:
    """A memory in bfloat16 would round what it adds up to 2⁻⁸ of it."""
    attached = callbacks(entry, 0.5)
    module = seeded(Classifier, norm=True)
    fit(module, attached, precision=precision)
    parameters = {name for name, _ in module.named_parameters()}
    for each in [*attached, *(other for one in attached for other in one.companions())]:
        if isinstance(each, FrozenTeacher) and each.module is not None:
            assert {value.dtype for value in each.module.parameters()} == {torch.float32}
        elif isinstance(each, Teacher):
            state = each.state()
            sets = [one["weights"] for one in state.get("snapshots", [state])]
            assert sets
            for kept in sets:
                assert {kept[name].dtype for name in parameters} == {torch.float32}
                assert all(value.isfinite().all() for value in kept.values())
        if isinstance(each, EarlyLearningRegularization):
            assert each.memory.rows is not None
            assert each.memory.rows.dtype == torch.float32


class Drifting(Classifier):
    """Every weight falls by 2⁻⁸ in a step, a change that bfloat16 holds exactly near zero."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in self.parameters():
            nn.init.constant_(parameter, 1.0)
        self.history: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self(batch[0])
        return torch.stack([each.sum() for each in self.parameters()]).sum()

    def on_train_batch_end(self, *_: Any) -> None:
        self.history.append(self.head.bias.detach().double())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=2**-8)


def test_f17_a_thousand_updates_of_a_bfloat16_model_are_those_of_a_float64_loop() -> None:
    """decay = 0.9999: in bfloat16 every single update would round to no change at all."""
    teacher, module = EMATeacher(decay=0.9999), seeded(Drifting)
    fit(module, [teacher], precision="bf16-true", max_steps=1000, max_epochs=-1)
    assert module.head.bias.dtype == torch.bfloat16
    average = torch.ones(4, dtype=torch.float64)
    for value in module.history:
        average = 0.9999 * average + 0.0001 * value
    assert teacher.updates == len(module.history) == 1000
    assert float((1 - average).min()) > 0.05
    kept = teacher.state()["weights"]["head.bias"]
    assert kept.dtype == torch.float32
    assert float((kept.double() - average).abs().max()) < 1e-5


@pytest.mark.vouches("bf16-true")
@pytest.mark.parametrize("weight", [1.0, "linear(0, 1, until=50%)"])
@every_term
def test_in_bfloat16_terms_are_finite_where_logits_are_large(entry: str, weight: Any) -> None:
    """Logits of some hundreds: exponentials and logarithms without an fp32 island would not be."""

    class Loud(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return 300 * super().forward(x)

    module = seeded(Loud, lr=1e-4)
    fit(module, callbacks(entry, weight), precision="bf16-true")
    assert all(value.isfinite().all() for value in weights(module).values())
