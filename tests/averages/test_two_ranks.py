"""Averages in two processes: validated, looked ahead with, and mixed, as in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.averages import two_ranks
from tests.averages.test_ema_weights import average, shows
from tests.engine.small_models import Classifier, equal, rows
from tests.two_processes import run_script

pytestmark = [pytest.mark.xdist_group("two_ranks_of_averages"), pytest.mark.slow]
every_place = pytest.mark.parametrize("place", two_ranks.PLACES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two_ranks")
    run_script(two_ranks.__file__, path, timeout=180)
    return path


def ended(folder: Path, place: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{place}.{rank}.pt") for rank in (0, 1)]


def val_loss(state: dict[str, Tensor]) -> float:
    module = Classifier()
    module.load_state_dict(state)
    x, y = (torch.cat(each) for each in zip(*rows(16), strict=True))
    with torch.no_grad():
        return float(F.cross_entropy(module(x), y))


@every_place
def test_f22_both_processes_validate_with_the_average(folder: Path, place: str) -> None:
    for run in ended(folder, place):
        assert len(run["history"]) == 7  # two epochs of three batches for each process
        assert len(run["seen"]) == 2
        assert shows(run["seen"][0], average(run["history"][:4]))
        assert shows(run["seen"][1], average(run["history"]))


@every_place
def test_f02_files_have_the_raw_weights_and_the_average(folder: Path, place: str) -> None:
    run = ended(folder, place)[0]
    for epoch, steps in enumerate((3, 6)):
        saved = torch.load(folder / place / f"epoch={epoch}.ckpt", weights_only=True)
        assert equal(saved["state_dict"], run["history"][steps])
        kept = saved["lightning_aux"]["members"]["ema_weights.teacher"]["weights"]
        assert shows(kept, average(run["history"][: steps + 1]))


@every_place
def test_the_first_process_alone_keeps_whole_shards_for_the_file(folder: Path, place: str) -> None:
    whole = sum(each.numel() for each in Classifier().parameters())
    one, other = (run["again"]["held"] for run in ended(folder, place))
    assert one == [whole]
    assert other == [0 if place == "fsdp2" else whole]  # under ddp they are the store's own


@every_place
def test_a_second_fit_goes_on_from_the_average_in_both_processes(folder: Path, place: str) -> None:
    for run in (each["again"] for each in ended(folder, place)):
        assert len(run["history"]) == 10
        assert shows(run["average"], average(run["history"]))


def test_in_host_memory_it_is_the_same_under_ddp_and_refused_of_shards(folder: Path) -> None:
    for run in ended(folder, "ddp"):
        pairs = zip(run["offloaded"]["seen"], run["seen"], strict=True)
        assert all(equal(one, other) for one, other in pairs)
    for run in ended(folder, "fsdp2"):
        said = run["offloaded"]["said"]
        assert said.startswith("ema_weights.teacher: 'encoder.0.weight'")
        assert "of Sharded are sharded, and offload=True holds whole parameters" in said


@every_place
def test_virtual_steps_leave_both_processes_as_they_were(folder: Path, place: str) -> None:
    for run in ended(folder, place):
        assert equal(run["ahead"], run["plain"])


@every_place
def test_mixtures_are_scored_alike_and_written_once(folder: Path, place: str) -> None:
    one, other = ended(folder, place)
    assert one["curve"] == other["curve"]
    assert one["soup"] == other["soup"]
    assert one["paths"] == other["paths"]
    for run in (one, other):
        assert equal(run["mixed"], run["plain"])
    for coefficient, loss in one["curve"].items():
        between = {
            name: (1 - coefficient) * one["first"][name] + coefficient * value
            for name, value in one["mixed"].items()
        }
        assert loss == pytest.approx(val_loss(between), abs=1e-5)
    soup, mix = (torch.load(path, weights_only=True)["state_dict"] for path in one["paths"])
    assert val_loss(soup) == pytest.approx(one["soup"][0], abs=1e-5)
    assert val_loss(mix) == pytest.approx(min(one["curve"].values()), abs=1e-5)
    assert not list(Path(one["paths"][0]).parent.glob("*.part"))
