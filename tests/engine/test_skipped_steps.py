"""Steps that are not one forward, one backward, one update: ``None``, LBFGS, an overflow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_aux as aux
from lightning_aux.registry import ENTRIES
from tests.contract import models as contract
from tests.contract.references import Reference, Taught, reference
from tests.contract.training import fit, loader, seeded
from tests.engine.small_models import (
    Blind,
    Classifier,
    Probe,
    Shrink,
    largest_difference,
    leaves,
    rows,
    weights,
)


class Picky(Classifier):
    """Skips every third batch, the first included; ``by_hand`` is the term written in."""

    def __init__(self, by_hand: float = 0.0) -> None:
        super().__init__()
        self.by_hand = by_hand

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        if batch_idx % 3 == 0:
            return None
        return F.cross_entropy(logits, y) + self.by_hand * logits.square().mean()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.*")
def test_a_step_that_returns_none_gets_no_term(accumulate, plain_trainer):
    results = []
    probe = Blind(lambda step: step.batch_idx)
    for by_hand, callbacks in ((0.3, []), (0.0, [Shrink(0.3), probe])):
        torch.manual_seed(5)
        model = Picky(by_hand)
        plain_trainer(max_epochs=2, callbacks=callbacks, accumulate_grad_batches=accumulate).fit(
            model, rows()
        )
        results.append(weights(model))
    assert largest_difference(*results) < 1e-6
    assert probe.seen == [1, 2, 4, 5] * 2


class Curved(Classifier):
    """Trained by LBFGS, which runs the step as often as it likes before it moves on."""

    def __init__(self, by_hand: float = 0.0) -> None:
        super().__init__()
        self.by_hand = by_hand
        self.evaluations = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.evaluations += 1
        x, y = batch
        logits = self(x)
        return F.cross_entropy(logits, y) + self.by_hand * logits.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4)


def test_every_closure_of_lbfgs_has_the_term_and_the_clock_counts_its_steps(plain_trainer):
    results, evaluations = [], []
    teacher, probe = aux.EMATeacher(decay=0.5), Blind(lambda step: step.progress.steps)
    for by_hand, callbacks in ((0.3, []), (0.0, [Shrink(0.3), teacher, probe])):
        torch.manual_seed(5)
        model = Curved(by_hand)
        plain_trainer(callbacks=callbacks).fit(model, rows())
        results.append(weights(model))
        evaluations.append(model.evaluations)
    assert largest_difference(*results) < 1e-6
    assert evaluations[0] == evaluations[1] > 6
    assert teacher.updates == 6
    assert sorted(set(probe.seen)) == [0, 1, 2, 3, 4, 5]


def test_every_closure_of_lbfgs_sees_the_indices_of_its_batch(plain_trainer):
    probe = Probe(lambda step: (step.index.tolist(), step.batch[0][:, -1].long().tolist()))
    plain_trainer(callbacks=[probe]).fit(Curved(), rows(24, 4, shuffle=True))
    assert len(probe.seen) > 6
    assert all(claimed == true for claimed, true in probe.seen)


def test_a_memory_per_sample_moves_once_per_step_of_lbfgs(plain_trainer):
    elr = aux.EarlyLearningRegularization(momentum=0.7)
    plain_trainer(callbacks=[elr]).fit(Curved(), rows(24, 4))
    # One visit: t = (1 − β) p with p summing to 1.
    assert torch.allclose(elr.memory.rows.sum(1), torch.full((24,), 0.3), atol=1e-5)


class Inherited(torch.optim.SGD):
    """Its ``step`` calls that of its base class: torch fires the hooks of a step for each of them,
    once a plain SGD has been made anywhere in the process."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Heir(Classifier):
    def configure_optimizers(self) -> Any:
        torch.optim.SGD(self.parameters(), lr=0.1)
        return Inherited(self.parameters(), lr=0.1)


def test_an_optimizer_that_calls_the_step_of_its_base_class_steps_once(plain_trainer):
    teacher, probe = aux.EMATeacher(), Blind(lambda step: step.progress.steps)
    plain_trainer(callbacks=[teacher, probe]).fit(Heir(), rows())
    assert teacher.updates == 6
    assert probe.seen == [0, 1, 2, 3, 4, 5]


