"""``SelectiveClassification``: what label smoothing costs a classifier that may abstain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_aux.diagnostics.risk_coverage import RiskCoverage
from lightning_aux.engine import Attached, AuxiliaryError, Locations, Pass
from lightning_aux.engine.evaluation import Evaluation
from lightning_aux.taps import Taps

__all__ = ["SelectiveClassification"]


class SelectiveClassification(Attached):
    """Logs, for each validation and test run, how well confidence tells right from wrong.

    Label smoothing often keeps or improves accuracy and spoils the order of the confidences: it
    presses the largest logit down most where the prediction is likely to be right. The normalised
    maximum logit, computed from the same logits afterwards, gives much of that order back.

    Logged are the results of `RiskCoverage` over all examples of the run, as
    ``aux/<name>/val_aurc``, ``aux/<name>/val_aurc_normalized``, ``aux/<name>/val_error`` and so
    on, ``test_…`` in ``Trainer.test``; with several dataloaders ``…/dataloader_idx_0`` and so on
    follows. `ModelCheckpoint` and `EarlyStopping` can monitor them. The sanity check logs nothing,
    but raises what is wrong.

    Logits are what the model returns in ``validation_step`` and ``test_step``; they and the target
    are found as everywhere, or said with `Taps`. Beside `EMAWeights` it is the average that is
    measured, as in the rest of the evaluation.

    Args:
        p: of the norm of the normalised maximum logit, above 0.
        centre: whether logits are centred first; for three classes or more.
        coverages: shares of the examples, at which the risk is logged.
        risks: error rates, for each of which the largest coverage that keeps to it is logged.
        ece: whether to log the expected calibration error.
        bins: equal bins of the calibration error.
        dim: class dimension of the logits.
        taps: where logits, target and mask are, before any `Taps` of the Trainer.
        name: unique name for logs.

    Raises:
        AuxiliaryError: for arguments that `RiskCoverage` refuses; before training, a path that
            names no module; in the first validation or test step (the sanity check), no logits
            or target, or shapes that do not fit.
    """

    def __init__(
        self,
        p: float = 4.0,
        centre: bool = False,
        coverages: Sequence[float] = (0.8,),
        risks: Sequence[float] = (0.05,),
        ece: bool = False,
        bins: int = 15,
        dim: int = -1,
        taps: Taps | None = None,
        name: str = "selective_classification",
    ) -> None:
        super().__init__(name)
        self.locations = Locations() if taps is None else taps.locations
        self._options: dict[str, Any] = {
            "p": p,
            "centre": centre,
            "coverages": coverages,
            "risks": risks,
            "ece": ece,
            "bins": bins,
            "dim": dim,
        }
        try:
            RiskCoverage(**self._options)
        except ValueError as error:
            raise AuxiliaryError(f"{name}: {error}") from error
        self._evaluation: Evaluation | None = None
        self._metrics: dict[int, RiskCoverage] = {}
        self._loader = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_evaluation": None, "_metrics": {}}

    def _see(self, step: Pass) -> None:
        metric = self._metric(self._loader, step.logits.device)
        try:
            metric.update(step.logits, step.target, step.mask)
        except ValueError as error:
            raise AuxiliaryError(f"{self.name}: {error}") from error

    def _metric(self, loader: int, device: Any) -> RiskCoverage:
        if loader not in self._metrics:
            self._metrics[loader] = RiskCoverage(**self._options).to(device)
        return self._metrics[loader]

    def _log(self, trainer: Any, module: Any, stage: str, loaders: int) -> None:
        if trainer.sanity_checking:  # of which Lightning logs nothing
            return
        values = {}
        for loader in range(loaders):
            metric = self._metric(loader, trainer.strategy.root_device)
            suffix = f"/dataloader_idx_{loader}" if loaders > 1 else ""
            for key, value in metric.compute().items():
                values[f"aux/{self.name}/{stage}_{key}{suffix}"] = value
        # Equal on every process already; Lightning warns where it is not told to synchronise.
        module.log_dict(
            values,
            on_step=False,
            on_epoch=True,
            batch_size=1,
            sync_dist=True,
            add_dataloader_idx=False,  # it is in the keys
        )

    # ------------------------------------------------------------------------------- evaluation
    # Acts in every evaluation, also outside of `fit`, and so has hooks of its own.
    def _begin(self, trainer: Any, module: Any) -> None:
        if self._evaluation is None:
            own = [each for each in trainer.callbacks if isinstance(each, Taps)]
            locations = self.locations.over(own[0].locations) if own else self.locations
            self._evaluation = Evaluation(trainer, module, locations, self.name, self._see)

    def end(self) -> None:
        if self._evaluation is not None:
            self._evaluation.stop()
        self._evaluation = None
        self._metrics = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        self._begin(trainer, pl_module)  # before anything is compiled

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(trainer, pl_module)
        self._metrics = {}

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self.on_validation_start(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._loader = dataloader_idx

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._loader = dataloader_idx

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._log(trainer, pl_module, "val", len(trainer.num_val_batches))

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._log(trainer, pl_module, "test", len(trainer.num_test_batches))
