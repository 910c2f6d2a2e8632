"""C11: compiled, a model trains as it does eagerly with everything that can be attached.

The other way out that the contract allows is a named error before the first step; a term that is
silently missing is not. The references are eager runs, and every comparison says how far the run
without the term is from them. Backend `aot_eager` traces, functionalises and partitions like the
default one and needs no C++ compiler.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend

from lightning_aux import EMATeacher, FrozenTeacher, Objective, SelfDistillation, Step
from lightning_aux.engine import AuxiliaryError
from lightning_aux.registry import ENTRIES
from tests.contract.models import FEATURES, Classifier
from tests.contract.probe import Probe
from tests.contract.training import (
    PER_SAMPLE_TERMS,
    TERMS,
    fit,
    largest_difference,
    loader,
    seeded,
    shared,
    together,
    weights,
)

pytestmark = pytest.mark.vouches("compile")

TOLERANCE = 1e-5
STEPS = 10  # two epochs of five batches
MODEL: dict[str, Any] = {"dropout": 0.2, "norm": True}
# Everything in the registry, and a head beside it.
EVERY = [*ENTRIES, "head"]
TRAINED = [entry for entry in EVERY if shared(entry) == entry]  # for itself, or for others too

# With a rate that changes in every step a compiled graph draws its masks from a tensor of the rate:
# as many are dropped (tests/attribute_schedules), but not the same.
DRAWN_OTHERWISE = "dropout_schedule"

every_trained = pytest.mark.parametrize("entry", TRAINED)


def added(entry: str) -> list[Any]:
    return [Probe(0.5)] if entry == "head" else together(entry, 0.5)


class Encoder(nn.Sequential):
    """A class of the user's own: `compile()` of a bare `nn.Sequential` compiles nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)  # type: ignore[no-any-return]


class Head(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Net(Classifier):
    """The classifier of the contract; `at` compiles it at some moment of the fit."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.encoder = Encoder(*self.encoder)
        head, self.head = self.head, Head(self.head.in_features, self.head.out_features)
        self.head.load_state_dict(head.state_dict())
        self.at: dict[str, Callable[[Net], Any]] = {}

    def configure_model(self) -> None:
        self.at.pop("configured", lambda _: None)(self)

    def on_train_start(self) -> None:  # Lightning calls those of callbacks first
        self.at.pop("attached", lambda _: None)(self)


class Backend:
    """A backend of torch.compile that counts its graphs and how often they have run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.graphs = self.runs = 0

    def __call__(self, graph: Any, examples: Any) -> Any:
        self.graphs += 1
        compiled = lookup_backend(self.name)(graph, examples)

        def run(*arguments: Any) -> Any:
            self.runs += 1
            return compiled(*arguments)

        return run


class Graphs(L.Callback):
    """The number of graphs after each step."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.after: list[int] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.after.append(self.backend.graphs)


# ------------------------------------------------------------------------------ ways of compiling
def whole(module: Net, **how: Any) -> Any:
    return torch.compile(module, **how)


def method(module: Net, **how: Any) -> Any:
    module.compile(**how)
    return module


def encoder(module: Net, **how: Any) -> Any:
    module.encoder = torch.compile(module.encoder, **how)
    return module


def encoder_by_method(module: Net, **how: Any) -> Any:
    module.encoder.compile(**how)
    return module


def head(module: Net, **how: Any) -> Any:
    module.head = torch.compile(module.head, **how)
    return module


def head_by_method(module: Net, **how: Any) -> Any:
    module.head.compile(**how)
    return module


WAYS = {
    each.__name__: each
    for each in (whole, method, encoder, encoder_by_method, head, head_by_method)
}
every_way = pytest.mark.parametrize("way", WAYS)


def before(module: Net, way: str, **how: Any) -> Any:
    """Compiled, and not called yet."""
    return WAYS[way](module, **how)


def warm(module: Net, way: str, **how: Any) -> Any:
    """Compiled and called as training calls it, so that its graph exists before our hooks do."""
    compiled = WAYS[way](module, **how)
    state = weights(module)
    compiled.train()
    compiled(torch.randn(8, FEATURES)).sum().backward()
    module.zero_grad()
    module.load_state_dict(state)  # BatchNorm has counted the batch
    return compiled


def configured(module: Net, way: str, **how: Any) -> Any:
    """Compiled in `configure_model`, after every callback's `setup`."""
    module.at["configured"] = lambda module: WAYS[way](module, **how)
    return module


def attached(module: Net, way: str, **how: Any) -> Any:
    """Compiled in `on_train_start`, when our hooks and wrappers are in place."""
    module.at["attached"] = lambda module: WAYS[way](module, **how)
    return module


MOMENTS = {each.__name__: each for each in (before, warm, configured, attached)}
# `torch.compile(module)` makes another object, which can only be had before the fit; during the fit
# one form of each is enough.
CASES = [
    *[(moment, way) for moment in ("before", "warm") for way in WAYS],
    *[(moment, way) for moment in ("configured", "attached") for way in ("method", "encoder")],
    ("attached", "head_by_method"),
]
every_case = pytest.mark.parametrize(("moment", "way"), CASES, ids=map(" ".join, CASES))
# Every way and every moment once. All of their pairs are trained with one entry of each kind: a
# term of logits, of features, of weights, with a head, what drives dropout, runs a part again, or
# changes weights.
FEW = [
    *(("before", "whole"), ("before", "encoder_by_method"), ("warm", "method"), ("warm", "head")),
    *(("configured", "encoder"), ("attached", "head_by_method")),
]
KINDS = (
    *("self_distillation_kl", "self_distillation_features", "ema_anchor_weight", "head"),
    *("dropout_schedule", "multi_sample_dropout", "quantized_weights"),
)


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@cache
def eager(entry: str | None) -> dict[str, dict[str, Tensor]]:
    """What the eager run ends with; `None` trains without anything attached."""
    return results(Net, [] if entry is None else added(entry))


def results(
    make: Callable[..., Net], attach: list[Any], compiled: Callable[[Net], Any] = lambda net: net
) -> dict[str, dict[str, Tensor]]:
    """Weights of the model, of its teachers and of its heads, by the names of the eager model."""
    module = seeded(make, **MODEL)
    trainer = fit(compiled(module), attach)
    assert trainer.global_step == STEPS
    found = {"": weights(module)}
    for each in attach:
        for one in [each, *getattr(each, "companions", list)()]:
            if isinstance(one, EMATeacher | FrozenTeacher) and "weights" in one.state():
                found[one.name] = one.state()["weights"]
        if hasattr(each, "head"):
            found[f"head of {each.name}"] = weights(each.head)
    return {whose: plain(values) for whose, values in found.items()}


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """By the names of the eager model: `torch.compile(submodule)` is a module around it."""
    return {name.replace("_orig_mod.", ""): value for name, value in values.items()}


def furthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(largest_difference(one[whose], other[whose]) for whose in one)


def effect(entry: str) -> float:
    """How far training without the term ends from training with it."""
    return largest_difference(eager(shared(entry))[""], eager(None)[""])


@pytest.mark.parametrize("entry", [*TERMS, "dropout_schedule", "head"])
def test_what_is_compared_differs_without_the_term(entry: str) -> None:
    assert effect(entry) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("entry", "moment", "way"),
    [
        (entry, *case)
        for entry in EVERY
        for case in (CASES if shared(entry) in map(shared, KINDS) else FEW)
    ],
)
def test_compiled_training_ends_where_eager_training_does(
    entry: str, moment: str, way: str
) -> None:
    """Model, teachers and heads; every step ran a graph, and later steps made none anew."""
    trained = shared(entry)
    ended, runs, graphs = compiled(trained, moment, way)
    if entry != DRAWN_OTHERWISE:
        assert furthest(ended, eager(trained)) < TOLERANCE
    assert runs >= STEPS
    assert graphs[-1] == graphs[ENTRIES[entry].begins + 2 if entry in ENTRIES else 2]


