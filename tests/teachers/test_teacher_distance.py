"""``aux/<teacher>/distance`` is ‖θ_T − θ‖ / ‖θ‖ of the weights that the losses of its row saw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_aux as aux
from lightning_aux.weights import WeightStore
from tests.contract.strategies.watching import Rows
from tests.engine.small_models import Classifier, rows, weights

Weights = dict[str, Tensor]


class Walk(Classifier):
    """Every parameter walks at random; keeps its weights before the first and after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[Weights] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("theirs", self(batch[0]).mean())
        return self.drift()

    def drift(self) -> Tensor:
        return sum((p * torch.randn_like(p)).sum() for p in self.parameters())

    def on_train_start(self) -> None:
        self.history.append(weights(self))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        optimizer.register_step_post_hook(lambda *_: self.history.append(weights(self)))
        return optimizer


@pytest.fixture
def walk(plain_trainer: Callable[..., Any]) -> Callable[..., Any]:
    """The weights of a walk, and what was logged of the distance by optimizer steps before it."""

    def run(
        *added: Any, every: int = 1, model: Walk | None = None, **arguments: Any
    ) -> tuple[list[Weights], dict[int, dict[str, float]]]:
        torch.manual_seed(5)
        logger, model = Rows(), model or Walk()
        settings = {"max_epochs": 2, "log_every_n_steps": every} | arguments
        plain_trainer(logger=logger, callbacks=list(added), **settings).fit(model, rows())
        found = {
            step: {key: value for key, value in row.items() if key.endswith("/distance")}
            for step, row in zip(logger.steps, logger.rows, strict=True)
            if "theirs" in row
        }
        return model.history, found

    return run


def distance(teacher: Weights, student: Weights, names: Any = None) -> float:
    """In float64, of everything in one row."""
    names = list(student) if names is None else names
    ours = torch.cat([teacher[name].double().flatten() for name in names])
    theirs = torch.cat([student[name].double().flatten() for name in names])
    return float((ours - theirs).norm() / theirs.norm())


def averages(history: list[Weights], decay: float) -> list[Weights]:
    """φ ← d φ + (1 − d) θ in float64, after each step."""
    found = [{name: value.double() for name, value in history[0].items()}]
    for now in history[1:]:
        before = found[-1]
        found.append({n: decay * before[n] + (1 - decay) * now[n].double() for n in now})
    return found


def mean(sets: list[Weights]) -> Weights:
    return {name: sum(each[name].double() for each in sets) / len(sets) for name in sets[0]}


@pytest.mark.parametrize(
    ("settings", "due"),
    [
        ({}, range(12)),
        ({"every": 3}, range(2, 12, 3)),
        ({"accumulate_grad_batches": 2}, range(6)),
        ({"accumulate_grad_batches": 4, "every": 2}, range(1, 4, 2)),
        ({"precision": "bf16-true"}, range(12)),
    ],
    ids=["each step", "every third", "accumulated", "uneven windows", "bf16-true"],
)
def test_it_is_the_closed_form_before_the_optimizer_step(walk, settings, due):
    history, logged = walk(aux.EMATeacher(decay=0.7), **settings)
    assert list(logged) == list(due)
    average = averages(history, 0.7)
    for step, row in logged.items():
        expected = distance(average[step], history[step])
        assert row == {"aux/ema/distance": pytest.approx(expected, rel=1e-5)}
    assert logged[max(due)]["aux/ema/distance"] > 0.01


def snapshot(history: list[Weights], step: int) -> float:
    return distance(history[step - step % 4], history[step])


def window(history: list[Weights], step: int) -> float:
    taken = [history[at] for at in range(0, step + 1, 4)]
    return distance(mean(taken[-2:]), history[step])


def voted(history: list[Weights], step: int) -> float:
    taken = [history[at] for at in range(0, step + 1, 4)][-2:]
    return sum(distance(each, history[step]) for each in taken) / len(taken)


def swa(history: list[Weights], step: int) -> float:
    taken = [history[at] for at in range(2, step + 1, 2)]
    return distance(mean(taken), history[step]) if taken else 0.0


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        (lambda: aux.SnapshotTeacher(every=4), snapshot),
        (lambda: aux.SnapshotTeacher(every=4, window=2), window),
        (lambda: aux.SnapshotTeacher(every=4, window=2, offload=True), window),
        (lambda: aux.VotedTeacher(every=4, snapshots=2), voted),
        (lambda: aux.SWATeacher(start=0, every=2), swa),
        (aux.FrozenTeacher, lambda history, step: distance(history[0], history[step])),
    ],
    ids=["snapshot", "window", "offloaded window", "voted", "swa", "frozen"],
)
def test_it_is_the_closed_form_of_every_rule(teacher, expected, walk):
    added = teacher()
    history, logged = walk(added)
    for step, row in logged.items():
        now = expected(history, step)
        assert row == {f"aux/{added.name}/distance": pytest.approx(now, rel=1e-5, abs=1e-9)}
    assert logged[11][f"aux/{added.name}/distance"] > 0.01


def test_an_average_in_host_memory_has_the_same(walk):
    (_, there), (_, here) = (walk(aux.EMATeacher(0.7, offload=each)) for each in (True, False))
    assert there == here


def test_a_random_teacher_is_as_far_as_its_weights(walk):
    teacher = aux.RandomTeacher()
    history, logged = walk(teacher)
    drawn = teacher.store.state_dict()
    assert logged[7]["aux/random/distance"] == pytest.approx(distance(drawn, history[7]), rel=1e-5)


def test_until_the_average_begins_it_is_nought(walk):
    _, logged = walk(aux.EMATeacher(0.7, start=4))
    values = [row["aux/ema/distance"] for row in logged.values()]
    assert values[:5] == [0.0] * 5
    assert min(values[5:]) > 0


def test_there_is_none_before_the_first_snapshot(walk):
    _, logged = walk(aux.VotedTeacher(every=4, start=4))
    assert [bool(row) for row in logged.values()] == [False] * 4 + [True] * 8


def test_there_is_none_of_another_module(walk):
    _, logged = walk(aux.FrozenTeacher(module=Classifier().classifier))
    assert list(logged.values()) == [{}] * 12


def test_parameters_that_do_not_train_do_not_count(walk):
    model = Walk()
    model.classifier.requires_grad_(False).weight.fill_(100)
    model.drift = lambda: sum(each.square().sum() for each in model.encoder.parameters())
    history, logged = walk(aux.FrozenTeacher(), model=model)
    names = [name for name in history[0] if name.startswith("encoder")]
    expected = distance(history[0], history[11], names)
    assert logged[11] == {"aux/frozen/distance": pytest.approx(expected, rel=1e-5)}


def test_it_is_that_of_the_weights_and_not_of_what_stands_in_for_them(walk):
    """`QuantizedWeights` has others in the module while the terms are computed."""
    quantized, teacher = aux.QuantizedWeights(bits=2), aux.FrozenTeacher()
    history, logged = walk(teacher, quantized)
    for step, row in logged.items():
        expected = distance(history[0], history[step])
        assert row == {"aux/frozen/distance": pytest.approx(expected, rel=1e-5, abs=1e-9)}


def test_nothing_is_measured_on_other_steps(walk, monkeypatch):
    measured, real = [], WeightStore.distance
    monkeypatch.setattr(WeightStore, "distance", lambda self: measured.append(1) or real(self))
    _, logged = walk(aux.EMATeacher(), every=5)
    assert len(measured) == len(logged) == 2
