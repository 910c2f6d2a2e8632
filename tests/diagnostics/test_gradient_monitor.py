"""``GradientMonitor``: its values by hand, its cost, and training as without it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lightning_aux as aux
from tests.contract.models import CLASSES, FEATURES, Classifier
from tests.contract.training import (
    fit,
    identical,
    loader,
    optimizer_state,
    random_state,
    seeded,
    weights,
)
from tests.diagnostics import monitored_in_two_processes
from tests.two_processes import run_script

PREFIX = "aux/gradients/"
WEIGHT = 0.3


class Encoded(aux.Objective):
    """A term that the head of the model is no part of."""

    def __init__(self, weight: float | str = WEIGHT, **options: Any) -> None:
        super().__init__(weight, reads="encoder", **options)

    def loss(self, step: aux.Step) -> Tensor:
        return step.features("encoder").square().mean()


def rows_of(folder: Path, module: Any, added: list[Any], **options: Any) -> list[dict[str, float]]:
    """What was logged of ours, by step."""
    logger = CSVLogger(folder, name="", version="run")
    fit(module, added, logger=logger, **{"log_every_n_steps": 1, "max_epochs": 1} | options)
    with (folder / "run" / "metrics.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [
        {k.removeprefix(PREFIX): v for k, v in row.items() if k.startswith(PREFIX) or k == "step"}
        for row in rows
        if any(k.startswith(PREFIX) for k in row)
    ]


def flat(gradients: Any) -> Tensor:
    return torch.cat([each.double().flatten() for each in gradients])


def by_hand(batches: list[Any]) -> list[dict[str, float]]:
    """A plain loop: SGD with momentum, as the model's, and the gradients of both terms alone."""
    model = seeded(Classifier)
    shared, own = list(model.encoder.parameters()), list(model.head.parameters())
    optimizer = torch.optim.SGD(model.parameters(), model.lr, momentum=0.9)
    found = []
    for x, y in batches:
        features = model.encoder(x)
        z = model.head(features)
        main = F.cross_entropy(z, y)
        encoded = WEIGHT * features.square().mean()
        smoothed = 0.5 * (z.gather(1, y[:, None])[:, 0] - z.mean(1)).mean()
        whole = torch.autograd.grad(main, [*shared, *own], retain_graph=True)
        g, e = (
            flat(whole[: len(shared)]),
            flat(torch.autograd.grad(encoded, shared, retain_graph=True)),
        )
        s = flat(torch.autograd.grad(smoothed, [*shared, *own], retain_graph=True))
        found.append(
            {
                "main_norm": flat(whole).norm(),
                "encoded_norm": e.norm(),
                "encoded_cosine": F.cosine_similarity(g, e, dim=0),
                "encoded_ratio": e.norm() / g.norm(),
                "label_smoothing_norm": s.norm(),
                "label_smoothing_cosine": F.cosine_similarity(flat(whole), s, dim=0),
                "label_smoothing_ratio": s.norm() / flat(whole).norm(),
            }
        )
        optimizer.zero_grad()
        (main + encoded + smoothed).backward()
        optimizer.step()
    return [{key: float(value) for key, value in each.items()} for each in found]


TERMS = ("encoded", "label_smoothing")


def terms() -> list[Any]:
    return [Encoded(), aux.LabelSmoothing(0.5)]


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_norms_cosines_and_ratios_are_those_of_a_plain_loop(tmp_path: Path, manual: bool) -> None:
    module = seeded(Classifier, manual=manual)
    rows = rows_of(tmp_path, module, [aux.GradientMonitor(every=1), *terms()])
    expected = by_hand(list(loader()))
    assert len(rows) == len(expected) == 5
    for row, values in zip(rows, expected, strict=True):
        assert row.pop("step") >= 0
        assert row == pytest.approx(values, rel=1e-4, abs=1e-6)
    assert any(abs(values["encoded_cosine"]) > 0.05 for values in expected)


def test_a_head_is_no_shared_parameter(tmp_path: Path) -> None:
    """The term reaches nothing but its head where the features have no gradient."""

    class Headed(aux.Objective):
        def build_head(self, module: nn.Module) -> nn.Module:
            return nn.Linear(CLASSES, 1)

        def loss(self, step: aux.Step) -> Tensor:
            return self.head(step.logits.detach()).square().mean()

    (*_, row) = rows_of(
        tmp_path, seeded(Classifier), [aux.GradientMonitor(every=1), Headed(name="headed")]
    )
    assert row["headed_norm"] == row["headed_cosine"] == row["headed_ratio"] == 0.0
    assert row["main_norm"] > 0