@cache
def compiled(entry: str, moment: str, way: str) -> tuple[dict[str, Any], int, list[int]]:
    """What the training ends with, how often a graph ran, and how many there were when."""
    backend = Backend("aot_eager" if moment == "before" else "eager")
    graphs = Graphs(backend)
    ended = results(
        Net,
        [*added(entry), graphs],
        lambda module: MOMENTS[moment](module, way, backend=backend),
    )
    return ended, backend.runs, graphs.after


@pytest.mark.parametrize("way", ["whole", "encoder_by_method"])
@every_trained
def test_f61_a_full_graph_stays_one_and_has_the_term_in_it(entry: str, way: str) -> None:
    """`fullgraph=True` raises wherever a wrapper or a hook would break the graph."""
    backend = Backend("eager")
    compiled = results(
        Net, added(entry), lambda module: WAYS[way](module, backend=backend, fullgraph=True)
    )
    if entry != DRAWN_OTHERWISE:
        assert furthest(compiled, eager(entry)) < TOLERANCE
    assert backend.runs >= STEPS


class Inside(Objective):
    """A term on a feature in the middle of what is compiled."""

    def __init__(self) -> None:
        super().__init__(0.5, reads=("encoder.0",))
        self.seen = 0

    def loss(self, step: Step) -> Tensor:
        self.seen += 1
        return step.features("encoder.0").square().mean()


@cache
def inside_eagerly() -> dict[str, dict[str, Tensor]]:
    return results(Net, [Inside()])


@pytest.mark.parametrize("fullgraph", [False, True])
@every_case
def test_f60_a_feature_inside_of_the_graph_is_captured_or_nothing_is_trained(
    moment: str, way: str, fullgraph: bool
) -> None:
    expected, without = inside_eagerly(), eager(None)
    assert largest_difference(expected[""], without[""]) > 100 * TOLERANCE
    module, inside = seeded(Net, **MODEL), Inside()
    compiled = MOMENTS[moment](module, way, backend="eager", fullgraph=fullgraph)
    start = plain(weights(module))
    refused = ""
    try:
        fit(compiled, [inside])
    except AuxiliaryError as error:
        refused = str(error)
    ended = plain(weights(module))
    if refused:
        # torch does not guard hooks: a graph that exists goes on without the new ones.
        assert moment == "warm"
        assert "call torch._dynamo.reset() before Trainer.fit" in refused
        parameters = plain(dict(module.named_parameters()))
        assert all(torch.equal(start[name], ended[name]) for name in parameters)
    else:
        assert inside.seen == STEPS
        assert largest_difference(ended, expected[""]) < TOLERANCE


