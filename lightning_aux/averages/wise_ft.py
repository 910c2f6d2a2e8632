"""``WiSEFT``: weights between those before and after fine-tuning, and how good each is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_aux.averages.candidates import AfterTraining, check_validation
from lightning_aux.averages.folder import folder_of
from lightning_aux.engine import Attached, AuxiliaryError, Engine
from lightning_aux.teachers import FrozenTeacher
from lightning_aux.weights import WeightStore
from lightning_aux.weights.curve import COEFFICIENTS, best_of, write_curve
from lightning_aux.weights.files import Weights, write_checkpoint

__all__ = ["WiSEFT"]


class WiSEFT(AfterTraining):
    """Interpolates between the weights before and after fine-tuning, when training ends.

    ``θ(α) = (1 − α)·θ_0 + α·θ_1`` (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models",
    arXiv:2109.01903, equation 1), evaluated on the validation data for every ``α``; the best is
    written as a plain checkpoint, the curve as a table and a picture. Validation data like the
    training data mostly prefer α near 1: what the mixture is for is data that differ, so look at
    the curve on such data before choosing.

    Args:
        monitor: a metric of the validation, which the coefficient is chosen by.
        mode: whether a ``"max"`` or ``"min"`` of it is better.
        anchor: path of the checkpoint before fine-tuning. Default: the weights with which ``fit``
            began, kept through resumed runs.
        coefficients: the values of α to try.
        batch_norm: ``"recompute"`` measures running statistics on the training data for every α,
            see `ModelSoup`; ``"average"`` interpolates them too.
        filename: of the checkpoint, in the folder of the checkpoints; the curve goes beside it
            with the endings ``.csv`` and, if matplotlib is installed, ``.png``.
        name: unique name.

    Attributes:
        path: the file, once it is written.
        curve: the metric by coefficient.
        coefficient: the best one.

    Raises:
        AuxiliaryError: no coefficients; before training, nothing to choose by, or an anchor that
            cannot be read or belongs to another model; when training ends, no score that is a
            number.
    """

    def __init__(
        self,
        monitor: str,
        mode: Literal["min", "max"] = "max",
        anchor: str | Path | None = None,
        coefficients: Sequence[float] = COEFFICIENTS,
        batch_norm: Literal["recompute", "average"] = "recompute",
        filename: str = "wise_ft.ckpt",
        name: str = "wise_ft",
    ) -> None:
        super().__init__(name, batch_norm)
        if mode not in ("min", "max"):
            raise AuxiliaryError(f"{name}: mode={mode!r} is unknown. Choose 'min' or 'max'.")
        if not coefficients:
            raise AuxiliaryError(f"{name}: coefficients is empty: give the values of α to try.")
        self.monitor = monitor
        self.mode: Literal["min", "max"] = mode
        self.coefficients = tuple(float(each) for each in coefficients)
        self.filename = filename
        self.anchor = FrozenTeacher(f"{name}.anchor", anchor)
        self.path: Path | None = None
        self.curve: dict[float, float] = {}
        self.coefficient: float | None = None

    def companions(self) -> list[Attached]:
        return [self.anchor]

    def check(self, engine: Engine) -> None:
        check_validation(engine.trainer, self.name)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        assert self.anchor.store is not None, "a frozen teacher has weights from the start"
        tuned_store = WeightStore(pl_module)
        tuned, anchor = tuned_store.state_dict(), self.anchor.store.state_dict()
        ties = tuned_store.ties
        tuned_store.close()
        with self.candidates(trainer, pl_module) as candidates:
            self.curve = {
                each: candidates.score(_between(anchor, tuned, each), self.monitor)
                for each in self.coefficients
            }
            self.coefficient = best_of(self.curve, self.mode, self.name)
            best: Weights = _between(anchor, tuned, self.coefficient)
            if candidates.measures:
                best = candidates.measured(best)
        out = folder_of(trainer) / self.filename
        like = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
        if trainer.is_global_zero:
            write_checkpoint(like, best, out, ties)
            write_curve(self.curve, self.coefficient, self.monitor, out)
        trainer.strategy.barrier(self.name)
        self.path = out
        rank_zero_info(
            f"lightning_aux: {self.name} = coefficient {self.coefficient:g}, {self.monitor} "
            f"{self.curve[self.coefficient]:.4g}, in {out}"
        )


def _between(
    anchor: dict[str, Tensor], tuned: dict[str, Tensor], coefficient: float
) -> dict[str, Tensor]:
    return {
        name: _mixed(anchor[name], value, coefficient)
        if name in anchor and value.is_floating_point() and anchor[name].shape == value.shape
        else value
        for name, value in tuned.items()
    }


def _mixed(anchor: Tensor, tuned: Tensor, coefficient: float) -> Tensor:
    mixed = (1 - coefficient) * anchor.to(tuned.device).double() + coefficient * tuned.double()
    return mixed.to(tuned.dtype)
