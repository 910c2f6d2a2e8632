"""C5 in two processes: `bf16-mixed` and `bf16-true` stay finite, and near float32.

A head is made in the precision of the model, so that it begins elsewhere under `bf16-true`.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract.strategies.jobs import HEAD, WITHOUT
from tests.contract.strategies.matrix import (
    every_comparable,
    every_place,
    furthest,
    in_one_process,
)
from tests.contract.training import TERMS

every_precision = pytest.mark.parametrize(
    ("precision", "limit"),
    [
        pytest.param("bf16-mixed", 2e-2, marks=pytest.mark.vouches("bf16-mixed")),
        pytest.param("bf16-true", 4e-2, marks=pytest.mark.vouches("bf16-true")),
    ],
)


@every_place
@every_precision
@every_comparable
def test_training_in_half_precision_is_finite_and_near_float32(
    ended: Any, place: str, entry: str, precision: str, limit: float
) -> None:
    half = ended(place, f"{precision} {entry}")
    if entry == HEAD and precision == "bf16-true":
        full = in_one_process(place, entry, precision)
    else:
        full = ended(place, f"sgd {entry}")
    logged = [value for row in half["rows"] for key, value in row.items() if "aux/" in key]
    assert all(map(math.isfinite, logged))
    assert all(value.isfinite().all() for value in half["weights"].values())
    assert 0 < furthest(half["weights"], full["weights"]) < limit
    if entry in TERMS or entry == HEAD:
        without = ended(place, f"sgd {WITHOUT}")["weights"]
        # What is smaller is lost in the rounding, and shown against the term by hand elsewhere.
        if furthest(full["weights"], without) > limit / 2:
            assert 0.6 < share(half["weights"], full["weights"], without) < 1.4


def share(half: dict[str, Tensor], full: dict[str, Tensor], without: dict[str, Tensor]) -> float:
    """How much of what the term does in float32 it has done here: 0 for a term that is missing.

    The rounding of half precision may be larger than the whole effect of a term, but it does not
    point the same way.
    """
    here, there, start = (
        torch.cat([each.double().flatten() for each in weights.values()])
        for weights in (half, full, without)
    )
    effect = there - start
    return float((here - start) @ effect / (effect @ effect))
