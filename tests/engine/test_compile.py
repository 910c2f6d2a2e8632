"""``torch.compile``: the same training as eager, whichever part is compiled, and never a lost term.

The references are runs without compilation. Backend ``aot_eager`` goes through the same tracing,
functionalisation and autograd partitioning as the default one and needs no C++ compiler.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lightning_aux as aux
from tests.engine.small_models import (
    CLASSES,
    WIDTH,
    Blind,
    Classifier,
    Shrink,
    largest_difference,
    rows,
    weights,
)

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Calm(aux.Objective):
    """A term on features, with the path that it ``reads``."""

    def loss(self, step: aux.Step) -> Tensor:
        return step.features(self.reads[0]).square().mean()


class Reconstruction(aux.Objective):
    """A head on features."""

    def build_head(self, module: nn.Module) -> nn.Module:
        return nn.Linear(8, WIDTH)

    def loss(self, step: aux.Step) -> Tensor:
        return (self.head(step.features("encoder")) - step.batch[0].tanh()).square().mean()


OBJECTIVES: dict[str, Callable[[], list[Any]]] = {
    "logits": lambda: [Shrink(0.3)],
    "features": lambda: [Calm(0.3, reads=("encoder",))],
    "features inside": lambda: [Calm(0.3, reads=("encoder.0",))],
    "head": lambda: [Reconstruction(0.3, reads=("encoder",))],
    "teacher": lambda: [aux.EMATeacher(decay=0.5), aux.SelfDistillation(weight=2.0)],
    "teacher's features": lambda: [
        aux.EMATeacher(decay=0.5),
        aux.SelfDistillation(on="encoder.0", divergence="mse", weight=2.0),
    ],
    "anchor in weight space": lambda: [aux.EMAAnchor("weight", decay=0.5)],
    "memory per sample": lambda: [aux.EarlyLearningRegularization()],
    "dropout": lambda: [aux.DropoutSchedule(0.5, until="50%")],
}


def whole(model: Classifier, **how: Any) -> Any:
    return torch.compile(model, **how)


def by_method(model: Classifier, **how: Any) -> Any:
    model.compile(**how)
    return model


def submodule(model: Classifier, **how: Any) -> Any:
    model.encoder = torch.compile(model.encoder, **how)
    return model


def submodule_by_method(model: Classifier, **how: Any) -> Any:
    model.encoder.compile(**how)
    return model


def only_forward(model: Classifier, **how: Any) -> Any:
    model.forward = torch.compile(model.forward, **how)
    return model


WAYS = {
    each.__name__: each for each in (whole, by_method, submodule, submodule_by_method, only_forward)
}


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name.replace("_orig_mod.", ""): value for name, value in weights(model).items()}


def trained(
    plain_trainer: Any, callbacks: list[Any], compiled: Callable[[Classifier], Any]
) -> tuple[dict[str, Tensor], L.Trainer]:
    torch.manual_seed(6)
    model = Classifier()
    trainer = plain_trainer(max_epochs=2, callbacks=callbacks)
    trainer.fit(compiled(model), rows())
    return plain_weights(model), trainer


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("way", WAYS)
def test_training_is_that_of_the_eager_model(way, objective, plain_trainer):
    eager, _ = trained(plain_trainer, OBJECTIVES[objective](), lambda model: model)
    without, _ = trained(plain_trainer, [], lambda model: model)
    compiled, _ = trained(
        plain_trainer,
        OBJECTIVES[objective](),
        lambda model: WAYS[way](model, backend="aot_eager"),
    )
    assert largest_difference(eager, compiled) < TOLERANCE
    assert largest_difference(without, compiled) > 100 * TOLERANCE
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("objective", ["logits", "features inside", "teacher", "dropout"])
@pytest.mark.parametrize("way", ["whole", "by_method", "submodule"])
def test_a_full_graph_stays_one(way, objective, plain_trainer):
    """``fullgraph=True`` raises wherever our wrappers and hooks would break the graph."""
    eager, _ = trained(plain_trainer, OBJECTIVES[objective](), lambda model: model)
    compiled, _ = trained(
        plain_trainer,
        OBJECTIVES[objective](),
        lambda model: WAYS[way](model, backend="eager", fullgraph=True),
    )
    assert largest_difference(eager, compiled) < TOLERANCE


def test_f59_exchanging_the_weights_compiles_nothing_anew(plain_trainer):
    """One graph each: first step, later steps, the teacher's pass (F59)."""
    callbacks = [aux.EMATeacher(decay=0.5), aux.SelfDistillation()]
    torch.manual_seed(6)
    plain_trainer(max_epochs=8, callbacks=callbacks).fit(
        torch.compile(Classifier(), backend="eager"), rows()
    )
    assert counters["stats"]["unique_graphs"] <= 3
    assert not counters["graph_break"]


def test_the_teacher_of_a_compiled_model_moves_and_has_the_names_of_the_eager_one(plain_trainer):
    names, states = [], []
    for way in (lambda model: model, lambda model: submodule(model, backend="eager")):
        teacher = aux.EMATeacher(decay=0.5)
        trained(plain_trainer, [teacher, aux.SelfDistillation()], way)
        state = {
            name.replace("_orig_mod.", ""): value
            for name, value in teacher.store.state_dict().items()
        }
        states.append(state)
        names.append(sorted(teacher.store.state_dict()))
    assert largest_difference(*states) < TOLERANCE
    assert states[0]["classifier.weight"].abs().sum() > 0


