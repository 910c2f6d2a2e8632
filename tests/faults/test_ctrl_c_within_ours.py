"""Ctrl-C while our own code is running, its clean-up included.

Python looks for signals at calls and at every turn of a loop, also in a ``finally``: a Ctrl-C that
comes while a teacher's weights are put back must not leave half of them in the module, nor in the
file that is saved on the way out. Lightning ignores the second Ctrl-C, so there is only one.

A trace function raises the KeyboardInterrupt, at every line once: on the second time that training
passes it, if there is one, which for a loop is when a part of the work is done.
"""

from __future__ import annotations

import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from lightning.pytorch.callbacks import OnExceptionCheckpoint

import lightning_aux
from tests.contract.test_c12_leave_no_trace import differing, trace
from tests.contract.training import identical, weights
from tests.faults.runs import Hooks, Once, prepared, saving, several, state_in
from tests.faults.test_interrupted import REPEATABLE, Raw

# Lightning says that an OnExceptionCheckpoint is looked for, or is not there when it resumes.
pytestmark = pytest.mark.filterwarnings("ignore:.*ckpt_path:UserWarning")
OURS = f"{Path(lightning_aux.__file__).parent}/"
# What changes something of the user's for a time; at the end everything has something to undo.
CHANGING = ("teachers/", "engine/replay", "engine/heads")
# The place after which the lines count, and the one that ends it.
PHASES = {
    "a training step": ("on_train_batch_start", "on_before_zero_grad"),
    "an optimizer step": ("optimizer.step", "after optimizer.step"),
    "a save": ("on_train_batch_end", "half written"),
    "the end of training": ("on_fit_end", ""),
}
Line = tuple[str, int]


class Tracing:
    """Counts passages of our lines in one phase, or interrupts at one of them."""

    def __init__(self, phase: str, at: tuple[Line, int] | None = None) -> None:
        self.begin, self.end = PHASES[phase]
        self.files = tuple(OURS + each for each in ([""] if self.end == "" else CHANGING))
        self.at = at
        self.passed: Counter[Line] = Counter()
        self.counting = False
        self.steps = 0

    def here(self, place: str) -> None:
        """As ``here`` of a training: the phase, in its third step."""
        self.steps += place == "on_train_batch_start"
        if self.steps == 3 and place == self.begin:
            self.counting = True
            sys.settrace(self)
        elif place == self.end:
            self.counting = False
            sys.settrace(None)

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if self.counting and frame.f_code.co_filename.startswith(self.files):
            return self.line
        return None

    def line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and self.counting:
            line = frame.f_code.co_filename[len(OURS) :], frame.f_lineno
            self.passed[line] += 1
            if self.at == (line, self.passed[line]):
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.line


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Lightning ignores SIGINT from the first Ctrl-C on; and somebody else may be tracing."""
    signals, tracing = signal.getsignal(signal.SIGINT), sys.gettrace()
    yield
    signal.signal(signal.SIGINT, signals)
    sys.settrace(tracing)


def run(tracing: Tracing, folder: Path) -> tuple[Any, Any, Raw, type[BaseException] | None]:
    folder.mkdir()
    raw, ended = Raw(), None
    saves = saving(folder)[:1] if tracing.end == "half written" else []
    module, trainer, train = prepared(
        [Hooks(tracing.here), *several(), raw, *saves, OnExceptionCheckpoint(folder)],
        folder,
        tracing.here,
        max_epochs=1,
        limit_val_batches=0,
        **REPEATABLE,
    )
    before = signal.getsignal(signal.SIGINT)
    try:
        train()
    except BaseException as error:
        ended = type(error)
    finally:
        sys.settrace(None)
        signal.signal(signal.SIGINT, before)
    return module, trainer, raw, ended


def left_without_us(phase: str, folder: Path) -> dict[str, Any]:
    """What an interrupted run leaves that has nothing of ours."""
    folder.mkdir()
    place = {"a training step": "training_step", "an optimizer step": "optimizer.step"}
    here = Once(place.get(phase, PHASES[phase][0]), 1, KeyboardInterrupt)
    module, trainer, train = prepared(
        [Hooks(here)], folder, here, max_epochs=1, limit_val_batches=0, **REPEATABLE
    )
    with pytest.raises(SystemExit):
        train()
    return trace(module, trainer, trainer.train_dataloader)


@pytest.mark.parametrize("phase", PHASES)
def test_f11_ctrl_c_at_any_line_of_ours_leaves_the_students_weights_and_nothing_of_ours(
    tmp_path: Path, phase: str
) -> None:
    expected = left_without_us(phase, tmp_path / "without")
    counted = Tracing(phase)
    run(counted, tmp_path / "counted")
    assert len(counted.passed) > 5
    wrong: dict[Line, list[str]] = {}
    for line, times in counted.passed.items():
        folder = tmp_path / "run"
        module, trainer, raw, ended = run(Tracing(phase, (line, min(2, times))), folder)
        (optimizer,) = trainer.optimizers
        own = set(module.parameters())
        held = {each for group in optimizer.param_groups for each in group["params"]}
        found = {
            "not Ctrl-C": ended is not SystemExit,
            "weights": phase != "an optimizer step" and not identical(weights(module), raw.latest),
            "optimizer": held != own or not set(optimizer.state) <= own,
            "left": bool(differing(trace(module, trainer, trainer.train_dataloader), expected)),
        }
        saved = folder / "on_exception.ckpt"
        found["file"] = not saved.exists() or not identical(
            dict(state_in(saved)["state_dict"]), weights(module)
        )
        if any(found.values()):
            wrong[line] = [what for what, so in found.items() if so]
        shutil.rmtree(folder)
    assert wrong == {}
