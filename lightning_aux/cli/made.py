"""What a config of `fit` describes, made for another command: nothing is logged or saved."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import SaveConfigCallback

from lightning_aux import AuxiliaryError
from lightning_aux.cli.trainer_cli import AuxCLI
from lightning_aux.cli.yaml_keys import with_names_as_keys


def made_from(config: Path, asked_by: str) -> Any:
    """The Trainer, the model and the data of a config; the one that `fit` has saved will do.

    Args:
        config: The file.
        asked_by: The command, for the message.

    Returns:
        The LightningCLI that holds them.

    Raises:
        SystemExit: With status 2 when the config is wrong.
        AuxiliaryError: When there is no such file.
    """
    if not config.is_file():
        raise AuxiliaryError(f"{asked_by}: {str(config)!r} is not a file (looked in {Path.cwd()}).")
    content = with_names_as_keys(yaml.safe_load(config.read_text()))
    for key in ("ckpt_path", "weights_only"):  # of a training, in the config that it has saved
        content.pop(key, None)
    content["trainer"] = {**(content.get("trainer") or {}), "logger": False}
    with _no_news():
        made = AuxCLI(args=content, run=False)
    trainer: Any = made.trainer
    kept = [each for each in trainer.callbacks if not isinstance(each, SaveConfigCallback)]
    trainer.callbacks = kept
    return made


@contextlib.contextmanager
def _no_news() -> Iterator[None]:
    """Without what Lightning says of devices and seeds when a Trainer is made; warnings stay."""
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