def warm(model: Classifier) -> Any:
    """Compiled and called, with its backward, before anybody attaches anything."""
    model = submodule(model, backend="eager")
    model(torch.randn(4, WIDTH)).sum().backward()
    model.zero_grad()
    return model


def test_a_feature_that_was_compiled_before_it_had_a_hook_is_a_named_error(plain_trainer):
    """torch does not guard hooks: the compiled code would go on without the new one (F60)."""
    with pytest.raises(aux.AuxiliaryError, match=r"call torch\._dynamo\.reset\(\) before Trainer"):
        trained(plain_trainer, OBJECTIVES["features inside"](), warm)


@pytest.mark.parametrize("objective", ["features", "features inside", "teacher"])
def test_after_the_reset_that_the_error_names_it_is_captured(objective, plain_trainer):
    def warm_then_reset(model: Classifier) -> Any:
        model = warm(model)
        torch._dynamo.reset()
        return model

    def called(model: Classifier) -> Any:  # the same random numbers are drawn
        model(torch.randn(4, WIDTH))
        return model

    eager, _ = trained(plain_trainer, OBJECTIVES[objective](), called)
    compiled, _ = trained(plain_trainer, OBJECTIVES[objective](), warm_then_reset)
    assert largest_difference(eager, compiled) < TOLERANCE


@pytest.mark.parametrize("way", ["whole", "submodule", "submodule_by_method"])
def test_a_second_fit_of_a_compiled_model_is_captured_by_its_own_hooks(way, plain_trainer):
    results = []
    for compiled in (lambda model: model, lambda model: WAYS[way](model, backend="eager")):
        torch.manual_seed(6)
        model = Classifier()
        wrapped = compiled(model)
        for _ in range(2):
            callbacks = [Calm(0.3, reads=("encoder.0",)), aux.FrozenTeacher()]
            callbacks.append(aux.SelfDistillation("frozen"))
            plain_trainer(callbacks=callbacks).fit(wrapped, rows())
        results.append(plain_weights(model))
    assert largest_difference(*results) < TOLERANCE


@pytest.mark.parametrize("way", ["whole", "submodule"])
def test_an_overwritten_output_is_captured_as_it_was(way, plain_trainer):
    class Overwriting(Classifier):
        def __init__(self) -> None:
            super().__init__(lr=0.02)
            self.encoder = nn.Sequential(
                nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, CLASSES)
            )
            self.classifier = nn.Identity()

    truth: list[Tensor] = []
    seen: list[Tensor] = []
    results = []
    for compile_it, found in ((lambda model: model, truth), (WAYS[way], seen)):
        torch.manual_seed(6)
        model = Overwriting()
        probe = Blind(
            lambda step, found=found: found.append(step.features("encoder.1").detach().clone()),
            reads=("encoder.1",),
        )
        calm = Calm(0.5, reads=("encoder.1",))
        how = {} if found is truth else {"backend": "aot_eager"}
        plain_trainer(callbacks=[probe, calm]).fit(compile_it(model, **how), rows())
        results.append(plain_weights(model))
    assert largest_difference(*results) < TOLERANCE
    assert all(
        torch.allclose(one, other, atol=TOLERANCE) for one, other in zip(truth, seen, strict=True)
    )
    assert min(float(each.min()) for each in truth) < 0


def test_a_model_compiled_and_trained_with_us_runs_without_us_afterwards(plain_trainer):
    torch.manual_seed(6)
    model = Classifier()
    compiled = torch.compile(model, backend="eager")
    plain_trainer(callbacks=OBJECTIVES["teacher's features"]()).fit(compiled, rows())
    x = torch.randn(3, WIDTH)
    bare = Classifier()
    bare.load_state_dict(plain_weights(model))
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), bare.eval()(x))


def test_f63_a_rate_that_changes_in_every_step_works_with_a_full_graph(plain_trainer):
    callbacks = [aux.DropoutSchedule(0.5, until="100%", shape="linear")]
    trained(plain_trainer, callbacks, lambda model: whole(model, backend="eager", fullgraph=True))
    assert counters["stats"]["unique_graphs"] <= 2  # of twelve rates


def test_f63_a_rate_that_changes_in_every_step_is_followed_beyond_torchs_limit_of_graphs(
    plain_trainer,
):
    """Twelve rates, more than torch would compile: of zero and one, each is what it says."""
    shares: list[float] = []

    class Noting(L.Callback):
        def on_train_batch_end(self, trainer: Any, model: Any, *args: Any) -> None:
            model.encoder.train()
            shares.append(float((model.encoder(torch.ones(4000, WIDTH)) == 0).float().mean()))

    callbacks = [aux.DropoutSchedule(0.5, until="100%", shape="linear"), Noting()]
    trained(plain_trainer, callbacks, lambda model: submodule(model, backend="eager"))
    expected = [0.5 * (1 - step / 11) for step in range(12)]
    assert shares == pytest.approx(expected, abs=0.02)
    assert counters["stats"]["unique_graphs"] <= 3  # two sizes of a batch, with and without a loss


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a C++ compiler")
@pytest.mark.parametrize("way", ["whole", "submodule"])
def test_the_default_backend_trains_as_eager(way, plain_trainer):
    eager, _ = trained(plain_trainer, OBJECTIVES["teacher's features"](), lambda model: model)
    compiled, _ = trained(plain_trainer, OBJECTIVES["teacher's features"](), WAYS[way])
    assert largest_difference(eager, compiled) < TOLERANCE
