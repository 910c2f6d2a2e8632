"""Folders that two processes have written by ``ModelParallelStrategy``'s default: read as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_aux.weights import export, uniform_soup
from tests.averages import soup_of_shards
from tests.averages.test_ema_weights import average, shows
from tests.averages.test_two_ranks import val_loss
from tests.engine.small_models import equal
from tests.two_processes import run_script

pytestmark = [pytest.mark.xdist_group("soup_of_shards"), pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("soup_of_shards")
    run_script(soup_of_shards.__file__, path, timeout=120)
    return path


def seen(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"seen.{rank}.pt") for rank in (0, 1)]


def test_the_average_in_a_folder_is_exported(folder: Path, tmp_path: Path) -> None:
    run = seen(folder)[0]
    for epoch, steps in enumerate((3, 6)):
        path = folder / f"epoch={epoch}.ckpt"
        assert path.is_dir()
        export(path, tmp_path / "out.ckpt", "ema_weights.teacher")
        written = torch.load(tmp_path / "out.ckpt", weights_only=True)["state_dict"]
        assert shows(written, average(run["history"][: steps + 1]))


def test_a_soup_of_folders_over_files(folder: Path, tmp_path: Path) -> None:
    run = seen(folder)[0]
    uniform_soup([folder / f"epoch={each}.ckpt" for each in (0, 1)], tmp_path / "soup.ckpt")
    written = torch.load(tmp_path / "soup.ckpt", weights_only=True)["state_dict"]
    first, second = run["history"][3], run["history"][6]
    mean = {name: (first[name].double() + second[name].double()) / 2 for name in first}
    assert equal(written, {name: value.float() for name, value in mean.items()})


def test_callbacks_score_and_write_them_in_both_processes(folder: Path) -> None:
    one, other = seen(folder)
    assert one["scores"] == other["scores"]
    assert one["members"] == other["members"]
    for path, score in one["scores"].items():
        steps = 3 if "epoch=0" in path else 6
        assert score == pytest.approx(val_loss(one["history"][steps]), abs=1e-5)
    soup, mix = (
        torch.load(folder / name, weights_only=True)["state_dict"]
        for name in ("soup.ckpt", "wise_ft.ckpt")
    )
    assert val_loss(soup) == pytest.approx(one["score"], abs=1e-5)
    assert val_loss(mix) == pytest.approx(one["curve"][0.6], abs=1e-5)
    assert not list(folder.glob("*.part"))
