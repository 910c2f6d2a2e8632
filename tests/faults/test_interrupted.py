"""An exception or Ctrl-C anywhere in training: what is left, and what the saved file resumes to.

`tests/contract/test_c12_leave_no_trace.py` asks the same of every objective alone, in fewer places.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, OnExceptionCheckpoint, WeightAveraging
from torch import Tensor

from lightning_aux import EMATeacher
from tests.contract.test_c12_leave_no_trace import differing, trace
from tests.contract.training import identical, weights
from tests.faults.runs import (
    Hooks,
    Once,
    ended,
    prepared,
    saving,
    several,
    several_without_effect,
    state_in,
)

# Lightning says that an OnExceptionCheckpoint is looked for, or is not there when it resumes.
pytestmark = pytest.mark.filterwarnings("ignore:.*ckpt_path:UserWarning")
# Where, and the how many-th time; an epoch has three batches and one batch of validation.
FAULTS = {
    "the first training_step": ("training_step", 1),
    "training_step": ("training_step", 5),
    "the model's forward": ("forward", 6),
    "the middle of a teacher's forward": ("teacher's forward", 9),
    "on_before_zero_grad": ("on_before_zero_grad", 3),
    "on_after_backward": ("on_after_backward", 5),
    "on_before_optimizer_step": ("on_before_optimizer_step", 3),
    "optimizer.step": ("optimizer.step", 3),
    "on_train_batch_end": ("on_train_batch_end", 5),
    "the first validation_step": ("validation_step", 1),
    "validation_step": ("validation_step", 2),
    "on_validation_end": ("on_validation_end", 1),
    "on_save_checkpoint": ("on_save_checkpoint", 5),
    "the writing of a checkpoint": ("half written", 5),
    "on_train_epoch_end": ("on_train_epoch_end", 1),
}
every_fault = pytest.mark.parametrize("fault", FAULTS)


def stopped_here() -> RuntimeError:
    return RuntimeError("stopped here")


ERRORS: dict[str, Callable[[], BaseException]] = {
    "exception": stopped_here,
    "Ctrl-C": KeyboardInterrupt,
}
every_error = pytest.mark.parametrize("error", ERRORS)
# BatchNorm's statistics would see the interrupted batch twice, with us or without.
REPEATABLE: dict[str, Any] = {"model": {"norm": False}}


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Lightning ignores SIGINT from the first Ctrl-C on; the tests after this one do not."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


class Raw(L.Callback):
    """The student's parameters as they were when nothing else could be in their place."""

    def __init__(self) -> None:
        self.latest: dict[str, Tensor] = {}

    def note(self, _: Any, module: L.LightningModule, *__: Any) -> None:
        self.latest = weights(module)

    on_fit_start = on_train_batch_start = on_train_batch_end = note
    on_validation_start = on_validation_end = note


