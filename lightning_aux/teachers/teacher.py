"""``Teacher``: a second set of weights for the user's module and the rule that moves it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from torch import Tensor, nn

from lightning_aux.engine import Attached, AuxiliaryError, Engine, Progress
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
        self._stale_buffers = False

    def attach(self, engine: Engine) -> None:
        engine.teach(self)

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        self.updates, self.store, self._stale_buffers = 0, None, False
        self.begin(engine.module)
        if state is not None:
            self.updates = int(state["updates"])
            if "weights" in state:
                self.store = self.store or self.new_store(engine.module)
                self.store.load_state_dict(state["weights"], self.name)
            else:
                self.store = None

    def begin(self, module: nn.Module) -> None:
        """Make the first weights; without any, the live weights are the teacher's."""

    def new_store(self, module: nn.Module) -> WeightStore:
        """The live weights as they are now."""
        try:
            return WeightStore(module, self.buffers)
        except AuxiliaryError as error:
            raise AuxiliaryError(f"{self.name}: {error}") from error

    def before_step(self, now: Progress) -> None:
        # Under DDP the buffers of all processes are made equal just before the training step, not
        # after the optimizer step: copied here, every process has the same teacher.
        if self._stale_buffers:
            self._refresh_buffers()

    def _refresh_buffers(self) -> None:
        self._stale_buffers = False
        if self.store is not None:
            self.store.copy_buffers()

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
            if self._stale_buffers:
                self._refresh_buffers()
            state["weights"] = self.store.state_dict()
        return state
