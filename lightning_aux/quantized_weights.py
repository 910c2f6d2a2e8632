"""``QuantizedWeights``: train full-precision weights by the gradients of quantised ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_aux.averages import EMAWeights
from lightning_aux.engine import Attached, AuxiliaryError, Engine, Progress
from lightning_aux.engine.distributed import has_flat_parameters, shards_parameters
from lightning_aux.engine.errors import near_matches
from lightning_aux.engine.patches import Patches, evaluation_loop
from lightning_aux.engine.stand_in import StandIn
from lightning_aux.engine.taps import matches_any, plain_path
from lightning_aux.functional.quantization import Buckets
from lightning_aux.objectives.parameter_anchor import ParameterAnchor
from lightning_aux.weights import files
from lightning_aux.weights.registrations import Registrations

__all__ = ["QuantizedWeights"]


class QuantizedWeights(Attached):
    """Runs forward and backward with Q(w), and applies that gradient to w.

    In every training step, of every micro-batch, the parameters have the quantised values of their
    own: w in buckets of consecutive elements, each rounded to ``2^bits`` values between the least
    and the greatest, see `lightning_aux.functional.quantize`. From the time that the gradients are
    there the module has w again, in full precision, bit for bit: optimizers, teachers and averages
    move by w, and checkpoints hold it whenever they are saved. Validation, test and prediction run
    with Q(w). `export` writes it as a plain checkpoint.

    Polino, Pascanu & Alistarh 2018, "Model compression via distillation and quantization",
    arXiv:1802.05668, algorithm 1; with an objective that has a teacher this is its quantised
    distillation.

    Args:
        bits: of each weight, 1 to 16.
        bucket: elements that share a least and a greatest value.
        parameters: globs of the names of parameters that are quantised, trainable or not.
        exclude: globs of those among them that are not (often the first and the last layer).
        evaluate: whether validation, test and prediction run with Q(w) too.
        name: unique name.

    Raises:
        AuxiliaryError: ``bits`` or ``bucket`` out of range; before anything runs, `EMAWeights`
            beside ``evaluate=True``; before training, a glob that matches no parameter, sharded
            parameters, an LBFGS optimizer, a `ParameterAnchor` that adds noise, another
            `QuantizedWeights` with the same parameter; in manual optimisation, at a step with a
            closure or past Lightning.

    Note:
        Whatever reads parameters within a step (an objective on weights, your own penalty in
        ``training_step``) sees Q(w), and what your code writes into quantised parameters there (a
        clamp) is undone: write in ``on_train_batch_end``, or in the optimizer. Buffers, BatchNorm's
        statistics among them, are the live ones and not quantised. In ``on_after_backward``
        callbacks that stand before this one still see Q(w), and those after it w.
    """

    turn = 2  # after whatever else changes or measures the weights

    def __init__(
        self,
        bits: int = 4,
        bucket: int = 256,
        parameters: str | Iterable[str] = "*.weight",
        exclude: str | Iterable[str] = (),
        evaluate: bool = True,
        name: str = "quantized_weights",
    ) -> None:
        super().__init__(name)
        if not 1 <= bits <= 16:
            raise AuxiliaryError(f"{name}: bits={bits} must be from 1 to 16.")
        if bucket < 2:
            raise AuxiliaryError(
                f"{name}: bucket={bucket}: at least two elements share a range; 256 is usual."
            )
        self.bits, self.bucket, self.evaluate = bits, bucket, evaluate
        self.parameters = (parameters,) if isinstance(parameters, str) else tuple(parameters)
        self.exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        self._stand_in = StandIn(name, self._quantized)
        self._patches = Patches()
        self._named: dict[str, nn.Parameter] = {}
        self._buckets, self._listed = Buckets([], bucket), -1

    def __getstate__(self) -> dict[str, Any]:
        stand_in = StandIn(self.name, self._quantized)
        empty = {"_named": {}, "_buckets": Buckets([], self.bucket), "_listed": -1}
        return {**super().__getstate__(), **empty, "_stand_in": stand_in, "_patches": Patches()}

    # --------------------------------------------------------------------------------- training
    def check(self, engine: Engine) -> None:
        named = self._chosen(engine.module)
        self._check_sharding(engine.trainer, engine.module)
        for optimizer in engine.trainer.optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                raise AuxiliaryError(
                    f"{self.name}: LBFGS compares losses at weights that differ by less than a "
                    f"level, where Q(w) is the same. Use SGD or Adam."
                )
        for other in engine.members.values():
            if isinstance(other, ParameterAnchor) and other.form == "variational":
                raise AuxiliaryError(
                    f"{self.name}: {other.name} adds noise to the weights in every step, which "
                    f"would be rounded away or be added to rounded ones. Leave one of them out."
                )
            if isinstance(other, QuantizedWeights) and other is not self:
                both = sorted(named.keys() & other._chosen(engine.module).keys())
                if both:
                    raise AuxiliaryError(
                        f"{self.name}: {other.name} quantises {', '.join(map(repr, both[:3]))}"
                        f"{' and more' if both[3:] else ''} too. Let parameters= and exclude= of "
                        f"the two name different parameters."
                    )

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        Registrations.watch(id(self))
        self._list(engine.module)
        engine.stand_ins.append(self._stand_in)

    def before_step(self, now: Progress) -> None:
        if self._listed != Registrations.count:
            self._list(self.engine.module)
        self._stand_in.put([*self._named.values()])

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if pl_module.automatic_optimization:  # otherwise the step may go on with another forward
            self._stand_in.restore()

    def stop(self) -> None:
        self._stand_in.restore()
        Registrations.leave(id(self))

    def state(self) -> dict[str, Any]:
        """What `export` has to know."""
        return {"bits": self.bits, "bucket": self.bucket, "quantized": sorted(self._named)}

    # ------------------------------------------------------------------------------- evaluation
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        averaged = [each for each in trainer.callbacks if isinstance(each, EMAWeights)]
        if self.evaluate and averaged:
            raise AuxiliaryError(
                f"{self.name}: {averaged[0].name!r} among the Trainer's callbacks evaluates with "
                f"an average, and the module cannot be evaluated with Q(w) at the same time. Give "
                f"QuantizedWeights(evaluate=False), or an EMATeacher in place of the EMAWeights."
            )
        super().setup(trainer, pl_module, stage)
        self._patches.undo()
        self._patches.surround(trainer, "save_checkpoint", self._stand_in.aside)
        if self.evaluate:
            loop = evaluation_loop(trainer, stage)
            self._patches.surround(loop, "run", lambda: self._evaluated(trainer, pl_module))

    @contextmanager
    def _evaluated(self, trainer: Any, module: nn.Module) -> Iterator[None]:
        self._check_sharding(trainer, module)
        self._list(module)
        try:
            self._stand_in.put([*self._named.values()])
            yield
        finally:
            self._stand_in.restore()

    def end(self) -> None:
        self._stand_in.restore()
        self._patches.undo()
        self._buckets, self._listed = Buckets([], self.bucket), -1

    # ----------------------------------------------------------------------------------- export
    @staticmethod
    def export(checkpoint: str | Path, out: str | Path) -> None:
        """Write the quantised weights of a checkpoint, see `lightning_aux.weights.quantized`.

        Args:
            checkpoint: of a run with `QuantizedWeights`.
            out: the file to write.

        Raises:
            AuxiliaryError: no file, or one of a run without.
        """
        files.quantized(checkpoint, out)

    # ------------------------------------------------------------------------------------- what
    def _chosen(self, module: nn.Module) -> dict[str, nn.Parameter]:
        named = {plain_path(name): each for name, each in module.named_parameters()}
        for glob in (*self.parameters, *self.exclude):
            if not any(matches_any(name, (glob,)) for name in named):
                raise AuxiliaryError(
                    f"{self.name}: no parameter is called {glob!r}. "
                    f"{near_matches(glob, sorted(named))}"
                )
        chosen = {
            name: each
            for name, each in named.items()
            if matches_any(name, self.parameters) and not matches_any(name, self.exclude)
        }
        for name, each in chosen.items():
            if is_lazy(each):
                raise AuxiliaryError(
                    f"{self.name}: {name!r} has no shape yet, so there is nothing to quantise. "
                    f"Run one batch through the module first, for example in configure_model."
                )
        return {name: each for name, each in chosen.items() if each.is_floating_point()}

    def _list(self, module: nn.Module) -> None:
        self._named = self._chosen(module)
        self._buckets = Buckets([*self._named.values()], self.bucket)
        self._listed = Registrations.count

    def _quantized(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._buckets.quantize(values, self.bits)

    def _check_sharding(self, trainer: Any, module: nn.Module) -> None:
        if shards_parameters(trainer.strategy) or has_flat_parameters(module):
            raise AuxiliaryError(
                f"{self.name}: buckets need whole parameters, and "
                f"{type(trainer.strategy).__name__} shards them. Use a strategy that keeps whole "
                f"parameters (single device, ddp)."
            )
