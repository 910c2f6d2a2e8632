"""Soups over files: against means in float64, a greedy loop by hand, and the memory they need."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

import lightning_aux as aux
from lightning_aux.functional import power_exponent
from lightning_aux.weights import (
    greedy_soup,
    interpolate,
    synthesize_ema,
    uniform_soup,
    wise_ft,
)
from tests.averages.test_candidates import Scored
from tests.engine.small_models import largest_difference, rows
from tests.teachers.test_ema_teacher import Walk


@pytest.fixture
def files(tmp_path) -> list[Any]:
    paths = []
    for number in range(5):
        state = {
            "w": torch.randn(6, 4),
            "half": torch.randn(3).bfloat16(),
            "count": torch.tensor(number + 7),
        }
        paths.append(tmp_path / f"{number}.pt")
        torch.save(state if number % 2 else {"state_dict": state, "epoch": number}, paths[-1])
    return paths


def state_of(path: Any) -> dict[str, Tensor]:
    saved = torch.load(path, weights_only=True)
    return saved.get("state_dict", saved)


def test_a_uniform_soup_is_the_mean(files, tmp_path):
    uniform_soup(files, tmp_path / "soup.ckpt")
    soup, sets = state_of(tmp_path / "soup.ckpt"), [state_of(path) for path in files]
    assert torch.allclose(soup["w"].double(), sum(each["w"].double() for each in sets) / 5)
    expected = (sum(each["half"].double() for each in sets) / 5).bfloat16()
    assert torch.equal(soup["half"], expected)
    assert soup["count"] == 7


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_greedy_soup_is_the_loop_of_the_recipe(files, tmp_path, mode):
    aim = torch.randn(6, 4) / 2
    sign = 1 if mode == "max" else -1

    def score(weights: Any) -> float:
        return -sign * float((weights["w"] - aim).square().sum())

    sets = {str(path): state_of(path)["w"] for path in files}
    order = sorted(sets, key=lambda path: -sign * score({"w": sets[path]}))
    members, best = order[:1], score({"w": sets[order[0]]})
    for path in order[1:]:
        mean = torch.stack([sets[each] for each in [*members, path]]).double().mean(0).float()
        if sign * score({"w": mean}) >= sign * best:
            members, best = [*members, path], score({"w": mean})
    soup = greedy_soup(files, score, tmp_path / "soup.ckpt", mode)
    assert 1 < len(members) < 5
    assert soup.members == members
    assert soup.score == pytest.approx(best)
    assert soup.scores == {path: pytest.approx(score({"w": sets[path]})) for path in sets}
    mean = torch.stack([sets[each] for each in members]).double().mean(0).float()
    assert torch.allclose(state_of(tmp_path / "soup.ckpt")["w"], mean)


@pytest.mark.parametrize("coefficient", [0.0, 0.3, 1.0, 1.5])
def test_weights_between_two_files(files, tmp_path, coefficient):
    interpolate(files[0], files[1], coefficient, tmp_path / "out.pt")
    anchor, tuned, out = (state_of(path) for path in (*files[:2], tmp_path / "out.pt"))
    expected = (1 - coefficient) * anchor["w"].double() + coefficient * tuned["w"].double()
    assert torch.allclose(out["w"].double(), expected, atol=1e-6)
    assert out["count"] == 8


def test_files_that_do_not_fit_are_named(files, tmp_path):
    torch.save({"w": torch.zeros(6, 4)}, tmp_path / "short.pt")
    with pytest.raises(aux.AuxiliaryError, match=r"short\.pt and .*0\.pt .*count, half is in one"):
        uniform_soup([files[0], tmp_path / "short.pt"], tmp_path / "soup.pt")
    other = state_of(files[0]) | {"w": torch.zeros(4, 6)}
    torch.save(other, tmp_path / "turned.pt")
    with pytest.raises(aux.AuxiliaryError, match=r"'w' has shape \(4, 6\) in .*turned\.pt and"):
        uniform_soup([files[0], tmp_path / "turned.pt"], tmp_path / "soup.pt")
    with pytest.raises(aux.AuxiliaryError, match="no checkpoints"):
        uniform_soup([], tmp_path / "soup.pt")
    assert not (tmp_path / "soup.pt").exists()


MEASURES = """
import sys, torch
from lightning_aux.weights import uniform_soup

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

