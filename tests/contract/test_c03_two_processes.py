"""C3: two `ddp` processes with half a batch each train like one process with the whole batch.

The samples of a batch come from a shuffled sampler, so each of them moves between processes from
epoch to epoch; per-sample memories have to follow.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_aux.registry import ENTRIES
from tests.contract import two_processes
from tests.contract.models import Classifier, EpochShuffle, Samples
from tests.contract.training import UNDRAWN_TERMS, fit, identical, largest_difference, weights
from tests.contract.two_processes import BATCH, EPOCHS, SAMPLES, SEED
from tests.two_processes import run_script

# One worker of pytest-xdist runs all of this file where groups are kept together (--dist
# loadgroup); otherwise each of them starts its own two processes.
pytestmark = pytest.mark.xdist_group("two_processes")

JOBS = two_processes.jobs()

# The samples of one step are the same in one and in two processes; what a dropout drops is not.
COMPARABLE = [*(name for name, entry in ENTRIES.items() if entry.inert), "head"]
COMPARABLE += ["quantized_weights"]
COMPARABLE += [f"{entry} accumulated" for entry in UNDRAWN_TERMS]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One start of two processes for all jobs: `ended(job, rank)` is what that rank wrote."""
    folder = tmp_path_factory.mktemp("two_processes")
    run_script(two_processes.__file__, folder, timeout=240)

    def read(job: str, rank: int) -> dict[str, Any]:
        found: dict[str, Any] = torch.load(folder / f"{job}.{rank}.pt", weights_only=True)
        return found

    return read


@pytest.mark.parametrize("job", COMPARABLE)
def test_two_half_batches_give_the_weights_of_one_batch(ended: Any, job: str) -> None:
    added, model, options = two_processes.jobs()[job]
    torch.manual_seed(2)
    module = Classifier(**model)
    # Rank r takes entries r, r + 2, … of the permutation: both halves together are its next BATCH.
    sampler = EpochShuffle(SAMPLES, SEED)
    whole = DataLoader(Samples(SAMPLES), batch_size=BATCH, sampler=sampler)
    trainer = fit(module, added, whole, max_epochs=EPOCHS, **options)
    assert trainer.global_step > 0
    assert largest_difference(ended(job, 0)["weights"], weights(module)) < 1e-5
    heads = two_processes.head_parameters(added)
    for actual, value in zip(ended(job, 0)["head"], heads, strict=True):
        assert (actual - value).abs().max() < 1e-5


@pytest.mark.parametrize("part", ["weights", "head", "states", "logged"])
@pytest.mark.parametrize("job", JOBS)
def test_both_processes_end_with_the_same(ended: Any, job: str, part: str) -> None:
    """Weights, heads, teachers and memories are equal to the last bit, and so are the log keys."""
    first, second = ended(job, 0)[part], ended(job, 1)[part]
    if part == "weights":  # Lightning leaves BatchNorm's running statistics to each rank
        parameters = dict(Classifier(norm="BatchNorm" in job).named_parameters())
        first, second = ({key: each[key] for key in parameters} for each in (first, second))
    assert identical(first, second)


def test_the_jobs_are_what_they_claim_to_be(ended: Any) -> None:
    """Heads have weights, states were seen in every step, and terms were logged."""
    assert len(ended("head", 0)["head"]) == 2
    for job in JOBS:
        steps = EPOCHS * SAMPLES // BATCH
        assert len(ended(job, 1)["states"]) == steps
    assert "aux/probe" in ended("head", 1)["logged"]