# ----------------------------------------------------------------------------------- when it is due
@pytest.mark.parametrize(
    ("every", "log_every", "options", "steps", "passes"),
    [
        (1, 1, {}, [0, 1, 2, 3, 4], 5),
        (2, 1, {}, [0, 2, 4], 3),
        (3, 2, {}, [1, 3], 3),  # and the first step, where errors show
        (1, 1, {"accumulate_grad_batches": 2}, [0, 1, 2], 3),
    ],
)
def test_it_is_measured_in_the_first_logged_step_after_each_time_and_costs_nothing_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every: int,
    log_every: int,
    options: Any,
    steps: list[int],
    passes: int,
) -> None:
    grad, calls = torch.autograd.grad, []
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
    added = [aux.GradientMonitor(every=every), Encoded()]
    rows = rows_of(tmp_path, seeded(Classifier), added, log_every_n_steps=log_every, **options)
    norms = [{}, *rows]
    changed = [b for a, b in zip(norms, rows, strict=False) if a.get("main_norm") != b["main_norm"]]
    assert [row["step"] for row in changed] == steps
    assert len(calls) == 2 * passes  # one for the loss and one for the term


def test_of_a_window_it_is_the_first_micro_batch(tmp_path: Path) -> None:
    added = [aux.GradientMonitor(every=1), *terms()]
    rows = rows_of(tmp_path, seeded(Classifier), added, accumulate_grad_batches=5)
    (row,) = rows
    del row["step"]
    assert row == pytest.approx(by_hand(list(loader()))[0], rel=1e-4, abs=1e-6)


def test_a_term_of_weight_0_has_a_gradient_of_0(tmp_path: Path) -> None:
    added = [aux.GradientMonitor(every=1), Encoded("early(0.3, until=2 steps)")]
    rows = rows_of(tmp_path, seeded(Classifier), added)
    for key in ("encoded_norm", "encoded_cosine", "encoded_ratio"):
        assert [row[key] != 0 for row in rows] == [True, True, False, False, False]
    assert all(row["main_norm"] > 0 for row in rows)


def test_a_resumed_run_measures_in_the_same_steps(tmp_path: Path) -> None:
    """Stopped between the time and the step that is logged."""
    whole = rows_of(
        tmp_path / "whole",
        seeded(Classifier),
        [aux.GradientMonitor(every=3), Encoded()],
        log_every_n_steps=4,
        max_epochs=2,
    )
    first = fit(
        seeded(Classifier), [aux.GradientMonitor(every=3), Encoded()], max_steps=5, max_epochs=1
    )
    first.save_checkpoint(tmp_path / "at.ckpt")
    rest = rows_of(
        tmp_path / "rest",
        seeded(Classifier),
        [aux.GradientMonitor(every=3), Encoded()],
        log_every_n_steps=4,
        max_epochs=2,
        ckpt_path=tmp_path / "at.ckpt",
    )
    assert rest == [pytest.approx(row) for row in whole if row["step"] >= 5]
    assert rest


