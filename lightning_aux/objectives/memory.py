"""``SampleMemory``: one row per training sample, by dataset index; ``Remembering`` has one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_aux.engine import AuxiliaryError, Engine, Progress, Step
from lightning_aux.engine.distributed import Route, collect_rows, from_everyone, processes, rank
from lightning_aux.functional.examples import prepared
from lightning_aux.objective import Objective, ObjectiveOptions
from lightning_aux.objectives.row_storage import Stored, decoded, layout, storage_of
from lightning_aux.schedule import Schedule

__all__ = ["Remembering", "SampleMemory"]

_BLOCK = 1 << 24  # bytes that are converted or gathered at a time
# Of one sample while its row is read and written, besides copies of it: where it is, whether it
# comes twice, and where else.
_BOOKKEEPING = 128


class SampleMemory:
    """A row of numbers for every sample of the training dataset, unseen before the first visit.

    What is written becomes visible when the optimizer has really stepped, so the micro-batches of
    one accumulation window all see the same memory. Where a sample comes several times in a step
    the last counts: later micro-batches, then higher ranks, then later places in the batch.

    The row of sample i is held by process ``i mod processes`` and by no other. All processes
    exchange rows twice in a step and always together, at its beginning and when the optimizer has
    stepped, so that whatever a term does in between on one of them leaves nobody waiting.

    Args:
        storage: ``"float32"``; ``"float16"``; or a number k, also as ``"top-5"``, for the k largest
            entries of a row in float16 with their classes in the smallest integers that fit. The
            rest then counts as spread evenly over the other classes.
        asked_by: begins the message of an error.
    """

    def __init__(self, storage: str | int = "float32", asked_by: str = "the memory") -> None:
        self._storage = storage_of(storage, asked_by)
        self._asked_by = asked_by
        self._forget()

    def _forget(self) -> None:
        self._engine: Any = None
        self._device = torch.device("cpu")
        self._size = 0
        self._shape: tuple[int, ...] = ()
        self._held: Stored = {}
        self._visits: list[_Visit] = []
        # Something was written, so every process has a memory.
        self._arrived: Stored | None = None
        # Begun: something was written, so every process has a memory.
        self._begun = self._announced = False

    @property
    def rows(self) -> Tensor | None:
        """The rows that this process holds, in float32: of samples rank, rank + processes, ....

        ``(held, ..., classes)``; ``None`` before the first read. Computed from what is stored if
        that is not float32.
        """
        return decoded(self._held, self._shape[-1]) if self._held else None

    @property
    def seen(self) -> Tensor | None:
        """Which of the held rows were ever written, bool ``(held,)``."""
        return self._held.get("seen")

    # ----------------------------------------------------------------------------- one step
    def fetch(self) -> None:
        """Bring the rows of the batch that begins here; every process has to call it."""
        if processes() == 1:
            return
        try:
            index = self._engine.indices.current(self._asked_by)
        except Exception:  # the term will say so; the others wait for this process here
            index = torch.empty(0, dtype=torch.int64)
        route = Route(index, self._device)
        self._visits.append(_Visit(route))
        self._arrived = None
        if self._begun:
            self._arrived = self._unpacked(route.bring(_packed(self._at(route.places))))

    def read(self, step: Step, *shape: int) -> tuple[Tensor, Tensor]:
        """What is remembered of the samples of this batch.

        Args:
            step: of the objective.
            shape: of one row; its last dimension are the classes.

        Returns:
            The rows, float32 ``(batch, *shape)``, zero where nothing was written yet; and whether
            something was, bool ``(batch,)``.

        Raises:
            AuxiliaryError: the memory was filled for another number of samples or classes.
        """
        index, size = step.index, (step.dataset_size, shape)
        if self._held and (self._size, self._shape) != size:
            raise AuxiliaryError(
                f"{self._asked_by}: the memory per sample has {(self._size, *self._shape)} rows "
                f"and columns, but the dataset and the model now ask for "
                f"{(step.dataset_size, *shape)}. Train on the dataset that the checkpoint was "
                f"made with, or start without it; sequences need one length in all batches."
            )
        self._size, self._shape = size
        self._announce(len(index))  # before it is there: one that is too large has said so
        if not self._held:
            self._allocate(*size)
        if processes() == 1:
            found = self._at(index.to(self._device))
        elif self._arrived is not None:
            found = self._arrived
        else:  # nobody has written yet
            found = {name: each.new_zeros(len(index), *each.shape[1:]) for name, each in self}
        return decoded(found, shape[-1]).to(index.device), found["seen"].to(index.device)

    def write(self, step: Step, values: Tensor) -> None:
        """Set the rows of this batch once the optimizer has stepped.

        Args:
            step: of the objective.
            values: ``(batch, *shape)``; a gradient is ignored.
        """
        stored = self._storage.encoded(values.detach().to(self._device))
        stored["seen"] = torch.ones(len(values), dtype=torch.bool, device=self._device)
        if processes() == 1:
            index = step.index.to(self._device)
            step.after_optimizer_step(lambda: self._put(index, stored))
        else:
            visit = self._visits[-1]
            step.after_optimizer_step(lambda: visit.wrote(stored))

    def settle(self) -> None:
        """Hand over what was written since the last step; every process has to call it."""
        visits, self._visits = self._visits, []
        if not visits or not (self._begun or self._agree()):
            return
        for visit in visits:
            mine = visit.stored
            if mine is None:  # left out here, or skipped everywhere: rows that say so
                count = len(visit.route)
                mine = {name: each.new_zeros(count, *each.shape[1:]) for name, each in self}
            packed = _packed({name: mine[name] for name in self._held})
            arrived = self._unpacked(visit.route.send(packed))
            self._put(visit.route.places, arrived, arrived["seen"])

    def _agree(self) -> bool:
        """Whether anybody has read, so that there is a memory; then everybody has one."""
        own = (self._size, self._shape) if self._held else None
        found = {each for each in from_everyone(own) if each is not None}
        if len(found) > 1:
            raise AuxiliaryError(
                f"{self._asked_by}: the processes have memories of "
                f"{' and '.join(str((size, *shape)) for size, shape in sorted(found))} rows and "
                f"columns. Give every process the same dataset; the sampler chooses its part."
            )
        for size, shape in found:
            self._begun = True
            if not self._held:
                self._allocate(size, shape)
        return self._begun

    # ------------------------------------------------------------------------ what is held here
    def __iter__(self) -> Any:
        return iter(self._held.items())

    def _at(self, places: Tensor) -> Stored:
        return {name: each[places] for name, each in self}

    def _put(self, places: Tensor, stored: Stored, written: Tensor | None = None) -> None:
        """Set rows; the last of those for one place counts, whatever the device does first."""
        self._begun = True
        # An entry that was not written comes before those of the same place that were.
        key = 2 * places + (1 if written is None else written)
        ordered, order = key.sort(stable=True)
        last = order[torch.searchsorted(ordered, 2 * places + 1, right=True) - 1]
        for name, held in self:
            new = stored[name][last]
            if written is not None:
                kept = written[last].view(-1, *[1] * (new.ndim - 1))
                new = torch.where(kept, new, held[places])
            held[places] = new

    def _allocate(self, size: int, shape: tuple[int, ...]) -> None:
        self._size, self._shape = size, shape
        held = len(range(rank(), size, processes()))
        self._held = {
            name: torch.zeros((held, *inner), dtype=dtype, device=self._device)
            for name, (dtype, inner) in self._layout(shape).items()
        }

    def _layout(self, shape: tuple[int, ...]) -> Any:
        found = layout(self._storage.encoded(torch.zeros(0, *shape)))
        return {"seen": (torch.bool, ()), **found}

    def _row_bytes(self) -> int:
        sizes = (
            math.prod(inner) * torch.empty(0, dtype=dtype).element_size()
            for dtype, inner in self._layout(self._shape).values()
        )
        return sum(sizes)

    def _unpacked(self, packed: Tensor) -> Stored:
        parts = torch.split(packed, [_bytes_of_one(each) for _, each in self], dim=1)
        return {
            # A copy begins at an address that every dtype accepts.
            name: part.clone(memory_format=torch.contiguous_format)
            .view(each.dtype)
            .reshape(len(part), *each.shape[1:])
            for part, (name, each) in zip(parts, self, strict=True)
        }

    def _announce(self, batch: int) -> None:
        if self._announced:
            return
        self._announced = True
        row, world = self._row_bytes(), processes()
        windows = getattr(self._engine.trainer, "accumulate_grad_batches", 1)
        # Rows in float32 for the formula and while they are made smaller, and copies of the stored
        # ones: on the way, in a package and without duplicates, and waiting for the step.
        numbers = math.prod(self._shape)
        work = batch * (2 * 4 * numbers + (4 + windows) * row + _BOOKKEEPING)
        shape = " x ".join(f"{each:,}" for each in self._shape)
        line = f"{self._size:,} samples x {shape} classes, "
        line += f"{self._storage.described(self._shape[-1])}: "
        line += f"{_mebibytes(-(-self._size // world) * row)} "
        line += "" if world == 1 else f"on each of {world} processes "
        line += f"and {_mebibytes(work)} while a batch of {batch} is in work"
        if world > 1:
            whole = self._size * row + 2 * min(_BLOCK, self._size * row)
            line += f"; saving takes {_mebibytes(whole)} of the first process"
        self._engine.say(f"memory of {self._asked_by}", line)

    # ----------------------------------------------------------------------------- checkpoints
    def begin(self, engine: Engine, asked_by: str, state: Any) -> None:
        """Start from what `state` returned, on any number of processes, or empty.

        Args:
            engine: of this fit.
            asked_by: begins the message of an error.
            state: ``None``, or what was saved. Of another storage, it is converted.
        """
        self._forget()
        self._engine, self._asked_by = engine, asked_by
        self._device = engine.trainer.strategy.root_device
        if state is None:
            return
        if isinstance(state, Tensor):  # as it was saved before storage could be chosen
            state = {"seen": state.any(-1), "rows": state, "of": list(state.shape)}
        self._size, *shape = state["of"]
        self._shape = tuple(shape)
        stored = {name: each for name, each in state.items() if isinstance(each, Tensor)}
        if "part" not in state:
            stored = {name: each[rank() :: processes()] for name, each in stored.items()}
        self._begun = True
        self._held = self._converted(stored)

    def _converted(self, stored: Stored) -> Stored:
        wanted = self._layout(self._shape)
        if layout(stored) == wanted:
            # A copy also where it could do without: a checkpoint may be a mapped file.
            return {name: stored[name].to(self._device, copy=True) for name in wanted}
        self._allocate(self._size, self._shape)
        block = max(1, _BLOCK // (4 * math.prod(self._shape)))
        for start in range(0, len(stored["seen"]), block):
            some = {name: each[start : start + block] for name, each in stored.items()}
            rows = self._storage.encoded(decoded(some, self._shape[-1]))
            for name, each in (rows | {"seen": some["seen"]}).items():
                self._held[name][start : start + block] = each
        return self._held

    def state(self) -> dict[str, Any] | None:
        """The whole memory on the first process, and on the others what they hold.

        Only the first process writes checkpoints; the parts of the others serve a second ``fit``.
        Every process has to call it.
        """
        if not self._begun:
            return None
        of: dict[str, Any] = {"of": [self._size, *self._shape]}
        if processes() == 1:
            return {**self._held, **of}
        whole = {name: collect_rows(each, self._size, _BLOCK) for name, each in self}
        if rank() == 0:
            return {**whole, **of}
        return {**self._held, **of, "part": [rank(), processes()]}


class Remembering(Objective):
    """An `Objective` that remembers something of every sample of the training dataset.

    ``loss`` reads with ``rows, seen = self.memory.read(step, classes)`` and writes with
    ``self.memory.write(step, rows)``; it is called also while the weight is 0.

    Attributes:
        memory: of what the storage says.

    Args:
        weight: see `Objective`.
        storage: of the memory, see `SampleMemory`.
        dim: of the classes in the logits; not that of the samples.
        common: name, taps and the like, see `ObjectiveOptions`.

    Raises:
        AuxiliaryError: a ``storage`` or ``dim`` that there is none of.
    """

    needs: ClassVar[tuple[str, ...]] = ("index",)
    observes: ClassVar[bool] = True

    def __init__(
        self,
        weight: float | str | Schedule,
        storage: str | int = "float32",
        dim: int = -1,
        **common: Unpack[ObjectiveOptions],
    ) -> None:
        super().__init__(weight, **common)
        if dim == 0:
            raise AuxiliaryError(f"{self.name}: dim=0 counts samples. Name that of the classes.")
        self.dim = dim
        self.storage = storage
        self.memory = SampleMemory(storage, self.name)

    def classes_last(self, step: Step) -> Tensor:
        """The logits, ``(batch, ..., classes)``, and 0 where the mask leaves an example out.

        Raises:
            AuxiliaryError: they, or the mask, have another shape, or not one entry for each sample.
        """
        logits, dim = step.logits, self.dim
        fits = logits.ndim >= 2 and -logits.ndim < dim < logits.ndim
        if not fits or len(logits) != len(step.index):
            raise AuxiliaryError(
                f"{self.name}: logits of shape {tuple(logits.shape)} with the classes in "
                f"dim={dim} do not fit a batch of {len(step.index)} samples. It needs "
                f"(batch, ..., classes), one entry per sample; name them with "
                f"taps=Taps(logits=...)."
            )
        return prepared(logits.movedim(dim, -1), step.mask, -1)

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        super().start(engine, state)
        saved = state or {}
        # It was called by what it holds when there was one objective with a memory.
        self.memory.begin(engine, self.name, saved.get("memory", saved.get("targets")))

    def before_step(self, now: Progress) -> None:
        self.memory.fetch()

    def after_optimizer_step(self, now: Progress) -> None:
        self.memory.settle()

    def state(self) -> dict[str, Any]:
        return {**super().state(), "memory": self.memory.state()}


@dataclass
class _Visit:
    """The samples of one batch, and what was written of them."""

    route: Route
    stored: Stored | None = None

    def wrote(self, stored: Stored) -> None:
        self.stored = stored


def _packed(stored: Stored) -> Tensor:
    """Rows of all tensors as bytes beside each other, ``(rows, bytes)``."""
    flat = [each.flatten(1) if each.ndim > 1 else each[:, None] for each in stored.values()]
    return torch.cat([each.contiguous().view(torch.uint8) for each in flat], dim=1)


def _bytes_of_one(each: Tensor) -> int:
    return math.prod(each.shape[1:]) * each.element_size()


def _mebibytes(count: int) -> str:
    return f"{math.ceil(10 * count / 2**20) / 10:,.1f} MiB"
