"""Two ``ddp`` processes hold the same teacher, BatchNorm statistics included, saved or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.small_models import equal
from tests.teachers import two_ranks
from tests.two_processes import run_script

pytestmark = [pytest.mark.xdist_group("two_ranks"), pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two_ranks")
    run_script(two_ranks.__file__, path, timeout=120)
    return path


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("start", [0, 2])
def test_f22_both_ranks_hold_the_same_teacher_and_saving_changes_nothing(
    folder: Path, buffers: str, start: int
) -> None:
    ranks = [torch.load(folder / f"{buffers}.{start}.{rank}.pt") for rank in (0, 1)]
    expected, *others = [run for results in ranks for run in results]
    assert len(expected) == 6 - start
    for other in others:
        assert all(equal(*pair) for pair in zip(expected, other, strict=True))


def test_the_step_by_which_torch_makes_a_state_to_save_moves_no_teacher(folder: Path) -> None:
    """For sharded parameters it takes one with zero gradients, where there is none to save yet."""
    for rank in (0, 1):
        assert torch.load(folder / f"updates.{rank}.pt") == [3, 3]