# ------------------------------------------------------------------------ training is the same
class Counted(nn.Module):
    """Draws, counts and normalises within what a backward pass runs again."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 8)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.norm(self.linear(x)).tanh(), 0.3)


class Checkpointed(Classifier):
    def __init__(self, reentrant: bool = False, **how: Any) -> None:
        super().__init__()
        self.encoder = Counted()
        self.how = {"use_reentrant": reentrant, **how}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.encoder, x.requires_grad_(), **self.how))


def distilling() -> list[Any]:
    return [
        aux.EMATeacher(decay=0.9),
        aux.SelfDistillation(weight=0.3, temperature=3.0),
        aux.ParameterAnchor(weight=0.7),
        aux.EarlyLearningRegularization(weight=0.3),
    ]


@pytest.mark.parametrize(
    ("kind", "model", "options"),
    [
        (Classifier, {"dropout": 0.2, "norm": True}, {}),
        (Classifier, {"dropout": 0.2, "manual": True}, {}),
        (Classifier, {"optimizer": "adam"}, {"accumulate_grad_batches": 2}),
        (Classifier, {}, {"precision": "bf16-mixed"}),
        (Classifier, {}, {"precision": "bf16-true"}),
        (Checkpointed, {}, {}),
        (Checkpointed, {"preserve_rng_state": False}, {}),
    ],
    ids=["plain", "manual", "accumulated", "bf16", "bf16-true", "checkpointed", "drawing-again"],
)
def test_training_is_bit_identical_with_terms_of_weight(
    kind: Any, model: Any, options: Any
) -> None:
    def ended(added: list[Any]) -> Any:
        module = seeded(kind, **model)
        trainer = fit(module, [*added, *distilling()], log_every_n_steps=1, **options)
        return weights(module), optimizer_state(trainer), random_state()

    with_monitor = ended([aux.GradientMonitor(every=1)])
    assert identical(with_monitor, ended([]))


# ------------------------------------------------------------------------------------ precision
def test_under_a_gradient_scaler_gradients_are_unscaled(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    added = [aux.GradientMonitor(every=1), *terms()]
    rows = rows_of(tmp_path, seeded(Classifier), added, plugins=[plugin])
    assert scaler.get_scale() == 2.0**10
    for row, values in zip(rows, by_hand(list(loader())), strict=True):
        del row["step"]
        assert row == pytest.approx(values, rel=0.02, abs=1e-3)


# --------------------------------------------------------------------------------------- refusals
def test_a_backward_that_cannot_run_twice_is_an_error_of_the_first_step() -> None:
    module = seeded(Checkpointed, reentrant=True)
    start = weights(module)
    with pytest.raises(aux.AuxiliaryError, match=r"gradients: the backward of the loss.*reentrant"):
        fit(module, [aux.GradientMonitor()], log_every_n_steps=50)
    assert all(torch.equal(each, start[name]) for name, each in module.named_parameters())


def test_a_graph_that_is_compiled_in_training_can_be_run_twice(tmp_path: Path) -> None:
    torch._dynamo.reset()
    module = seeded(Classifier)
    module.encoder = torch.compile(module.encoder, backend="aot_eager")
    before = functorch.donated_buffer
    rows = rows_of(tmp_path, module, [aux.GradientMonitor(every=1), *terms()])
    assert functorch.donated_buffer == before
    for row, values in zip(rows, by_hand(list(loader())), strict=True):
        del row["step"]
        assert row == pytest.approx(values, rel=1e-4, abs=1e-6)


def test_an_interval_that_is_none_is_refused() -> None:
    with pytest.raises(aux.AuxiliaryError, match="gradients: every='often'"):
        aux.GradientMonitor(every="often")


def test_a_sharded_model_is_refused_before_training() -> None:
    class ModelParallelStrategy:
        """Known by its name, as Lightning's is."""

    trainer = SimpleNamespace(strategy=ModelParallelStrategy())
    with pytest.raises(aux.AuxiliaryError, match="gradients: the graph of a sharded model"):
        aux.GradientMonitor().check(SimpleNamespace(trainer=trainer))


# ----------------------------------------------------------------------------------- two processes
@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gradient_monitor")
    run_script(monitored_in_two_processes.__file__, folder, timeout=120)
    return folder


@pytest.mark.slow
@pytest.mark.xdist_group("gradient_monitor")
def test_two_processes_log_the_gradients_of_the_whole_batch(two_processes: Path) -> None:
    expected = monitored_in_two_processes.run(monitored_in_two_processes.Noting)
    first, second = (
        json.loads((two_processes / f"logged.{rank}.json").read_text()) for rank in (0, 1)
    )
    assert first == second
    assert len(first) == len(expected) == 5
    for row, values in zip(first, expected, strict=True):
        assert row == pytest.approx(values, rel=1e-4, abs=1e-6)
        assert len(row) == 7


@pytest.mark.slow
@pytest.mark.xdist_group("gradient_monitor")
def test_a_backward_that_fails_on_one_process_ends_both(two_processes: Path) -> None:
    first, second = (
        json.loads((two_processes / f"raised.{rank}.json").read_text()) for rank in (0, 1)
    )
    assert first[0] == second[0] == "AuxiliaryError"
    assert "the backward of the loss failed on another process" in first[1]
    assert "only here." in second[1]
