"""``SampleMemory``: one row per training sample, keyed by dataset index."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_aux.engine import AuxiliaryError, Step
from lightning_aux.engine.distributed import gather_rows

__all__ = ["SampleMemory"]


class SampleMemory:
    """Rows of float32 for every sample of the training dataset, zero before the first visit.

    What is written becomes visible when the optimizer has really stepped, so the micro-batches of
    one accumulation window all see the same memory. Every process ends with the same rows.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None

    def load(self, rows: Tensor | None) -> None:
        """Start from saved rows, or empty."""
        self.rows = None if rows is None else rows.clone()

    def read(self, step: Step, width: int) -> Tensor:
        """The rows of this batch, ``(batch, width)``.

        Raises:
            AuxiliaryError: the memory was filled for another number of samples or classes.
        """
        size = (step.dataset_size, width)
        index = step.index
        if self.rows is None:
            self.rows = torch.zeros(size, dtype=torch.float32, device=index.device)
        elif tuple(self.rows.shape) != size:
            raise AuxiliaryError(
                f"the memory per sample has {tuple(self.rows.shape)} rows and columns, but the "
                f"dataset and the model now ask for {size}. Train on the dataset that the "
                f"checkpoint was made with, or start without it."
            )
        if self.rows.device != index.device:
            self.rows = self.rows.to(index.device)
        return self.rows[index]

    def write(self, step: Step, values: Tensor) -> None:
        """Set the rows of this batch once the optimizer has stepped."""
        index = step.index

        def act() -> None:
            assert self.rows is not None
            everywhere, rows = gather_rows(index, values)
            self.rows[everywhere] = rows

        step.after_optimizer_step(act)
