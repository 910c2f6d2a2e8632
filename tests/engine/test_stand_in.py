"""``StandIn``: what is put in the place of weights is taken away again, whatever happens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lightning_aux.engine import stand_in
from lightning_aux.engine.stand_in import StandIn


def doubled(values: Sequence[Tensor]) -> list[Tensor]:
    return [2 * each for each in values]


def test_what_fails_while_the_own_values_are_back_leaves_the_others_in_place() -> None:
    """As a disk that is full while a checkpoint is saved in the middle of a validation."""
    weight = torch.ones(3)
    instead = StandIn("it", doubled)
    instead.put([weight])

    def save() -> None:
        with instead.aside():
            assert weight.eq(1).all()
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        save()
    assert weight.eq(2).all()
    instead.restore()
    assert weight.eq(1).all()


def test_whoever_still_reads_is_waited_for_before_every_write(monkeypatch) -> None:
    weight, seen = torch.ones(1), []
    monkeypatch.setattr(stand_in, "BEFORE_WRITING", [lambda: seen.append(float(weight))])
    instead = StandIn("it", doubled)
    instead.put([weight])
    with instead.aside():
        weight.fill_(5)
    instead.restore()
    assert seen == [1.0, 2.0, 5.0, 10.0]


def test_the_weights_come_back_also_where_a_reader_complains(monkeypatch) -> None:
    weight = torch.ones(1)
    instead = StandIn("it", doubled)
    instead.put([weight])

    def complain() -> None:
        raise RuntimeError("written to meanwhile")

    monkeypatch.setattr(stand_in, "BEFORE_WRITING", [complain])
    with pytest.raises(RuntimeError, match="meanwhile"):
        instead.restore()
    assert weight.eq(1).all()
    assert not instead.in_place
