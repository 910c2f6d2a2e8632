"""Two ``ddp`` processes: averages, captured features, heads and loggers that others lost there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.small_models import Classifier, equal
from tests.peer_failures import two_ranks
from tests.two_processes import run_script

pytest.importorskip("wandb")
pytestmark = [pytest.mark.xdist_group("peer_failures_two_ranks"), pytest.mark.slow]

STEPS = 3 * two_ranks.EPOCHS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two_ranks")
    run_script(two_ranks.__file__, path, timeout=180)
    return path


def both(folder: Path, job: str) -> list[Any]:
    """What the two ranks wrote."""
    return [torch.load(folder / f"{job}.{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_f22_every_rank_holds_the_same_average_without_a_word_between_them(folder: Path) -> None:
    first, second = both(folder, "f22")
    assert len(first["held"]) == STEPS > 10
    assert not any(torch.equal(*pair) for pair in zip(first["data"], second["data"], strict=True))
    assert all(equal(*pair) for pair in zip(first["held"], second["held"], strict=True))
    assert not equal(first["held"][0], first["held"][-1])
    for rank in (first, second):
        assert rank["said"] == [0] * 2 * STEPS
        assert rank["premise"] == 1


def test_f33_under_ddp_every_named_module_is_captured_and_the_term_is_there(folder: Path) -> None:
    for rank in both(folder, "f33"):
        assert [names for names, _ in rank["seen"]] == [["encoder.0", "encoder.2"]] * 3
        assert all(term > 0.1 for _, term in rank["seen"])


def test_f38_a_head_is_the_same_on_every_rank_and_resumes_and_is_not_in_the_users_file(
    folder: Path,
) -> None:
    first, second = both(folder, "f38")
    assert equal(first["whole"], second["whole"])
    assert equal(first["resumed"], second["resumed"])
    assert equal(first["whole"], first["resumed"])
    saved = torch.load(folder / "f38.ckpt", weights_only=True)
    Classifier().load_state_dict(saved["state_dict"], strict=True)
    head = saved["lightning_aux"]["heads"]["weights"]
    assert sorted(head) == ["reconstruction.bias", "reconstruction.weight"]
    assert not torch.equal(head["reconstruction.weight"], first["whole"]["head.weight"])


def test_f67_one_process_starts_one_run_of_wandb(folder: Path) -> None:
    first, second = both(folder, "f67")
    assert first["before"] == 0
    assert first["calls"].count("init") == 1
    assert first["calls"].count("log") > 0
    assert second["calls"] == []


def test_f71_under_ddp_a_teachers_pass_leaves_the_running_statistics_alone(folder: Path) -> None:
    """With ``broadcast_buffers=True``, torch's default."""
    for rank in both(folder, "f71"):
        assert len(rank["with"]) == STEPS
        assert all(equal(*pair) for pair in zip(rank["with"], rank["without"], strict=True))
        assert int(rank["with"][-1]["encoder.1.num_batches_tracked"]) == STEPS