@pytest.mark.parametrize("way", ["whole", "method", "encoder_by_method", "head_by_method"])
def test_f58_the_average_of_a_compiled_model_moves_under_the_names_of_the_eager_one(
    way: str,
) -> None:
    """After one step it is 0.9·θ₀ + 0.1·θ₁, and no name has a prefix of torch's."""
    teacher, module = EMATeacher(decay=0.9), seeded(Net, **MODEL)
    start = {name: value.detach().double() for name, value in module.named_parameters()}
    fit(WAYS[way](module, backend="eager"), [teacher], max_steps=1)
    now = {name: value.detach().double() for name, value in module.named_parameters()}
    average = teacher.state()["weights"]
    assert average.keys() == Net(**MODEL).state_dict().keys()
    for name, value in now.items():
        assert float((average[name] - (0.9 * start[name] + 0.1 * value)).abs().max()) < 1e-6
    assert max(float((now[name] - start[name]).abs().max()) for name in now) > 1e-3


@pytest.mark.parametrize(
    "entry", [entry for entry in TRAINED if entry in ("ema_teacher", *PER_SAMPLE_TERMS, "head")]
)
@pytest.mark.parametrize("first_eager", [False, True], ids=["compiled first", "eager first"])
def test_f58_a_checkpoint_of_the_compiled_model_resumes_eagerly_and_the_other_way_round(
    tmp_path: Any, first_eager: bool, entry: str
) -> None:
    """Half of the training in each form, without dropout, which a resumed run draws anew."""

    def run(**resume: Any) -> tuple[Net, L.Trainer]:
        torch._dynamo.reset()
        module = seeded(Net, norm=True)
        compiled = resume.pop("compiled")
        fitted = whole(module, backend="eager") if compiled else module
        return module, fit(fitted, added(entry), **resume)

    _, trainer = run(compiled=not first_eager, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    module, _ = run(compiled=first_eager, ckpt_path=tmp_path / "half.ckpt")
    through, _ = run(compiled=False)
    assert largest_difference(weights(module), weights(through)) < TOLERANCE


class Answers(Objective):
    """Keeps the batch, a teacher's logits, its weights then, and the student's logits."""

    def __init__(self, teacher: EMATeacher) -> None:
        super().__init__()
        self.teacher = teacher
        self.seen: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []

    def loss(self, step: Step) -> Tensor:
        taught = step.teacher(self.teacher.name).logits
        state = {name: value.clone() for name, value in self.teacher.state()["weights"].items()}
        self.seen.append((step.input(), taught.clone(), state))
        return step.logits.square().mean()


@every_case
def test_f59_a_teachers_pass_through_a_compiled_model_computes_with_the_teachers_weights(
    moment: str, way: str
) -> None:
    """By value in every step, with no graph for the exchange: at most one for the teacher."""
    teacher, backend = EMATeacher(decay=0.9), Backend("eager")
    answers, graphs = Answers(teacher), Graphs(backend)
    module = seeded(Net, **MODEL)
    fit(MOMENTS[moment](module, way, backend=backend), [teacher, answers, graphs])
    student = seeded(Net, **MODEL).eval()
    student.load_state_dict(plain(weights(module)))
    assert len(answers.seen) == STEPS
    for x, taught, state in answers.seen:
        alone = seeded(Net, **MODEL).eval()
        alone.load_state_dict(plain(state))
        with torch.no_grad():
            assert torch.allclose(taught, alone(x), atol=1e-6)
            assert not torch.allclose(taught, student(x), atol=1e-3)
    assert graphs.after[-1] == graphs.after[2]


def three() -> list[Any]:
    """One objective on logits, one on features inside, one with a head."""
    features = SelfDistillation(on="encoder.0", divergence="mse", name="features", weight=0.5)
    return [EMATeacher(decay=0.9), SelfDistillation(weight=0.5), features, Probe(0.5)]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("way", ["whole", "encoder"])
def test_inductor_trains_a_logit_a_feature_and_a_head_objective_as_eager(way: str) -> None:
    """Without dropout: Inductor draws random numbers of its own."""

    def run(attach: list[Any], compiled: bool) -> dict[str, Tensor]:
        module = seeded(Net, norm=True)
        fit(WAYS[way](module) if compiled else module, attach, loader())
        return plain(weights(module))

    expected = run(three(), compiled=False)
    assert largest_difference(run(three(), compiled=True), expected) < TOLERANCE
    for place in (1, 2, 3):
        others = [each for index, each in enumerate(three()) if index != place]
        assert largest_difference(run(others, compiled=False), expected) > 100 * TOLERANCE
