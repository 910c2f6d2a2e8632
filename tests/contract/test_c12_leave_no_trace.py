"""C12: after a fit, an exception or Ctrl-C nothing of ours remains, and what was theirs does."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_aux.engine import Attached
from tests.contract.models import Classifier
from tests.contract.probe import Probe
from tests.contract.training import (
    every_term,
    every_trained,
    identical,
    largest_difference,
    loader,
    quiet_trainer,
    seeded,
    together,
    weights,
)

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class Fails(L.Callback):
    """Raises where it is told to."""

    def __init__(self, where: str, error: BaseException, batch: int = 2) -> None:
        self.where, self.error, self.batch = where, error, batch

    def _at(self, where: str) -> None:
        if where == self.where:
            raise self.error

    def setup(self, *_: Any, **__: Any) -> None:
        self._at("setup")

    def on_fit_start(self, *_: Any) -> None:
        self._at("on_fit_start")

    def on_train_start(self, *_: Any) -> None:
        self._at("on_train_start")

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            self._at("on_train_batch_start")

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.sanity_checking:
            self._at("sanity check")
        else:
            self._at("validation")


class FailingStep(Classifier):
    """Raises in the third `training_step`, after its forward."""

    error: BaseException | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 2 and self.error is not None:
            raise self.error
        return loss


class FailingTerm(Classifier):
    """Fails in its own optimizer configuration."""

    def configure_optimizers(self) -> Any:
        raise RuntimeError("stopped here")


def trace(module: nn.Module, trainer: L.Trainer, data: Any) -> dict[str, Any]:
    """What a callback could leave behind: attributes, hooks, rates, modes."""
    found: dict[str, Any] = {
        "strategy": sorted(trainer.strategy.__dict__),
        "data": sorted(data.__dict__),
        "sampler": (type(data.batch_sampler), type(data.sampler)),
        "trainer": sorted(trainer.__dict__),
        "optimizers": [_optimizer_hooks(each) for each in trainer.optimizers],
    }
    for path, each in module.named_modules():
        found[f"{path} attributes"] = sorted(each.__dict__)
        found[f"{path} submodules"] = list(each._modules)
        found[f"{path} hooks"] = {kind: list(getattr(each, kind).values()) for kind in HOOKS}
        found[f"{path} rate"] = getattr(each, "p", None)
        found[f"{path} mode"] = each.training
    return found


def _optimizer_hooks(optimizer: Any) -> list[int]:
    return [
        len(hooks) for name, hooks in sorted(vars(optimizer).items()) if name.endswith("_hooks")
    ]


def differing(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    keys = left.keys() | right.keys()
    return {key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)}


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Lightning ignores SIGINT from the first Ctrl-C on; the tests after this one do not."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def run(
    module: Classifier, added: list[Any], expected: type[BaseException] | None
) -> dict[str, Any]:
    """Fit (with validation, in order to pass through every hook) and see what is left."""
    data = loader(24)
    trainer = quiet_trainer(added, max_epochs=2)
    L.seed_everything(1, verbose=False)
    if expected is None:
        trainer.fit(module, data, loader(8))
    else:
        with pytest.raises(expected):
            trainer.fit(module, data, loader(8))
    return trace(module, trainer, data)


def stopped_here() -> RuntimeError:
    return RuntimeError("stopped here")


def in_callback(where: str, error: Callable[[], BaseException] = stopped_here) -> Any:
    return lambda: (seeded(Classifier, dropout=0.2), [Fails(where, error())])


def in_step(error: Callable[[], BaseException]) -> Any:
    def make() -> tuple[Classifier, list[Any]]:
        module = seeded(FailingStep, dropout=0.2)
        module.error = error()
        return module, []

    return make


# Name to what makes the module and the callbacks that end the fit, and what the fit raises.
ENDINGS: dict[str, tuple[Any, type[BaseException] | None]] = {
    "fit": (lambda: (seeded(Classifier, dropout=0.2), []), None),
    "manual optimisation": (lambda: (seeded(Classifier, dropout=0.2, manual=True), []), None),
    "exception in training_step": (in_step(stopped_here), RuntimeError),
    # Lightning turns Ctrl-C into SystemExit
    "Ctrl-C in training_step": (in_step(KeyboardInterrupt), SystemExit),
    "Ctrl-C in a callback": (in_callback("on_train_batch_start", KeyboardInterrupt), SystemExit),
    "exception in validation": (in_callback("validation"), RuntimeError),
    "exception in the sanity check": (in_callback("sanity check"), RuntimeError),
    "exception in setup": (in_callback("setup"), RuntimeError),
    "exception in on_fit_start": (in_callback("on_fit_start"), RuntimeError),
    "exception in on_train_start": (in_callback("on_train_start"), RuntimeError),
    "exception in configure_optimizers": (
        lambda: (seeded(FailingTerm, dropout=0.2), []),
        RuntimeError,
    ),
}
every_ending = pytest.mark.parametrize("ending", ENDINGS)


@every_ending
@pytest.mark.parametrize("last", [False, True], ids=["before theirs", "after theirs"])
@pytest.mark.usefixtures("interruptible")
@every_trained
def test_nothing_of_ours_remains(entry: str, ending: str, last: bool) -> None:
    """Every attribute, hook and rate is as after the same run without us."""
    make, expected = ENDINGS[ending]
    module, theirs = make()
    before = run(module, theirs, expected)

    module, theirs = make()
    ours = together(entry)
    after = run(module, [*theirs, *ours] if last else [*ours, *theirs], expected)
    assert differing(after, before) == {}


@every_ending
@pytest.mark.usefixtures("interruptible")
def test_nothing_of_a_head_remains(ending: str) -> None:
    make, expected = ENDINGS[ending]
    module, theirs = make()
    before = run(module, theirs, expected)
    module, theirs = make()
    assert differing(run(module, [Probe(0.5), *theirs], expected), before) == {}


@every_ending
@pytest.mark.usefixtures("interruptible")
@every_trained
def test_f35_the_users_own_hooks_and_patches_remain(entry: str, ending: str) -> None:
    make, expected = ENDINGS[ending]
    module, theirs = make()
    seen: list[int] = []
    training_step = module.training_step

    def patched(batch: Any, batch_idx: int) -> Any:
        return training_step(batch, batch_idx)

    module.training_step = patched
    module.encoder.register_forward_hook(lambda *_: seen.append(1))
    module.encoder.register_forward_pre_hook(lambda *_: seen.append(2))
    run(module, [*together(entry), *theirs], expected)

    assert module.__dict__["training_step"] is patched
    assert len(module.encoder._forward_hooks) == len(module.encoder._forward_pre_hooks) == 1
    seen.clear()
    module(torch.zeros(2, 6))
    assert seen == [2, 1]


@pytest.mark.usefixtures("interruptible")
@every_trained
def test_training_after_a_failed_fit_is_as_if_we_had_never_been_there(entry: str) -> None:
    def again(added: list[Attached]) -> dict[str, torch.Tensor]:
        module = seeded(Classifier)
        run(module, [*added, Fails("on_train_batch_start", stopped_here(), batch=0)], RuntimeError)
        trainer = quiet_trainer()
        L.seed_everything(1, verbose=False)
        trainer.fit(module, loader())
        return weights(module)

    assert largest_difference(again(together(entry)), again([])) == 0


class FailsAsTeacher(Classifier):
    """Raises in its own forward while a teacher's weights are in place."""

    failed = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.encoder.training and self.trainer.training and self.global_step == 3:
            self.failed += 1
            raise RuntimeError("stopped here")
        return super().forward(x)