# ------------------------------------------------------------- steps that a gradient scaler skips
class Rounded(nn.Module):
    """Part of a teacher; what it gives out is float32, as the formulas want it."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x).float()


class Overflowing(contract.Classifier):
    """Its loss is infinite in the batches 0 and 3 of training, under `16-mixed` on the CPU."""

    fused = False
    batches = 0

    def total_loss(self, batch: Any) -> Tensor:
        loss = super().total_loss(batch)
        self.batches += 1
        return loss * float("inf") if self.batches - 1 in OVERFLOWS else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02, fused=self.fused)


class ByBatch(L.Callback):
    """Copies what may move, after every batch."""

    def __init__(self, look: Callable[[Overflowing], Any]) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(deepcopy(self.look(pl_module)))


class Sorted(aux.Objective):
    """A head on features; its first weights are kept for the loop by hand."""

    def __init__(self) -> None:
        super().__init__(WEIGHT, reads=("encoder",))

    def build_head(self, module: nn.Module) -> nn.Module:
        head = nn.Linear(contract.HIDDEN, contract.CLASSES)
        self.first = deepcopy(head)
        return head

    def loss(self, step: aux.Step) -> Tensor:
        return F.cross_entropy(self.head(step.features("encoder")).float(), step.target)


class Counted(aux.Objective):
    """Keeps the number of steps taken; its loss does not touch the user's infinite one."""

    observes = True

    def __init__(self, weight: float) -> None:
        super().__init__(weight)
        self.seen: list[int] = []

    def loss(self, step: aux.Step) -> Tensor:
        self.seen.append(step.progress.steps)
        return step.logits.detach().mean() * 0.0


class SortedByHand(Reference):
    def __init__(self, head: nn.Module) -> None:
        self.head = head

    def term(self, module: Any, batch: Any, logits: Tensor) -> Tensor:
        return F.cross_entropy(self.head(module.encoder(batch[0])).float(), batch[1])


OVERFLOWS = (0, 3)
BATCHES = 10
WEIGHT = "linear(0.2, 1, until=50%)"
KINDS = {
    "automatic": {},
    "manual": {"manual": True},
    "fused": {"fused": True},
    "manual and fused": {"manual": True, "fused": True},
}


# The user's loss is in the term again, or small differences of features decide on directions.
ROUNDED_MORE = ("knowledge_distillation", "multi_teacher_distillation")


def new(manual: bool = False, fused: bool = False, dropout: float = 0.2) -> Overflowing:
    module = seeded(Overflowing, dropout=dropout, manual=manual)
    module.fused = fused
    return module


def half_precision() -> MixedPrecision:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return MixedPrecision("16-mixed", device="cpu", scaler=scaler)


def two_epochs() -> Iterator[Any]:
    """Each loader draws a random number when its epoch begins, which dropout then comes after."""
    for _ in range(2):
        yield from loader(indexed=True)


