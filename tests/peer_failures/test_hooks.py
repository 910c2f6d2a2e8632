"""Hooks and what they capture: nothing is kept longer than its step."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_aux import EMATeacher, FrozenTeacher, SelfDistillation, Step
from tests.contract.models import Classifier
from tests.contract.probe import Probe
from tests.contract.training import callbacks, every_entry, fit, loader, quiet_trainer, seeded
from tests.engine.small_models import Blind

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning.pytorch")


@pytest.fixture(scope="module")
def quick_collections() -> Iterator[None]:
    """What was there before these tests is not looked through at every collection."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Watched(Classifier):
    """Keeps weak references to what its encoder returned, the teacher's passes included."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.returned: list[weakref.ref[Tensor]] = []
        self.most_alive = 0

    def forward(self, x: Tensor) -> Tensor:
        features = self.encoder(x)
        self.returned.append(weakref.ref(features))
        return self.head(features)

    def on_train_batch_end(self, *_: Any) -> None:
        gc.collect()
        self.most_alive = max(self.most_alive, self.alive())

    def alive(self) -> int:
        return sum(each() is not None for each in self.returned)


@pytest.mark.usefixtures("quick_collections")
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@every_entry
def test_f35_captured_features_do_not_outlive_their_step(entry: str, manual: bool) -> None:
    """In another library they piled up until the memory was full."""
    module = seeded(Watched, manual=manual)
    reading = Blind(lambda step: None, weight=0.0, reads=("encoder",), name="reading")
    keeping = Blind(lambda step: step.features("encoder").mean().item(), reads=("encoder",))
    trainer = fit(module, [*callbacks(entry), reading, keeping, Probe(0.5)], max_epochs=4)
    assert len(module.returned) >= 20
    # The first output of a hooked module is looked at once more, in the second step.
    assert module.most_alive <= 2
    gc.collect()
    assert module.alive() == 0
    assert trainer.global_step == 20


def hooks(module: Any) -> int:
    return sum(
        len(getattr(each, kind))
        for each in module.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks")
    )


@pytest.mark.parametrize("use", ["validate", "test", "predict"])
def test_f35_hooks_do_not_add_up_over_fits_and_other_uses(use: str) -> None:
    class Usable(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            during.append(hooks(self))

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            during.append(hooks(self))

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            during.append(hooks(self))
            return torch.zeros(1)

    during: list[int] = []
    added = [
        EMATeacher(),
        FrozenTeacher(),
        SelfDistillation(on="encoder.*", divergence="mse"),
        SelfDistillation("frozen", name="second"),
        Probe(0.5),
    ]
    module = seeded(Usable)
    own = module.encoder.register_forward_hook(lambda *_: None)
    in_training: list[int] = []
    module.on_train_batch_end = lambda *_: in_training.append(hooks(module))
    trainer = quiet_trainer(added, max_epochs=1)
    for fits in (1, 2, 3):
        trainer.fit_loop.max_epochs = fits
        trainer.fit(module, loader())
        assert hooks(module) == 1
        during.clear()
        getattr(trainer, use)(module, loader(16), verbose=False) if use != "predict" else (
            trainer.predict(module, loader(16))
        )
        assert during == [1, 1]
    assert len(in_training) == 15
    assert len(set(in_training)) == 1
    own.remove()
    assert hooks(module) == 0


class Residual(Classifier):
    """`h += block(h)`: what the block was given is overwritten after it has run."""

    def __init__(self) -> None:
        super().__init__()
        self.block = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(8, 8))
        self.given: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.encoder(x) * 1.0
        self.given.append(hidden.detach().clone())
        added = self.block(hidden)
        hidden += added
        return self.head(hidden)


def test_the_input_of_a_module_is_what_it_was_given_where_the_model_overwrites_it_later() -> None:
    module = seeded(Residual)
    probe = Blind(lambda step: step.input("block").detach().clone(), reads=("block",))
    fit(module, [probe], max_epochs=1)
    assert len(probe.seen) == 5
    assert all(torch.equal(*pair) for pair in zip(module.given, probe.seen, strict=True))


def test_a_captured_feature_is_the_one_that_the_logits_were_computed_from() -> None:
    """In the first step too: a gradient of the logits in it exists."""

    def look(step: Step) -> float:
        scores = step.logits.sum()
        wanted = [step.features("encoder"), step.input("head")]
        gradients = torch.autograd.grad(scores, wanted, retain_graph=True)
        return min(float(each.abs().sum()) for each in gradients)

    probe = Blind(look, reads=("encoder", "head"))
    fit(seeded(Classifier), [probe], max_epochs=1)
    assert all(size > 0 for size in probe.seen)
