"""Soups: weights of several checkpoint files as one, without having them all in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_aux.engine import AuxiliaryError
from lightning_aux.functional import power_exponent, synthesis_weights
from lightning_aux.functional.averages import synthesis_error
from lightning_aux.weights.curve import COEFFICIENTS, best_of, write_curve
from lightning_aux.weights.files import (
    Source,
    Weights,
    averages_in,
    read_checkpoint,
    weights_in,
    write_checkpoint,
)

__all__ = ["Soup", "greedy_soup", "interpolate", "synthesize_ema", "uniform_soup", "wise_ft"]

# A synthesis whose profile is further off, as a share of the wanted one's norm, is told of.
_NEAR = 0.1


@dataclass(frozen=True)
class Soup:
    """What became of a soup.

    Attributes:
        members: the checkpoints that are in it, in the order in which they were added.
        scores: of each checkpoint alone.
        score: of the soup.
    """

    members: list[str]
    scores: dict[str, float]
    score: float


def uniform_soup(checkpoints: Sequence[Source], out: Source) -> None:
    """The mean of the weights of all checkpoints (Wortsman et al. 2022, "Model soups",
    arXiv:2203.05482, section 2).

    Every floating-point value is averaged in float64; integers and booleans are the first one's.
    Running statistics of BatchNorm are averaged too, which is not what the averaged model would
    measure: recompute them with `recompute_batch_norm`.

    Args:
        checkpoints: of one architecture; Lightning checkpoints or plain state_dicts.
        out: the plain checkpoint to write, like the first of them.

    Raises:
        AuxiliaryError: no checkpoint, one that cannot be read, or that has other names or shapes.
    """
    share = 1 / max(1, len(checkpoints))
    mean, first = _combined(checkpoints, [share] * len(checkpoints), "uniform_soup")
    write_checkpoint(first, mean, out)


def greedy_soup(
    checkpoints: Sequence[Source],
    evaluate: Callable[[Weights], float],
    out: Source,
    mode: Literal["min", "max"] = "max",
) -> Soup:
    """The best checkpoint, with every other one that does not make the mean worse.

    In order of their own scores each is added for good if the mean of the soup's members with it
    scores at least as well as without (Wortsman et al. 2022, "Model soups", arXiv:2203.05482,
    recipe 1). The score chooses, so it says too much of the soup: test on other data. A checkpoint
    whose score is NaN comes last, and nothing that makes the soup's score NaN is added.

    Args:
        checkpoints: see `uniform_soup`.
        evaluate: the score of weights by name, on validation data.
        out: the plain checkpoint to write, like the best checkpoint.
        mode: whether larger or smaller scores are better.

    Returns:
        Which checkpoints are in it, and the scores.

    Raises:
        AuxiliaryError: see `uniform_soup`; or every score is NaN.
    """
    if not checkpoints:
        raise AuxiliaryError("greedy_soup: no checkpoints to choose from.")
    sign = 1 if mode == "max" else -1
    scores = {
        str(path): evaluate(weights_in(read_checkpoint(path, "greedy_soup"), str(path)))
        for path in checkpoints
    }
    ranked = sorted(scores, key=lambda path: (math.isnan(scores[path]), -sign * scores[path]))
    if math.isnan(scores[ranked[0]]):
        raise AuxiliaryError(
            f"greedy_soup: the score of every checkpoint is NaN ({', '.join(ranked[:5])}"
            f"{' and more' if ranked[5:] else ''}), so there is none to begin with. Look at the "
            f"validation data and metric; the checkpoints are left as they are."
        )
    members, best = ranked[:1], scores[ranked[0]]
    for path in ranked[1:]:
        tried = [*members, path]
        mean, _ = _combined(tried, [1 / len(tried)] * len(tried), "greedy_soup")
        score = evaluate(mean)
        if sign * score >= sign * best:  # not so if it is NaN
            members, best = tried, score
    uniform_soup(members, out)
    return Soup(members, scores, best)


def interpolate(anchor: Source, tuned: Source, coefficient: float, out: Source) -> None:
    """Weights between two checkpoints: (1 − α)·θ_anchor + α·θ_tuned.

    WiSE-FT (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv:2109.01903,
    equation 1).

    Args:
        anchor: before fine-tuning.
        tuned: after it.
        coefficient: α; outside of [0, 1] it goes beyond them.
        out: the plain checkpoint to write, like ``tuned``.

    Raises:
        AuxiliaryError: see `uniform_soup`.
    """
    mixed, like = _combined([tuned, anchor], [coefficient, 1 - coefficient], "interpolate")
    write_checkpoint(like, mixed, out)


def wise_ft(
    anchor: Source,
    tuned: Source,
    evaluate: Callable[[Weights], float],
    out: Source,
    mode: Literal["min", "max"] = "max",
    coefficients: Sequence[float] = COEFFICIENTS,
    metric: str = "score",
) -> dict[float, float]:
    """`interpolate` with the best of some coefficients, and how good each of them is.

    One set of weights in between is in memory at a time. The table of scores goes beside ``out``
    with the ending ``.csv`` and, if matplotlib is installed, a picture with ``.png``.

    Args:
        anchor: see `interpolate`.
        tuned: see `interpolate`.
        evaluate: the score of weights by name, on validation data. Where there is BatchNorm it
            begins with `recompute_batch_norm`: the statistics it is given are interpolated.
        out: the plain checkpoint of the best coefficient to write, like ``tuned``.
        mode: whether larger or smaller scores are better.
        coefficients: the values of α to try.
        metric: what the scores are, for the table and the picture.

    Returns:
        The score of each coefficient.

    Raises:
        AuxiliaryError: see `uniform_soup`; or every score is NaN.
    """
    if not coefficients:
        raise AuxiliaryError("wise_ft: coefficients is empty: give the values of α to try.")
    scores = {}
    for each in map(float, coefficients):
        mixed, _ = _combined([tuned, anchor], [each, 1 - each], "wise_ft")
        scores[each] = float(evaluate(mixed))
    best = best_of(scores, mode, "wise_ft")
    interpolate(anchor, tuned, best, out)
    write_curve(scores, best, metric, Path(out))
    return scores


def synthesize_ema(
    checkpoints: Sequence[Source],
    length: float,
    out: Source,
    teachers: Sequence[str] | None = None,
) -> dict[str, float]:
    """The power-function average of any length, after training, from averages that were stored.

    Two ``EMATeacher(length=...)`` of different lengths among the callbacks, and a few checkpoints,
    are enough: the result is the sum of all stored averages whose profile is nearest to that of
    the wanted length at the end of the last checkpoint (Karras et al. 2024, "Analyzing and
    Improving the Training Dynamics of Diffusion Models", arXiv:2312.02696, section 3.2). Unlike
    theirs the factors of the fit sum to one, see `synthesis_weights`. Factors may be negative, and
    a variance must not be: buffers (statistics of BatchNorm) are those of the latest checkpoint,
    which are not what the result would measure (`recompute_batch_norm`).

    Lengths between those of the tracks come out well. A shorter or a longer one needs checkpoints
    from many times of training, and is warned about where they do not suffice.

    Args:
        checkpoints: of one run.
        length: of the average, as a share of training, see `power_exponent`.
        out: the plain checkpoint to write, like the latest checkpoint.
        teachers: names of the teachers to use. Default: all with a ``length``.

    Returns:
        The factor of each stored average, by ``"path: teacher"``.

    Raises:
        AuxiliaryError: no such average in a checkpoint, ones that do not fit together, or none
            from which a profile of this length could be put together even roughly.
        ValueError: a length that no exponent has.
    """
    gamma = power_exponent(length)
    stored: dict[tuple[int, float], tuple[Source, str]] = {}
    for path in checkpoints:
        found = averages_in(read_checkpoint(path, "synthesize_ema"))
        tracks = {name: state for name, state in found.items() if state.get("steps")}
        if teachers is not None:
            tracks = {name: state for name, state in tracks.items() if name in teachers}
        if not tracks:
            raise AuxiliaryError(
                f"synthesize_ema: {str(path)!r} has no average by a power function"
                f"{'' if teachers is None else ' of these names'}. Train with "
                f"EMATeacher(length=0.05) and EMATeacher(length=0.1, name='long')."
            )
        for name, state in tracks.items():
            stored.setdefault((int(state["steps"]), float(state["gamma"])), (path, name))
    last = max(steps for steps, _ in stored)
    factors = synthesis_weights(list(stored), (last, gamma))
    _check_fit(synthesis_error(list(stored), factors, (last, gamma)), length, list(stored))
    newest = max(stored)
    latest, track = stored[newest]
    like = read_checkpoint(latest, "synthesize_ema")
    state = averages_in(like)[track]

    def read(place: tuple[Source, str]) -> Weights:
        path, name = place
        weights: Weights = averages_in(read_checkpoint(path, "synthesize_ema"))[name]["weights"]
        return weights

    # The first of them says what is not summed up.
    order = sorted(zip(stored, factors, strict=True), key=lambda each: each[0] != newest)
    places = [stored[each] for each, _ in order]
    factors = [factor for _, factor in order]
    sets, named = [read(place) for place in places], list(map(str, places))
    total = _weighted_sum(sets, factors, named, state.get("buffers", ()))
    write_checkpoint(like, total, out, state.get("ties"))
    return {f"{path}: {name}": factor for (path, name), factor in zip(places, factors, strict=True)}


def _check_fit(error: float, length: float, stored: Sequence[tuple[int, float]]) -> None:
    """Warn of a profile that is only roughly the wanted one, and refuse what is nothing like it."""
    if error <= _NEAR:
        return
    times = len({step for step, _ in stored})
    said = (
        f"synthesize_ema: the nearest that {len(stored)} stored averages from {times} time(s) of "
        f"training come to length={length:g} is off by {error:.0%} of its profile. Give more "
        f"checkpoints of the same run, from all of it, or a length between those of the tracks."
    )
    if error >= 1:
        raise AuxiliaryError(said)
    rank_zero_warn(f"lightning_aux: {said}")


def _combined(
    checkpoints: Sequence[Source], factors: Sequence[float], asked_by: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weighted sum of the weights in some files, and what the first file holds."""
    if not checkpoints:
        raise AuxiliaryError(f"{asked_by}: no checkpoints to average.")
    read = [read_checkpoint(path, asked_by) for path in checkpoints]
    named = [str(Path(path)) for path in checkpoints]
    sets = [weights_in(one, f"{asked_by}: {name}") for one, name in zip(read, named, strict=True)]
    return _weighted_sum(sets, factors, named), read[0]


def _weighted_sum(
    sets: Sequence[Weights],
    factors: Sequence[float],
    named: Sequence[str],
    first_only: Collection[str] = (),
) -> dict[str, Tensor]:
    """Σ factor · weights, name by name: the tensors of one name are in memory at a time.

    What has no floating point, or a name in ``first_only``, is as in the first set.
    """
    first, total = sets[0], {}
    for other, path in zip(sets[1:], named[1:], strict=True):
        missing = sorted(first.keys() ^ other.keys())
        if missing:
            raise AuxiliaryError(
                f"{path} and {named[0]} do not hold the same weights: {', '.join(missing[:5])}"
                f"{' and more' if missing[5:] else ''} is in one of them only."
            )
    for name, value in first.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or name in first_only:
            total[name] = value
            continue
        sum_ = torch.zeros(value.shape, dtype=torch.float64)
        for one, factor, path in zip(sets, factors, named, strict=True):
            added = one[name]
            if added.shape != value.shape:
                raise AuxiliaryError(
                    f"{name!r} has shape {tuple(added.shape)} in {path} and "
                    f"{tuple(value.shape)} in {named[0]}. They belong to other models."
                )
            sum_.add_(added, alpha=factor)
        total[name] = sum_.to(value.dtype)
    return total
