"""``step.index``: the true dataset indices, whatever draws, batches and prefetches the data."""

from __future__ import annotations

from multiprocessing import active_children
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, WeightedRandomSampler

import lightning_aux as aux
from tests.engine.small_models import Classifier, Probe, Rows, rows


def claimed_and_true(step: aux.Step) -> tuple[list[int], list[int]]:
    return step.index.tolist(), step.batch[0][:, -1].long().tolist()


class Backwards(BatchSampler):
    """Pairs from the end, a lone one last; nothing that torch made."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Any:
        for last in range(self.size - 1, -1, -2):
            yield [last, last - 1] if last else [0]

    def __len__(self) -> int:
        return (self.size + 1) // 2


def weighted(size: int) -> WeightedRandomSampler:
    return WeightedRandomSampler(torch.arange(1.0, size + 1), size, replacement=True)


LOADERS = {
    "in order": lambda: rows(22, 4),
    "shuffled": lambda: rows(22, 4, shuffle=True),
    "shuffled, last batch dropped": lambda: rows(22, 4, shuffle=True, drop_last=True),
    "two persistent workers": lambda: rows(
        22, 4, shuffle=True, num_workers=2, persistent_workers=True
    ),
    "two workers, prefetching far": lambda: rows(
        22, 2, shuffle=True, num_workers=2, prefetch_factor=4
    ),
    "with replacement": lambda: rows(22, 4, sampler=weighted(22)),
    "custom batch sampler": lambda: DataLoader(Rows(21), batch_sampler=Backwards(21)),
    "no batching by torch": lambda: DataLoader(
        Rows(8), batch_size=None, sampler=RandomSampler(range(8))
    ),
    "batches drawn by the sampler": lambda: DataLoader(
        Rows(21), batch_size=None, sampler=Backwards(21)
    ),
}


class Lenient(Classifier):
    """Takes single samples too."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return super().training_step((x.reshape(-1, x.shape[-1]), y.reshape(-1)), batch_idx)


@pytest.mark.parametrize("kind", LOADERS)
def test_indices_are_those_of_the_samples_over_two_epochs(kind, plain_trainer):
    probe = Probe(
        lambda step: (step.index.tolist(), step.batch[0].reshape(-1, 4)[:, -1].long().tolist())
    )
    loader = LOADERS[kind]()
    plain_trainer(max_epochs=2, callbacks=[probe]).fit(Lenient(), loader)
    assert len(probe.seen) == 2 * len(loader)
    for claimed, true in probe.seen:
        assert claimed == true


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_is_cut_short_leaves_nothing_behind_for_the_next(workers, plain_trainer):
    probe = Probe(claimed_and_true)
    loader = rows(24, 4, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    plain_trainer(max_epochs=3, limit_train_batches=2, callbacks=[probe]).fit(Classifier(), loader)
    assert len(probe.seen) == 6
    assert all(claimed == true for claimed, true in probe.seen)


def test_a_loader_that_is_made_anew_every_epoch_is_watched_anew(plain_trainer):
    class Remaking(Classifier):
        made = 0

        def train_dataloader(self) -> Any:
            self.made += 1
            return rows(24 if self.made == 1 else 12, 4, shuffle=True)

    probe = Probe(lambda step: (*claimed_and_true(step), step.dataset_size))
    model = Remaking()
    plain_trainer(max_epochs=2, reload_dataloaders_every_n_epochs=1, callbacks=[probe]).fit(model)
    assert model.made == 2
    assert all(claimed == true for claimed, true, _ in probe.seen)
    assert [size for *_, size in probe.seen] == [24] * 6 + [12] * 3


def test_batches_that_are_overfitted_have_their_indices(plain_trainer):
    probe = Probe(claimed_and_true)
    trainer = plain_trainer(max_epochs=2, overfit_batches=2, callbacks=[probe])
    trainer.fit(Classifier(), rows(24, 4, shuffle=True))
    assert len(probe.seen) == 4
    assert all(claimed == true for claimed, true in probe.seen)


def test_validation_in_mid_epoch_does_not_disturb_the_order(plain_trainer):
    class Validated(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    probe = Probe(claimed_and_true)
    trainer = plain_trainer(
        max_epochs=2, val_check_interval=2, num_sanity_val_steps=2, callbacks=[probe]
    )
    trainer.fit(Validated(), rows(24, 4, shuffle=True), rows(20, 5))
    assert len(probe.seen) == 12
    assert all(claimed == true for claimed, true in probe.seen)


def test_batches_that_the_user_skips_are_skipped_in_the_indices_too(plain_trainer):
    class Picky(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    probe = Probe(claimed_and_true)
    plain_trainer(callbacks=[probe]).fit(Picky(), rows(24, 4, shuffle=True))
    assert len(probe.seen) == 3
    assert all(claimed == true for claimed, true in probe.seen)


@pytest.mark.parametrize("remade", [0, 1])
def test_the_workers_end_with_the_fit(remade, plain_trainer):
    class Loading(Classifier):
        def train_dataloader(self) -> Any:
            return rows(24, 4, num_workers=2, prefetch_factor=4)

        def on_train_batch_start(self, *_: Any) -> None:
            running.add(len(active_children()))

    running: set[int] = set()
    before = len(active_children())
    probe = Probe(claimed_and_true)
    trainer = plain_trainer(
        max_epochs=3, reload_dataloaders_every_n_epochs=remade, callbacks=[probe]
    )
    trainer.fit(Loading())
    assert running == {before + 2}
    assert len(active_children()) == before


def test_the_sampler_is_the_users_again_after_the_fit(plain_trainer):
    loader = rows(24, 4, shuffle=True)
    before = loader.batch_sampler
    plain_trainer(callbacks=[Probe(claimed_and_true)]).fit(Classifier(), loader)
    assert loader.batch_sampler is before


def test_asking_without_having_declared_the_need_says_how_to_declare_it(plain_trainer):
    class Undeclared(Probe):
        needs = ()

    with pytest.raises(aux.AuxiliaryError, match=r'needs = \("index",\)'):
        plain_trainer(callbacks=[Undeclared(lambda step: step.index)]).fit(Classifier(), rows())


class Plain:
    """An iterable that is no DataLoader."""

    def __iter__(self) -> Any:
        return iter(rows())


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from (Rows(8)[each] for each in range(8))


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (lambda: DataLoader(Stream(), batch_size=4), "Stream is iterable and has no index"),
        (Plain, "dataloader is a Plain"),
        (lambda: {"a": rows(), "b": rows()}, "several training dataloaders"),
        (lambda: rows(num_workers=1, in_order=False), "out of order"),
    ],
)
def test_data_without_indices_is_refused_before_the_first_step(loader, reason, plain_trainer):
    class Never(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError("trained")

    with pytest.raises(aux.AuxiliaryError, match=reason):
        plain_trainer(callbacks=[Probe(claimed_and_true)]).fit(Never(), loader())
