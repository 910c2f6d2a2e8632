"""``GradientMonitor``: the gradient of each term beside that of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch._functorch.config as functorch
import torch.distributed as dist
from torch import Tensor

from lightning_aux.engine import Attached, AuxiliaryError, Engine, Progress
from lightning_aux.engine.distributed import processes, shards_parameters
from lightning_aux.engine.replay import Unobserved
from lightning_aux.schedule import Interval, ScheduleError, Time

__all__ = ["GradientMonitor"]


class GradientMonitor(Attached):
    """Logs the gradient of the user's loss beside that of each weighted term: norms and cosines.

    With g the gradient of the user's own loss and gₜ that of weight · term, both with respect to
    the trainable parameters of the user's module (heads are none of them), under ``aux/<name>/``:

    - ``main_norm``: ‖g‖, over all parameters that the loss reaches;
    - ``<term>_norm``: ‖gₜ‖, over the parameters that the loss reaches too;
    - ``<term>_cosine``: g · gₜ / (‖g‖ ‖gₜ‖), over the same; 0 where one of the two vanishes;
    - ``<term>_ratio``: ‖gₜ‖ / ‖g‖, over the same: a ``<term>_norm`` over ``main_norm`` says less
      where the loss reaches more parameters than the term.

    Measured in the first step that Lightning logs after each ``every``, and for its errors in the
    first step of training; logged until the next measurement. Such a step costs one backward pass
    more for the loss and one for each term whose weight is not 0 (their graph is kept meanwhile),
    and the memory of two float32 gradients; other steps cost nothing. The gradient of the loss is
    taken by itself too: as what the terms leave of the total it would be rounding where they are
    large.

    Gradients are those that the optimizer gets, before clipping: with several processes the mean
    over them (one collective for each gradient, so that all log the same), unscaled under a
    gradient scaler, where what overflows is logged as it is. Of an accumulated window it is the
    first micro-batch, whose loss is not divided by their number. In manual optimisation it is the
    first ``manual_backward`` of a step that a term of the ``optimizer`` joins.

    Training is bit-identical to training without; backward hooks of the user's own on modules and
    tensors fire once more for each gradient.

    Args:
        every: from one measurement to the next: optimizer steps, ``"500 steps"``, ``"1ep"``,
            ``"5%"``.
        optimizer: with several optimizers, the index of the one whose terms are looked at.
        name: unique name for logs.

    Raises:
        AuxiliaryError: an ``every`` that is no time; before training, a sharded model (FSDP); in
            the first step, a backward that cannot be run twice.

    Source: Du et al. (2018), "Adapting Auxiliary Losses Using Gradient Similarity",
        arXiv:1812.02224, for the cosine as the sign of whether an auxiliary loss helps. They weigh
        the loss by it; here it is looked at.
    """

    def __init__(self, every: Time = 50, optimizer: int = 0, name: str = "gradients") -> None:
        super().__init__(name)
        try:
            self.interval = Interval(every)
        except ScheduleError as error:
            raise AuxiliaryError(f"{name}: every={every!r}: {error}") from error
        self.optimizer = optimizer
        self._due: Callable[[int], bool] | None = None
        self._pending = self._tried = False
        self._asked = -1  # the optimizer steps that had been taken when it was last time
        self._found: dict[str, Tensor | float] = {}
        self._donates: bool | None = None
        self._unobserved: Unobserved | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_due": None, "_found": {}, "_unobserved": None}

    # ------------------------------------------------------------------------------- membership
    def check(self, engine: Engine) -> None:
        if shards_parameters(engine.trainer.strategy):
            raise AuxiliaryError(
                f"{self.name}: the graph of a sharded model does not lead to its parameters, so "
                f"the gradients of its terms cannot be taken one by one. Use ddp or one process "
                f"to look at them."
            )

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        self._due = engine.bind(self.interval, f"{self.name}: every={self.interval.every}")
        state = state or {}
        self._pending, self._asked = bool(state.get("pending")), int(state.get("asked", -1))
        self._tried, self._found = False, dict(state.get("found", {}))
        self._unobserved = Unobserved(engine.module, whole_steps=True)
        # A compiled backward gives away what it needs for a second one, unless it is told not to.
        self._donates, functorch.donated_buffer = functorch.donated_buffer, False

    def stop(self) -> None:
        if self._donates is not None:
            functorch.donated_buffer, self._donates = self._donates, None
        if self._unobserved is not None:
            self._unobserved.restore()
        self._due, self._unobserved, self._found = None, None, {}

    def state(self) -> dict[str, Any]:
        found = {key: float(value) for key, value in self._found.items()}
        return {"pending": self._pending, "asked": self._asked, "found": found}

    def before_step(self, now: Progress) -> None:
        assert self._due is not None
        if self._asked < now.steps and self._due(now.steps):  # once for all of a window
            self._pending, self._asked = True, now.steps

    def logged(self) -> dict[str, Any]:
        return dict(self._found)

    # ------------------------------------------------------------------------------- measuring
    def before_backward(self, loss: Tensor, terms: Mapping[str, Tensor | None]) -> None:
        logs = self.engine.logs
        if not (self._pending and (logs or not self._tried)):
            return
        parameters = [each for each in self.engine.module.parameters() if each.requires_grad]
        if not parameters:
            return
        main = self._gradient("the loss", loss, parameters)
        # Lightning repeats what is not said anew; the gradient of a term of weight 0 is 0.
        self._found = dict.fromkeys(self._found, 0.0) | {"main_norm": main.norms.norm()}
        for name, term in terms.items():
            own = self._gradient(name, term, parameters)
            theirs, norm = main.norm_within(own), own.norm_within(main)
            tiny = torch.finfo(norm.dtype).tiny
            self._found |= {
                f"{name}_norm": norm,
                f"{name}_cosine": main.flat.dot(own.flat) / (theirs * norm).clamp_min(tiny),
                f"{name}_ratio": norm / theirs.clamp_min(tiny),
            }
        self._tried, self._pending = True, not logs

    def _gradient(self, whose: str, loss: Tensor | None, parameters: list[Any]) -> _Gradient:
        """The mean over the processes; of a term that only others could compute, their part."""
        sizes = [each.numel() for each in parameters]
        device = self.engine.trainer.strategy.root_device
        flat = torch.zeros(sum(sizes) + len(sizes) + 1, dtype=torch.float32, device=device)
        *pieces, reached, failed = torch.split(flat, [*sizes, len(sizes), 1])
        failure: Exception | None = None
        try:
            found = self._derivatives(loss, parameters)
            for place, (piece, each) in enumerate(zip(pieces, found, strict=True)):
                if each is not None:
                    piece.copy_(each.flatten())
                    reached[place] = 1
            del found
        except RuntimeError as error:
            failure = AuxiliaryError(
                f"{self.name}: the backward of {whose} cannot run by itself, before that of the "
                f"step: {error} What is known to help: use_reentrant=False where "
                f"torch.utils.checkpoint is called, and for a model that was compiled and called "
                f"before training torch._dynamo.reset() before Trainer.fit."
            )
            failure.__cause__ = error
            failed.fill_(1)
        if processes() > 1:
            dist.all_reduce(flat)
            flat /= processes()
            if failure is None and bool(failed > 0):
                failure = AuxiliaryError(
                    f"{self.name}: the backward of {whose} failed on another process; the error is "
                    f"in the output of that process."
                )
        if failure is not None:
            raise failure
        return _Gradient(flat[: sum(sizes)], torch.stack(torch._foreach_norm(pieces)), reached > 0)

    def _derivatives(self, loss: Tensor | None, parameters: list[Any]) -> Iterable[Tensor | None]:
        """By one more backward, of which nothing is left but the graph for the next."""
        if loss is None or not loss.requires_grad:
            return [None] * len(parameters)
        assert self._unobserved is not None
        if not self._tried and _runs_backward_within(loss):
            raise RuntimeError("a reentrant checkpoint hides the parameters within it.")
        device = self.engine.trainer.strategy.root_device
        scaler = getattr(self.engine.trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        # A checkpointed region runs again, which may draw, count batches and update metrics.
        with (
            self._unobserved.repeated(device, _draw_on),
            torch.autocast(device.type, enabled=False),
        ):
            scaled = torch.autograd.grad(
                loss * scale, parameters, retain_graph=True, allow_unused=True
            )
        return (None if each is None else _dense(each).float() / scale for each in scaled)


class _Gradient(NamedTuple):
    """A gradient in one row, its norm for each parameter, and which parameters it has."""

    flat: Tensor
    norms: Tensor
    reached: Tensor

    def norm_within(self, other: _Gradient) -> Tensor:
        """The norm over the parameters that both reach."""
        norm: Tensor = self.norms.where(other.reached, 0).norm()
        return norm


def _dense(gradient: Tensor) -> Tensor:
    return torch.Tensor.to_dense(gradient) if gradient.is_sparse else gradient


def _runs_backward_within(loss: Tensor) -> bool:
    """Whether a function in the graph, ``torch.utils.checkpoint``'s, has a graph of its own."""
    seen: set[Any] = {None}
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if "CheckpointFunction" in node.name():
            return True
        waiting += [each for each, _ in node.next_functions]
    return False


def _draw_on() -> None:
    """A recomputed region knows where its random numbers begin."""