class Interrupted:
    """A training that was interrupted, and the file that was saved on the way out."""

    def __init__(
        self, added: list[Any], folder: Path, fault: str, error: str, **arguments: Any
    ) -> None:
        folder.mkdir()
        place, nth = FAULTS[fault]
        here = Once(place, nth, ERRORS[error])
        self.raw = Raw()
        self.checkpoint = folder / "on_exception.ckpt"
        self.module, self.trainer, train = prepared(
            [*added, self.raw, Hooks(here), *saving(folder), OnExceptionCheckpoint(folder)],
            folder,
            here,
            **arguments,
        )
        self.flags = [each.requires_grad for each in self.module.parameters()]
        # Lightning turns Ctrl-C into SystemExit.
        with pytest.raises((RuntimeError, SystemExit), match=r"stopped here|^1$") as raised:
            train()
        assert here.left <= 0
        assert isinstance(raised.value, SystemExit) == (error == "Ctrl-C")

    @property
    def left(self) -> dict[str, Any]:
        """Attributes, hooks, modes: what a callback could have left behind."""
        return trace(self.module, self.trainer, self.trainer.train_dataloader)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the training comes to when nothing happens."""
    return ended(several(), tmp_path_factory.mktemp("whole"), **REPEATABLE)


@every_error
@every_fault
def test_nothing_of_ours_remains_and_the_weights_are_the_students(
    tmp_path: Path, fault: str, error: str
) -> None:
    after = Interrupted(several(), tmp_path / "with", fault, error, **REPEATABLE)
    there = "training_step" if "teacher" in fault else fault  # without us there is no teacher
    without = Interrupted([], tmp_path / "without", there, error, **REPEATABLE)
    assert differing(after.left, without.left) == {}
    assert identical(weights(after.module), after.raw.latest)
    assert [each.requires_grad for each in after.module.parameters()] == after.flags
    own = set(after.module.parameters())
    (optimizer,) = after.trainer.optimizers
    assert {each for group in optimizer.param_groups for each in group["params"]} == own
    assert set(optimizer.state) <= own


@every_error
@every_fault
def test_f11_what_is_saved_on_the_way_out_resumes_bit_exactly(
    tmp_path: Path, fault: str, error: str, whole: dict[str, Any]
) -> None:
    stopped = Interrupted(several(), tmp_path / "stopped", fault, error, **REPEATABLE)
    saved = state_in(stopped.checkpoint)
    assert identical(dict(saved["state_dict"]), stopped.raw.latest)
    (group,) = saved["optimizer_states"][0]["param_groups"]
    assert len(group["params"]) == len(list(stopped.module.parameters()))
    resumed = ended(several(), tmp_path / "resumed", stopped.checkpoint, **REPEATABLE)
    assert [part for part in whole if not identical(resumed[part], whole[part])] == []


class Average(WeightAveraging):
    """The equal average of all weights so far."""


class Teacher(L.Callback):
    """The teacher's parameters when validation starts: nothing may move them before it ends."""

    def __init__(self, teacher: EMATeacher) -> None:
        self.teacher = teacher
        self.values: dict[str, Tensor] = {}

    def on_validation_start(self, *_: Any) -> None:
        live, values = self.teacher.pairs()
        names = {
            parameter: name for name, parameter in self.teacher.engine.module.named_parameters()
        }
        self.values = {names[each]: value.clone() for each, value in zip(live, values, strict=True)}


@every_error
@pytest.mark.parametrize("last", [False, True], ids=["before it", "after it"])
@pytest.mark.parametrize("kind", [EMAWeightAveraging, Average])
def test_f11_beside_lightnings_own_average_that_is_in_place_in_validation(
    tmp_path: Path, kind: Any, last: bool, error: str
) -> None:
    """Lightning leaves its average in the module then; our teachers do not move, and at weight 0
    the module, the file and what is resumed from it are as without us.
    """

    def run(ours: list[Any], name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        def beside(ours: list[Any]) -> list[Any]:
            average = [EMAWeightAveraging(decay=0.5)] if kind is EMAWeightAveraging else [kind()]
            return [*average, *ours] if last else [*ours, *average]

        noting = [Teacher(each) for each in ours if isinstance(each, EMATeacher)]
        stopped = Interrupted(beside([*ours, *noting]), tmp_path / name, "validation_step", error)
        saved = state_in(stopped.checkpoint)
        for each in noting:
            kept = saved["lightning_aux"]["members"][each.teacher.name]["weights"]
            assert identical({name: kept[name] for name in each.values}, each.values)
            assert not torch.equal(kept["head.weight"], saved["state_dict"]["head.weight"])
        again = several_without_effect() if ours else []
        resumed = ended(beside(again), tmp_path / name / "resumed", stopped.checkpoint)
        return weights(stopped.module), of_theirs(saved), of_theirs(resumed)

    assert identical(run(several_without_effect(), "with"), run([], "without"))
    run(several(), "with effect")


def of_theirs(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != "lightning_aux"}


@pytest.mark.parametrize("window", [1, 2], ids=["", "accumulated"])
@pytest.mark.parametrize("fault", [each for each in FAULTS if "teacher" not in each])
def test_where_lightning_resumes_inexactly_we_add_nothing_to_it(
    tmp_path: Path, fault: str, window: int
) -> None:
    """BatchNorm that sees the interrupted batch twice, gradients of a window that are lost.

    Lightning cannot resume these exactly; terms of weight 0 leave every bit of what it does.
    """
    arguments: dict[str, Any] = {"accumulate_grad_batches": window}
    ends = []
    for name, make in (("with", several_without_effect), ("without", list)):
        stopped = Interrupted(make(), tmp_path / name, fault, "exception", **arguments)
        resumed = ended(make(), tmp_path / name / "r", stopped.checkpoint, **arguments)
        ends.append((of_theirs(state_in(stopped.checkpoint)), of_theirs(resumed)))
    assert identical(ends[0], ends[1])
