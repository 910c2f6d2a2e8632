"""Which samples of the dataset are in the current batch, with nothing asked of the dataset."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from lightning_aux.engine.errors import AuxiliaryError
from lightning_aux.engine.patches import Patches

__all__ = ["Indices"]


class Indices:
    """Reads the indices where they are drawn: the batch sampler, in the main process.

    DataLoader workers, prefetching and shuffling leave the order of batches as it was drawn, so the
    n-th batch that the DataLoader yields is the n-th that the sampler drew, also where a resumed
    loader passes over the batches of before.
    """

    def __init__(self) -> None:
        self._loader: DataLoader[Any] | None = None
        self._queue: deque[Any] = deque()
        self._taken = 0
        # Weak, so that the iterator and its workers end when the user's loop lets go of them.
        self._batches: Callable[[], Any] = lambda: None
        self._ahead: Callable[[], int] = lambda: 0
        self._current: Any = None
        self._number: int | None = None
        self._refusal: str | None = None
        self.wanted = False

    def install(self, trainer: Any, patches: Patches) -> None:
        """Wrap ``strategy.process_dataloader``: the last stop of a dataloader before its use."""
        process: Callable[[Any], Any] = trainer.strategy.process_dataloader

        def process_dataloader(loader: Any) -> Any:
            loader = process(loader)
            if self.wanted and trainer.training:
                self._watch(loader, patches)
            return loader

        patches.wrap(trainer.strategy, "process_dataloader", process_dataloader)
        # Lightning fetches one batch ahead where the loader has no length.
        self._ahead = lambda: len(getattr(trainer.fit_loop._data_fetcher, "batches", ()))

    def settle(self, trainer: Any) -> None:
        """Refuse several training dataloaders at once; called when training starts."""
        if len(tree_leaves(trainer.train_dataloader)) > 1:
            self._refusal = "there are several training dataloaders"

    def begin_batch(self, number: int) -> None:
        """Move on to the indices of the batch ``number`` (LBFGS runs a step several times)."""
        if self._loader is not None and number != self._number:
            self._number = number
            self._current = self._draw_of_this_batch()

    def _draw_of_this_batch(self) -> Any:
        passed_over, batches = 0, self._batches()
        if batches is not None:
            passed_over = batches._num_yielded - self._ahead() - 1 - self._taken
        for _ in range(min(passed_over, len(self._queue))):
            self._queue.popleft()
        self._taken += max(passed_over, 0) + 1
        return self._queue.popleft() if self._queue else None

    def current(self, asked_by: str) -> Tensor:
        """Dataset indices of the current batch, int64 ``(batch,)``.

        Raises:
            AuxiliaryError: the dataloader has no indices (iterable dataset, no DataLoader,
                several loaders), or nobody declared the need.
        """
        if not self.wanted:
            raise AuxiliaryError(
                f"{asked_by}: step.index was not declared, so it is not recorded. Declare it in "
                f'the class of the objective: needs = ("index",).'
            )
        self.check(asked_by)
        if self._current is None:
            raise AuxiliaryError(
                f"{asked_by}: no sample indices for this batch: the dataloader yielded a batch "
                f"that its sampler did not draw."
            )
        return torch.as_tensor(self._current, dtype=torch.int64).reshape(-1)

    def dataset_size(self, asked_by: str) -> int:
        """Length of the training dataset."""
        self.check(asked_by)
        assert self._loader is not None
        return len(self._loader.dataset)  # type: ignore[arg-type]

    def check(self, asked_by: str) -> None:
        """Raise the reason why there are no sample indices, if there is one."""
        if self._refusal is None and self._loader is None:
            self._refusal = "no training dataloader has passed through the Trainer"
        if self._refusal is not None:
            raise AuxiliaryError(
                f"{asked_by} knows samples by their dataset index, but "
                f"{self._refusal}. Use one torch DataLoader over a map-style dataset (with "
                f"__getitem__ and __len__)."
            )

    def _watch(self, loader: Any, patches: Patches) -> None:
        if not isinstance(loader, DataLoader):
            self._refusal = f"the training dataloader is a {type(loader).__name__}"
            return
        if isinstance(loader.dataset, IterableDataset):
            self._refusal = (
                f"the training dataset {type(loader.dataset).__name__} is iterable and has no index"
            )
            return
        if not getattr(loader, "in_order", True):
            self._refusal = "the training DataLoader delivers batches out of order (in_order=False)"
            return
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        if isinstance(getattr(loader, name), _Recording):
            return
        if getattr(loader, "_iterator", None) is not None:
            self._refusal = (
                "the training DataLoader has persistent workers that were started before training"
            )
            return
        self._loader = loader
        # DataLoader refuses to set these after it is made; the instance dictionary does not.
        patches.set(loader, name, _Recording(getattr(loader, name), self))
        get_iterator: Callable[[], Any] = loader._get_iterator

        def _get_iterator() -> Any:
            batches = get_iterator()
            self._batches = ref(batches)
            return batches

        patches.wrap(loader, "_get_iterator", _get_iterator)

    def _restart(self) -> deque[Any]:
        self._queue, self._taken, self._number = deque(), 0, None
        return self._queue


class _Recording:
    """A (batch) sampler that notes what it draws and is otherwise the one it wraps."""

    def __init__(self, sampler: Any, indices: Indices) -> None:
        self.__dict__.update(_sampler=sampler, _indices=indices)

    def __iter__(self) -> Iterator[Any]:
        queue = self._indices._restart()
        for drawn in self._sampler:
            queue.append(drawn)
            yield drawn

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        if name == "_sampler":  # while unpickling, before the instance has its attributes
            raise AttributeError(name)
        return getattr(self._sampler, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._sampler, name, value)
