"""Logs how good the supervisor is whose labels a model learns from."""

from lightning.pytorch import Callback, LightningModule, Trainer


class SupervisorAccuracy(Callback):
    """Logs `test_supervisor`, the test accuracy of the supervisor that labelled `DigitsData`.

    The true labels, where there is no supervisor, are right: 1.
    """

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        accuracy = trainer.datamodule.supervisor_accuracy
        pl_module.log("test_supervisor", 1.0 if accuracy is None else accuracy)
