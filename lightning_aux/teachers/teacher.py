"""``Teacher``: a second set of weights for the user's module and the rule that moves it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from torch import Tensor, nn

from lightning_aux.engine import Attached, AuxiliaryError, Engine, Progress
from lightning_aux.engine.distributed import sharded_parameters
from lightning_aux.teachers.store import WeightStore

__all__ = ["Teacher"]


class Teacher(Attached):
    """A named second set of weights, shared by every objective that names it.

    Its forward runs at most once per step, in evaluation mode and without gradient, through the
    user's own module with the weights exchanged. Every process holds the same teacher without
    communication, because every process updates it from the same weights.

    Args:
        name: what objectives call it by (``teacher="..."``).
        buffers: ``"copy"`` (take BatchNorm statistics from the live module) or ``"average"``.
    """

    def __init__(self, name: str, buffers: Literal["copy", "average"] = "copy") -> None:
        super().__init__(name)
        if buffers not in ("copy", "average"):
            raise AuxiliaryError(
                f"{name}: buffers={buffers!r} is unknown. Choose 'copy' or 'average'."
            )
        self.buffers = buffers
        self.updates = 0
        self.store: WeightStore | None = None
        self._pending: float | None = None  # decay of a buffer update that is still to come

    def attach(self, engine: Engine) -> None:
        engine.teach(self)

    def check(self, engine: Engine) -> None:
        sharded = sharded_parameters(engine.module)
        if sharded:
            raise AuxiliaryError(
                f"{self.name}: {', '.join(map(repr, sharded[:3]))}"
                f"{' and more' if len(sharded) > 3 else ''} of {type(engine.module).__name__} "
                f"are sharded, and teachers do not support sharded parameters yet. Use a strategy "
                f"that keeps whole parameters (single device, ddp)."
            )

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        self.updates, self.store, self._pending = 0, None, None
        self.begin(engine.module)
        if state is None:
            return
        self.updates = int(state["updates"])
        if "weights" not in state:
            self.store = None
            return
        self.store = self.store or self.new_store(engine.module)
        self.store.load_state_dict(state["weights"], self.name, state.get("buffers"))
        self._pending = state.get("pending")

    def begin(self, module: nn.Module) -> None:
        """Make the first weights; without any, the live weights are the teacher's."""

    def new_store(self, module: nn.Module) -> WeightStore:
        """The live weights as they are now."""
        try:
            return WeightStore(module, self.buffers)
        except AuxiliaryError as error:
            raise AuxiliaryError(f"{self.name}: {error}") from error

    def defer_buffers(self, decay: float) -> None:
        """Have the buffers follow an update of the weights, before the next training step.

        Under DDP the buffers of all processes are made equal just before the training step, not
        after the optimizer step: taken there, every process has the same teacher.
        """
        self._pending = decay if self._pending is None else decay * self._pending

    def before_step(self, now: Progress) -> None:
        if self._pending is not None and self.store is not None:
            self.store.update_buffers(self._pending)
            self._pending = None

    def weights_in_place(self) -> AbstractContextManager[None]:
        """The module with this teacher's weights, for the time of a ``with`` block."""
        return nullcontext() if self.store is None else self.store.in_place()

    def pairs(self) -> tuple[list[nn.Parameter], list[Tensor]]:
        """The trainable parameters and this teacher's values of them."""
        if self.store is not None:
            return self.store.pairs()
        live = [each for each in self.engine.module.parameters() if each.requires_grad]
        return live, [each.detach() for each in live]

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"updates": self.updates}
        if self.store is not None:
            # The weights are whole, for whoever reads the file. A resumed run starts from the
            # buffers before their pending update: like a run that was never interrupted, it then
            # takes the live buffers of the next step.
            state["weights"] = self.store.state_dict(self._pending)
            state["buffers"] = self.store.buffers
            state["pending"] = self._pending if self.store.buffers else None
        return state
