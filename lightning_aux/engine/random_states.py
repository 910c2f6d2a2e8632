"""``RandomStates``: where the random streams of torch, Python and NumPy stand, to go back there."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["RandomStates", "drawing_from", "seed_everything"]


@dataclass(frozen=True, eq=False)
class RandomStates:
    """The streams that a model may draw from, at one moment.

    Read and written on the host: no device has to be waited for.
    """

    device: torch.device
    cpu: Tensor
    cuda: Tensor | None
    python: Any
    numpy: Any

    @classmethod
    def now(cls, device: torch.device, libraries: bool = True) -> RandomStates:
        """As they are.

        Args:
            device: of the model; its stream beside that of the CPU.
            libraries: Python's and NumPy's too, of which reading costs more than torch's.
        """
        numpy = _numpy() if libraries else None
        return cls(
            device,
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            random.getstate() if libraries else None,
            None if numpy is None else numpy.random.get_state(),
        )

    def restore(self) -> None:
        """Put the streams back to where they were."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
        if self.python is not None:
            random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    def libraries_moved(self) -> bool:
        """Whether something has been drawn from Python's or NumPy's stream since."""
        if self.python != random.getstate():
            return True
        numpy = _numpy()
        if numpy is None:
            return False
        if self.numpy is None:  # imported since
            return True
        (_, ours, *rest), (_, theirs, *others) = self.numpy, numpy.random.get_state()
        return rest != others or bool((ours != theirs).any())


def seed_everything(seed: int) -> None:
    """Let every stream begin at ``seed``, an integer without a sign."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = _numpy()
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


@contextmanager
def drawing_from(seed: int, device: torch.device) -> Iterator[None]:
    """A block that draws its own random numbers, after which the streams go on as before it."""
    before = RandomStates.now(device)
    try:
        seed_everything(seed)
        yield
    finally:
        before.restore()


def _numpy() -> Any:
    """NumPy, or None: where nobody has imported it, nobody draws from it."""
    return sys.modules.get("numpy")
