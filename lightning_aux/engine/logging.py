"""What goes to the user's loggers, and when. No logger is named here: all get the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_aux.engine.attached import Attached

__all__ = ["log_hyperparameters", "log_of_member", "log_step", "logs_now"]


def logs_now(trainer: Any) -> bool:
    """Whether Lightning hands metrics to the loggers on this step.

    Logging one metric costs about a millisecond, more than most terms; on the other steps nothing
    of ours is logged.
    """
    if trainer.barebones:
        return False
    connector = getattr(trainer, "_logger_connector", None)
    due = getattr(connector, "should_update_logs", None)
    if due is None:
        return bool((trainer.global_step + 1) % trainer.log_every_n_steps == 0)
    return bool(due)


def log_step(module: Any, values: dict[str, Any], members: Mapping[str, Attached]) -> None:
    """Log this step's terms and what the members report about themselves."""
    for name, member in members.items():
        values |= {f"aux/{name}/{key}": value for key, value in member.logged().items()}
    module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)


def log_of_member(module: Any, name: str, values: Mapping[str, Any]) -> None:
    """Log what a member knows of this step only after `log_step`, once the optimizer has stepped.

    To be called where `logs_now`.
    """
    keyed = {f"aux/{name}/{key}": value for key, value in values.items()}
    module.log_dict(keyed, on_step=True, on_epoch=False, batch_size=1)


def log_hyperparameters(trainer: Any, module: Any, members: Mapping[str, Attached]) -> None:
    """Write every init argument of every callback into the loggers' configuration, under ``aux``.

    What a callback brings along has its arguments from those of the callback, and is not repeated.
    Lightning has logged the module's and the datamodule's hyperparameters before; they are passed
    again with ours, because some loggers replace what a second call does not repeat. Where one of
    them is called ``aux``, ours are under ``lightning_aux``.
    """
    theirs: dict[str, Any] = {}
    for holder in (trainer.datamodule, module):
        if holder is not None and getattr(holder, "_log_hyperparams", False):
            theirs |= dict(holder.hparams_initial)
    theirs.pop("_class_path", None)  # what LightningCLI notes for itself; nor does Lightning log it
    brought = {each.name for member in members.values() for each in member.companions()}
    own = {
        name: {"class": type(member).__name__, **member.hyperparameters}
        for name, member in members.items()
        if name not in brought
    }
    key = "lightning_aux" if "aux" in theirs else "aux"
    for logger in trainer.loggers:
        logger.log_hyperparams({**theirs, key: own})