folder, count = sys.argv[1], int(sys.argv[2])
peak = 0
add_ = torch.Tensor.add_
def watched(self, *args, **kwargs):
    global peak
    peak = max(peak, anonymous())
    return add_(self, *args, **kwargs)
torch.Tensor.add_ = watched
before = anonymous()
uniform_soup([f"{folder}/{number}.pt" for number in range(count)], f"{folder}/soup.pt")
print(peak - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_many_checkpoints_need_no_more_memory_than_two(tmp_path):
    """Eight files of 32 MB in eight tensors: the result, and one tensor in float64."""
    for number in range(8):
        torch.save({f"w{i}": torch.randn(2**20) for i in range(8)}, tmp_path / f"{number}.pt")
    script = tmp_path / "measure.py"
    script.write_text(MEASURES)
    peaks = [
        int(
            subprocess.check_output(
                [sys.executable, script, tmp_path, str(count)],
                env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"},  # freed memory goes back
            )
        )
        for count in (2, 8)
    ]
    assert peaks[1] < peaks[0] + 8_000  # kB
    assert peaks[1] < 2 * 32_000


def test_an_average_of_any_length_is_put_together_from_two(plain_trainer, tmp_path):
    """Against the average of that length that really ran beside them."""
    tracks = [aux.EMATeacher(name="short", length=0.05), aux.EMATeacher(name="long", length=0.1)]
    wanted = aux.EMATeacher(name="wanted", length=0.07)
    model, paths = Walk(), []

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step % 50 == 0:
                paths.append(tmp_path / f"{trainer.global_step}.ckpt")
                trainer.save_checkpoint(paths[-1])

    plain_trainer(max_steps=400, max_epochs=-1, callbacks=[*tracks, wanted, Save()]).fit(
        model, rows()
    )
    factors = synthesize_ema(paths, 0.07, tmp_path / "out.ckpt", ["short", "long"])
    assert len(factors) == 16
    truth = wanted.store.state_dict()
    found = state_of(tmp_path / "out.ckpt")
    moved = largest_difference(model.history[0], truth)
    error = largest_difference(found, truth)
    others = [largest_difference(each.store.state_dict(), truth) for each in tracks]
    assert error < 0.05 * min(others)
    assert error < 0.01 * moved
    with pytest.raises(aux.AuxiliaryError, match="has no average by a power function of these"):
        synthesize_ema(paths, 0.07, tmp_path / "out.ckpt", ["none"])


def stored(tmp_path: Any, values: dict[float, float], **buffers: float) -> Any:
    """A checkpoint with power-function averages of these lengths at step 1000."""
    members = {
        f"ema{length}": {
            "updates": 1000,
            "steps": 1000,
            "gamma": power_exponent(length),
            "weights": {"w": torch.full((2,), value)} | numbered(buffers),
            "buffers": numbered(buffers),
        }
        for length, value in values.items()
    }
    state = {"w": torch.zeros(2)} | numbered(buffers)
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.ckpt"
    torch.save({"state_dict": state, "lightning_aux": {"members": members}}, path)
    return path


def numbered(values: dict[str, float]) -> dict[str, Tensor]:
    return {name: torch.full((2,), value) for name, value in values.items()}


@pytest.mark.parametrize("length", [0.03, 0.07, 0.2])
@pytest.mark.filterwarnings("ignore:.*is off by")
def test_weights_that_never_moved_come_out_as_they_are(tmp_path, length):
    path = stored(tmp_path, {0.05: 3.0, 0.1: 3.0})
    factors = synthesize_ema([path], length, tmp_path / "out.ckpt")
    assert sum(factors.values()) == pytest.approx(1)
    assert torch.allclose(state_of(tmp_path / "out.ckpt")["w"], torch.tensor(3.0))


@pytest.mark.filterwarnings("ignore:.*is off by")
def test_variances_are_of_the_latest_checkpoint_not_extrapolated(plain_trainer, tmp_path):
    """Far from the lengths of the tracks, with factors well below zero and beyond one."""
    tracks = [aux.EMATeacher(name=str(each), length=each) for each in (0.05, 0.1)]
    model, paths = Scored(norm=True), []

    class Save(L.Callback):
        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            paths.append(tmp_path / f"{trainer.global_step}.ckpt")
            trainer.save_checkpoint(paths[-1])

    plain_trainer(max_epochs=4, callbacks=[*tracks, Save()]).fit(model, rows())
    factors = synthesize_ema(paths, 0.2, tmp_path / "out.ckpt")
    assert min(factors.values()) < -0.1
    out, latest = state_of(tmp_path / "out.ckpt"), state_of(paths[-1])
    for name in ("norm.running_mean", "norm.running_var"):
        assert torch.equal(out[name], latest[name])


def test_a_length_that_the_tracks_cannot_give_is_said(tmp_path):
    path = stored(tmp_path, {0.05: 1.0, 0.1: 2.0})
    with pytest.warns(
        UserWarning, match=r"2 stored averages from 1 time.*length=0.2 is off by 60%"
    ):
        synthesize_ema([path], 0.2, tmp_path / "out.ckpt")
    with pytest.raises(aux.AuxiliaryError, match=r"length=0.28 is off by 136%.*between those of"):
        synthesize_ema([path], 0.28, tmp_path / "none.ckpt")
    assert not (tmp_path / "none.ckpt").exists()


# --------------------------------------------------------------------------------- scores of NaN
NAN = float("nan")


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_a_diverged_checkpoint_is_not_in_the_soup(files, tmp_path, mode, order):
    """Nor is one whose mean with the others scores NaN."""
    counts = {7: NAN, 8: 0.8, 9: 0.8}  # of the first file alone; of any mean, the best one's

    def score(weights: Any) -> float:
        alone = any(torch.equal(weights["w"], state_of(path)["w"]) for path in files)
        return counts[int(weights["count"])] if alone else NAN

    chosen = [files[place] for place in order]
    soup = greedy_soup(chosen, score, tmp_path / "soup.ckpt", mode)
    assert soup.members == [next(str(path) for path in chosen if path != files[0])]
    assert soup.score == 0.8


def test_scores_that_are_all_nan_are_refused(files, tmp_path):
    with pytest.raises(aux.AuxiliaryError, match="the score of every checkpoint is NaN"):
        greedy_soup(files, lambda _: NAN, tmp_path / "soup.ckpt")
    with pytest.raises(aux.AuxiliaryError, match=r"the score of every coefficient .* is NaN"):
        wise_ft(files[0], files[1], lambda _: NAN, tmp_path / "soup.ckpt")
    assert not (tmp_path / "soup.ckpt").exists()


# ----------------------------------------------------------------------------- WiSE-FT over files
@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_best_weights_between_two_files_and_the_curve(files, tmp_path, mode):
    anchor, tuned = (state_of(path)["w"].double() for path in files[:2])
    sign = 1 if mode == "min" else -1

    def score(weights: Any) -> float:
        """How far from a place at 0.7 of the way."""
        if weights["count"] != 8:
            return NAN
        return sign * float((weights["w"] - (0.3 * anchor + 0.7 * tuned)).square().sum())

    out = tmp_path / "between.ckpt"
    values = [0.0, 0.25, 0.7, 1.0, 1.5]
    scores = wise_ft(files[0], files[1], score, out, mode, values, metric="distance")
    assert list(scores) == values
    length = float((tuned - anchor).square().sum())
    for coefficient, found in scores.items():
        assert found == pytest.approx(sign * (coefficient - 0.7) ** 2 * length, abs=1e-5)
    assert torch.allclose(state_of(out)["w"].double(), 0.3 * anchor + 0.7 * tuned, atol=1e-6)
    lines = out.with_suffix(".csv").read_text().splitlines()
    assert lines[0] == "coefficient,distance"
    assert [tuple(map(float, line.split(","))) for line in lines[1:]] == list(scores.items())
    assert out.with_suffix(".png").stat().st_size > 5000
    with pytest.raises(aux.AuxiliaryError, match="coefficients is empty"):
        wise_ft(files[0], files[1], score, out, coefficients=[])