@every_term
def test_an_exception_in_a_teachers_forward_leaves_the_students_weights(entry: str) -> None:
    before: list[dict[str, torch.Tensor]] = []

    class Notes(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            before.append(weights(module))

    module = seeded(FailsAsTeacher, dropout=0.2, norm=True)
    trainer = quiet_trainer([*together(entry), Notes()])
    with suppress(RuntimeError):
        trainer.fit(module, loader())
    if module.failed:  # only terms that ask a teacher get there
        assert identical({**weights(module), **_statistics(before[-1])}, before[-1])
        assert all(each.training for each in module.modules())
    else:
        assert trainer.global_step == 10


def _statistics(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """BatchNorm's own, which the student's forward has moved before the teacher's."""
    ours = ("running_mean", "running_var", "num_batches_tracked")
    return {name: value for name, value in state.items() if name.endswith(ours)}


@every_trained
def test_a_module_can_be_copied_during_training(entry: str) -> None:
    """Tools that deep-copy the module in mid-training get one that is not attached."""
    copies: list[Classifier] = []

    class Copies(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            copies.append(deepcopy(module))

    module = seeded(Classifier, dropout=0.2)
    run(module, [*together(entry), Copies()], None)
    before, original = weights(copies[-1]), weights(module)
    quiet_trainer().fit(copies[-1], loader())
    assert not identical(weights(copies[-1]), before)
    assert identical(weights(module), original)
