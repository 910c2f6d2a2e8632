"""The parameters of this folder's tests, and what their results are compared with."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_aux.registry import ENTRIES
from tests.contract.strategies import jobs
from tests.contract.strategies.places import PLACES
from tests.contract.training import shared

# One worker of pytest-xdist runs all tests of a place where groups are kept together (--dist
# loadgroup); otherwise each of them starts its own two processes.
_PLACES = {
    name: pytest.param(
        name,
        marks=[
            pytest.mark.xdist_group(f"strategies {name}"),
            pytest.mark.vouches(place.column),
        ],
    )
    for name, place in PLACES.items()
}
every_place = pytest.mark.parametrize("place", _PLACES.values())
every_sharded_place = pytest.mark.parametrize(
    "place", [_PLACES[name] for name, place in PLACES.items() if place.sharded]
)
in_ddp = pytest.mark.parametrize("place", [_PLACES["ddp"]])

every_case = pytest.mark.parametrize("entry", jobs.CASES)
# The samples of one step are the same in one and in two processes; what a dropout drops is not.
COMPARABLE = [name for name in jobs.CASES if name == jobs.HEAD or ENTRIES[name].inert]
PER_SAMPLE = [name for name in COMPARABLE if name == jobs.HEAD or ENTRIES[name].per_sample]
every_comparable_per_sample = pytest.mark.parametrize("entry", PER_SAMPLE)
every_comparable = pytest.mark.parametrize("entry", COMPARABLE)
TAUGHT = [name for name in jobs.CASES if jobs.has_teacher(name)]
every_taught = pytest.mark.parametrize("entry", TAUGHT)
TOLERANCE = 1e-5


def in_one_process(place: str, entry: str, variant: str) -> dict[str, Any]:
    """The same samples in the same steps."""
    return _in_one_process(place, shared(entry), variant)


@cache
def _in_one_process(place: str, entry: str, variant: str) -> dict[str, Any]:
    return jobs.trained(PLACES[place].one_process, entry, variant)


def replicated(nested: Any) -> Any:
    """The nest without memories per sample, of which every process holds a part."""
    if isinstance(nested, dict):
        return {key: replicated(each) for key, each in nested.items() if key != "memory"}
    return [replicated(each) for each in nested] if isinstance(nested, list) else nested


def furthest(left: Any, right: Any) -> float:
    """The largest difference of any number in two nests of the same form."""
    (a, tree), (b, other) = tree_flatten(left), tree_flatten(right)
    assert tree == other
    differences = [0.0]
    for one, another in zip(a, b, strict=True):
        if isinstance(one, Tensor) and one.is_floating_point():
            assert one.shape == another.shape
            difference = (one.double() - another.double()).abs()
            differences += [float(difference.max())] if difference.numel() else []
        elif isinstance(one, float):
            differences.append(abs(one - another))
        else:
            assert one.equal(another) if isinstance(one, Tensor) else one == another
    return max(differences)
