"""How the rows of a memory per sample are kept: all of their numbers, or the largest few.

Rows are ``(samples, ..., classes)`` in float32 for the formulas; what is stored of them are tensors
with one entry per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_aux.engine import AuxiliaryError

__all__ = ["Dense", "Stored", "Top", "decoded", "storage_of"]

Stored = dict[str, Tensor]


@dataclass(frozen=True)
class Dense:
    """Every number, in one dtype."""

    dtype: torch.dtype

    def encoded(self, rows: Tensor) -> Stored:
        return {"rows": rows.to(self.dtype)}

    def described(self, classes: int) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Top:
    """The ``k`` largest numbers in float16, the classes that have them, and the sum of the rest.

    The rest, in float32, counts as spread evenly over the other classes, so the sum of a row stays
    what it is: a distribution stays one, and what early-learning regularisation has averaged keeps
    its mass.
    """

    k: int

    def encoded(self, rows: Tensor) -> Stored:
        largest, classes = rows.topk(min(self.k, rows.shape[-1]), dim=-1)
        values = largest.to(torch.float16)
        # After rounding, so that its error is in the rest and not in the sum.
        rest = rows.sum(-1, dtype=torch.float32) - values.sum(-1, dtype=torch.float32)
        return {
            "values": values,
            "classes": classes.to(_smallest(rows.shape[-1])),
            "rest": rest.clamp_min(0),
        }

    def described(self, classes: int) -> str:
        dtype = str(_smallest(classes)).removeprefix("torch.")
        return f"top-{min(self.k, classes)} in float16 with classes in {dtype}"


def decoded(stored: Stored, classes: int) -> Tensor:
    """The rows in float32; float32 rows are the stored tensor itself."""
    if "rows" in stored:
        return stored["rows"].to(torch.float32)
    values = stored["values"]
    others = max(1, classes - values.shape[-1])
    each = (stored["rest"] / others).unsqueeze(-1)
    rows = each.repeat(*[1] * (each.ndim - 1), classes)
    return rows.scatter_(-1, stored["classes"].long(), values.to(torch.float32))


def storage_of(choice: str | int, asked_by: str) -> Dense | Top:
    """What the user's ``storage=`` means.

    Raises:
        AuxiliaryError: it means nothing.
    """
    dense = {"float32": torch.float32, "float16": torch.float16}
    if isinstance(choice, str) and choice in dense:
        return Dense(dense[choice])
    number = choice.removeprefix("top-") if isinstance(choice, str) else choice
    if isinstance(number, str) and number.isdecimal():
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise AuxiliaryError(
            f"{asked_by}: storage={choice!r} is unknown. Choose 'float32', 'float16', or how many "
            f"of the largest entries of a row are kept: 5 or 'top-5'."
        )
    return Top(number)


def layout(stored: Stored) -> dict[str, tuple[torch.dtype, Sequence[int]]]:
    """Dtype and shape of what is stored of one sample."""
    return {name: (each.dtype, tuple(each.shape[1:])) for name, each in stored.items()}


def _smallest(classes: int) -> torch.dtype:
    for dtype in (torch.uint8, torch.int16):
        if classes - 1 <= torch.iinfo(dtype).max:
            return dtype
    return torch.int32