def by_hand(term: Reference, **kind: Any) -> dict[str, Tensor]:
    """The same training as a loop; what is not a model's weight moves on real steps only."""
    module = new(**kind)
    optimizer = module.configure_optimizers()
    module.optimizers = lambda: optimizer
    if isinstance(term, SortedByHand):
        optimizer.param_groups[0]["params"].extend(term.head.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    L.seed_everything(1, verbose=False)  # which heads begin from
    term.begin(module)
    if isinstance(term, Taught):
        term.teacher = nn.Sequential(*map(Rounded, term.teacher)).eval()
    L.seed_everything(1, verbose=False)
    steps = 0
    for place, batch in enumerate(two_epochs()):
        term.before(module, steps, BATCHES)
        weight = 0.2 + 0.8 * steps / 5 if steps < 5 else 1.0
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            logits = module(batch[0])
            loss = F.cross_entropy(logits, batch[1])
            loss = loss * float("inf") if place in OVERFLOWS else loss
            loss = loss + weight * term.term(module, batch, logits.float())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if place in OVERFLOWS:
            if hasattr(term, "pending"):
                term.pending = {}
        else:
            steps += 1
            with torch.no_grad():
                term.stepped(module)
    assert scaler.get_scale() == 2.0**8
    return weights(module)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "entry",
    # But for the one that takes the optimizers of a Trainer back to where they began.
    [n for n, each in ENTRIES.items() if (each.objective or not each.inert) and not each.begins],
)
def test_f16_training_with_steps_that_the_scaler_skips_is_that_of_a_loop_by_hand(
    entry: str, kind: str
) -> None:
    """Teachers, the weight's schedule, rates and memories know of the real steps only."""
    module = new(**KINDS[kind])
    trainer = fit(module, ENTRIES[entry].make(WEIGHT), plugins=[half_precision()])
    assert trainer.precision_plugin.scaler.get_scale() == 2.0**8
    actual = weights(module)
    expected = by_hand(reference(entry), **KINDS[kind])
    # Rounding in float16, where the user's gradient and the term's are added in another order.
    tolerance = 5e-4 if entry in ROUNDED_MORE else 1e-4
    assert largest_difference(actual, expected) < tolerance
    without = by_hand(Reference(), **KINDS[kind])
    assert largest_difference(expected, without) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_f16_a_skipped_step_moves_no_teacher_memory_schedule_rate_or_head(kind: str) -> None:
    """By batch: nothing at 0 and 3, everything at the others."""
    teacher, elr = aux.EMATeacher(decay=0.9), aux.EarlyLearningRegularization(weight=0.5)
    rate = aux.DropoutSchedule(0.5, until="100%", shape="linear")
    head, factors = Sorted(), Counted(0.0)
    shrink = Shrink(WEIGHT)

    def look(module: Overflowing) -> dict[str, Any]:
        rows = elr.memory.rows
        return {
            "updates": teacher.updates,
            "teacher": {n: v for n, v in teacher.state()["weights"].items() if "num" not in n},
            "memory": None if rows is None else rows.clone(),
            "head": dict(head.head.named_parameters()),
            "weights": dict(module.named_parameters()),
        }

    by_batch = ByBatch(look)
    rates: list[float] = []
    noted = ByBatch(lambda module: rates.append(module.encoder[-1].p))
    attached = [teacher, elr, rate, head, factors, shrink, aux.SelfDistillation(), by_batch, noted]
    module = new(**KINDS[kind])
    fit(module, attached, plugins=[half_precision()])
    real = [place not in OVERFLOWS for place in range(BATCHES)]
    taken = [sum(real[:place]) for place in range(BATCHES)]
    assert factors.seen == taken
    assert rates == pytest.approx([0.5 * (1 - steps / 9) for steps in taken])
    assert [each["updates"] for each in by_batch.seen] == [sum(real[: p + 1]) for p in range(10)]
    for place in range(1, BATCHES):
        before, after = by_batch.seen[place - 1], by_batch.seen[place]
        for what in ("teacher", "memory", "head", "weights"):
            one, other = list(leaves(before[what])), list(leaves(after[what]))
            same = [torch.equal(x, y) for x, y in zip(one, other, strict=True)]
            assert not any(same) if real[place] else all(same), (place, what)
    start = dict(new().named_parameters())
    assert all(torch.equal(v, start[n]) for n, v in by_batch.seen[0]["weights"].items())
    assert all(torch.equal(v, start[n]) for n, v in by_batch.seen[0]["teacher"].items())
    assert float(by_batch.seen[0]["memory"].abs().max()) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_f16_a_head_trains_as_in_a_loop_by_hand_that_skips_the_same_steps(kind: str) -> None:
    """Without dropout: the loop makes the features a second time."""
    how = {**KINDS[kind], "dropout": 0.0}
    head, module = Sorted(), new(**how)
    fit(module, [head], plugins=[half_precision()])
    hand = SortedByHand(deepcopy(head.first))
    assert largest_difference(weights(module), by_hand(hand, **how)) < 1e-4
    assert largest_difference(weights(head.head), weights(hand.head)) < 1e-4
    assert largest_difference(weights(head.first), weights(hand.head)) > 0.05
