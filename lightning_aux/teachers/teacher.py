"""``Teacher``: a second set of weights for the user's module and the rule that moves it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from torch import Tensor, nn

from lightning_aux.engine import (
    Attached,
    AuxiliaryError,
    Engine,
    Locations,
    Pass,
    Progress,
    Record,
    Step,
)
from lightning_aux.engine.distributed import has_flat_parameters
from lightning_aux.functional.shards import is_sharded
from lightning_aux.weights.store import WeightStore

__all__ = ["Teacher"]


class Teacher(Attached):
    """A named second set of weights, shared by every objective that names it.

    Its forward runs at most once per step, in evaluation mode and without gradient, through the
    user's own module with the weights exchanged (a `VotedTeacher` has several sets). Every process
    holds the same teacher without communication, because every process updates it from the same
    weights; only buffers of a model sharded by FSDP2, which keeps them different on each process,
    are sent by the first process to the others at every update, in one message for each dtype.

    On steps where Lightning logs, ``aux/<name>/distance`` is ‖θ_T − θ‖₂ / ‖θ‖₂ over the parameters
    that are trainable then: how far it is from the student. Both are the weights with which the
    losses of the same row were computed, before the optimizer's step; 0 while the teacher is the
    student. Sharded by FSDP2 that is one collective of two numbers for each tensor, on these steps
    only. A teacher that is another module, or stored logits, has none.

    Attributes:
        updates: how often the weights have moved.
        store: the weights; while there are none, they are the student's.
        pending: decay of an update of the buffers that is still to come, see `defer_buffers`.

    Args:
        name: what objectives call it by (``teacher="..."``).
        buffers: ``"copy"`` (take BatchNorm statistics from the live module) or ``"average"``.
        optimizer: with several optimizers, the index of the one whose steps move this teacher.
            Default: that of the objectives that name it, else the first.
        offload: whether its weights are in host memory, see `WeightStore`.

    Raises:
        AuxiliaryError: before training, when objectives of different optimizers name one teacher,
            or the strategy shards parameters in another way than FSDP2, or at all with ``offload``.
    """

    averages: bool = False
    """Whether its weights follow the student's and can stand in for them."""

    def __init__(
        self,
        name: str,
        buffers: Literal["copy", "average"] = "copy",
        optimizer: int | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__(name)
        if buffers not in ("copy", "average"):
            raise AuxiliaryError(
                f"{name}: buffers={buffers!r} is unknown. Choose 'copy' or 'average'."
            )
        self.buffers = buffers
        self.offload = offload
        self._counts = optimizer
        self._serves: dict[str, int] = {}
        self.updates = 0
        self.store: WeightStore | None = None
        self.pending: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "store": None}

    @property
    def follows(self) -> bool:
        """Whether it has values for the student's own parameters."""
        return True

    @property
    def ready(self) -> bool:
        """Whether there is something to learn from yet; until then objectives have no weight."""
        return True

    def attach(self, engine: Engine) -> None:
        self._serves.clear()
        engine.teach(self)

    @property
    def optimizer(self) -> int:  # type: ignore[override]
        """The index of the optimizer whose steps move this teacher."""
        if self._counts is not None:
            return self._counts
        return next(iter(self._serves.values()), 0)

    def serve(self, optimizer: int, asked_by: str) -> None:
        """Note an objective that uses this teacher, and the optimizer it belongs to.

        Raises:
            AuxiliaryError: this teacher counts the steps of another objective's optimizer.
        """
        self._serves[asked_by] = optimizer
        other = next((name for name, each in self._serves.items() if each != optimizer), None)
        if self._counts is None and other is not None:
            raise AuxiliaryError(
                f"{self.name}: {asked_by} belongs to optimizer {optimizer}, and {other} to "
                f"{self._serves[other]}. Give each its own teacher, or say whose steps move this "
                f"one: {type(self).__name__}(optimizer=...)."
            )

    def check(self, engine: Engine) -> None:
        flat = has_flat_parameters(engine.module)
        if flat:
            raise AuxiliaryError(
                f"{self.name}: {', '.join(map(repr, flat[:3]))}"
                f"{' and more' if len(flat) > 3 else ''} of {type(engine.module).__name__} are "
                f"sharded by FSDP1 or DeepSpeed ZeRO-3, which teachers do not support. Use "
                f"ModelParallelStrategy (FSDP2), or a strategy that keeps whole parameters (single "
                f"device, ddp)."
            )
        if self.offload and any(is_sharded(each) for each in engine.module.parameters()):
            self.new_store(engine.module)  # says what is wrong

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        self._drop()
        self.updates, self.pending = 0, None
        self.begin(engine.module)
        if state is None:
            return
        self.updates = int(state["updates"])
        if "weights" not in state:
            self._drop()
            return
        self.store = self.store or self.new_store(engine.module)
        self.store.load_state_dict(state["weights"], self.name, state.get("buffers"))
        self.store.written.update(state.get("written", ()))
        self.pending = state.get("pending")

    def _drop(self) -> None:
        if self.store is not None:
            self.store.close()
        self.store = None

    def begin(self, module: nn.Module) -> None:
        """Make the first weights; without any, the live weights are the teacher's."""

    def new_store(self, module: nn.Module) -> WeightStore:
        """The live weights as they are now."""
        try:
            return WeightStore(module, self.buffers, self.offload)
        except AuxiliaryError as error:
            raise AuxiliaryError(f"{self.name}: {error}") from error

    def defer_buffers(self, decay: float) -> None:
        """Have the buffers follow an update of the weights, before the next training step.

        Under DDP the buffers of all processes are made equal just before the training step, not
        after the optimizer step: taken there, every process has the same teacher.
        """
        self.pending = decay if self.pending is None else decay * self.pending

    def buffers_now(self) -> dict[str, Tensor] | None:
        """The buffers with the update that is still to come; ``None``: those of the store."""
        if self.store is None or self.pending is None:
            return None
        return self.store.buffers_after(self.pending)

    def before_step(self, now: Progress) -> None:
        self.take_buffers()

    def take_buffers(self) -> None:
        """Take what is new in the live module, and the buffers if they are still to come."""
        if self.store is None:
            return
        self.store.follow()  # what has appeared starts here as it is now
        if self.pending is not None:
            self.store.update_buffers(self.pending)
            self.pending = None

    def reads(self, paths: Iterable[str], asked_by: str) -> None:
        """Note modules whose output or input an objective wants of this teacher's passes.

        Args:
            paths: module paths or globs, of the module that the teacher runs.
            asked_by: the objective.

        Raises:
            AuxiliaryError: there is no such module; near matches are listed.
        """
        self.engine.capture.add(paths, asked_by)

    def run(self, step: Step) -> list[Record]:
        """The batch through the user's module, once for each set of weights."""
        whose = f"the teacher {self.name!r}"
        return [step.evaluated(weights, whose) for weights in self.weights_in_place()]

    def show(self, taught: list[Record], locations: Locations, asked_by: str) -> Pass:
        """What `run` returned, as one objective sees it.

        Args:
            taught: from `run`.
            locations: the objective's taps.
            asked_by: the objective.
        """
        return Pass(self.engine, taught[0], locations, asked_by)

    def weights_in_place(self) -> list[AbstractContextManager[None]]:
        """For each set of weights, the module with these for the time of a ``with`` block."""
        return [nullcontext() if self.store is None else self.store.in_place()]

    def pairs(self) -> tuple[list[nn.Parameter], list[Tensor]]:
        """The trainable parameters and this teacher's values of them."""
        if self.store is not None:
            return self.store.pairs()
        live = [each for each in self.engine.module.parameters() if each.requires_grad]
        return live, [each.detach() for each in live]

    def logged(self) -> dict[str, Any]:
        """The distance, where there is something to learn from."""
        if not (self.follows and self.ready):
            return {}
        with self.engine.own_weights():
            distances = [each.distance() for each in self.stores]
        return {"distance": sum(distances) / len(distances) if distances else 0.0}

    @property
    def stores(self) -> list[WeightStore]:
        """The sets of weights that there are; none while they are the student's."""
        return [] if self.store is None else [self.store]

    def stop(self) -> None:
        if self.store is not None:  # Ctrl-C may have come while it was putting the weights back
            self.store.restore()
            self.store.close()

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"updates": self.updates}
        if self.store is not None:
            # The weights are whole, for whoever reads the file. A resumed run starts from the
            # buffers before their pending update: like a run that was never interrupted, it then
            # takes the live buffers of the next step.
            state["weights"] = self.store.state_dict(self.buffers_now())
            state["ties"] = self.store.ties
            state["buffers"] = self.store.buffers
            state["written"] = sorted(self.store.written)
            state["pending"] = self.pending if self.store.buffers else None
        return state
