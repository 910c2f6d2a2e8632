"""`lightning-aux teach`: a teacher's logits for the training data, written to disk once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import SaveConfigCallback

from lightning_aux import AuxiliaryError
from lightning_aux.teachers import teach as write_logits
from lightning_aux.teachers.storage import STORAGES


def teach(args: Sequence[str]) -> int:
    """Run the subcommand.

    Args:
        args: Arguments without the subcommand's name.

    Returns:
        Exit status 0.

    Raises:
        SystemExit: With status 2 when the arguments or the config are wrong.
        AuxiliaryError: When the logits cannot be found or stored.
    """
    given = _parser().parse_args(args)
    made = _made(given.config)
    data = made.datamodule
    write_logits(
        made.trainer,
        made.model,
        data,
        given.out,
        ckpt_path=given.ckpt_path,
        storage=given.storage,
        k=given.k,
        dim=given.dim,
        batch_size=given.batch_size,
    )
    size = sum(each.stat().st_size for each in given.out.iterdir())
    print(f"wrote {given.out}, {size / 1e6:.3g} MB: StoredTeacher reads it")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-aux teach",
        description="Write the logits of the configured model for its training data, in evaluation "
        "mode and in the order of the dataset. StoredTeacher reads them in another training.",
    )
    parser.add_argument("--config", type=Path, required=True, help="of fit: model, data, Trainer")
    parser.add_argument("--ckpt_path", type=Path, help="weights of the model; a Lightning file")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--storage", choices=STORAGES, default="float16", help="default: float16")
    parser.add_argument("--k", type=int, help="how many classes of each example top-k keeps")
    parser.add_argument(
        "--dim", type=int, default=-1, help="class dimension of the logits, for top-k; last"
    )
    parser.add_argument("--batch-size", type=int, help="default: that of the training dataloader")
    return parser


def _made(config: Path) -> Any:
    """The Trainer, the model and the data of a config, which log and save nothing."""
    import yaml

    from lightning_aux.cli.trainer_cli import AuxCLI
    from lightning_aux.cli.yaml_keys import with_names_as_keys

    if not config.is_file():
        raise AuxiliaryError(f"teach: {str(config)!r} is not a file (looked in {Path.cwd()}).")
    content = with_names_as_keys(yaml.safe_load(config.read_text()))
    for key in ("ckpt_path", "weights_only"):  # of a training, in the config that it has saved
        content.pop(key, None)
    content["trainer"] = {**(content.get("trainer") or {}), "logger": False}
    made = AuxCLI(args=content, run=False)
    trainer: Any = made.trainer
    kept = [each for each in trainer.callbacks if not isinstance(each, SaveConfigCallback)]
    trainer.callbacks = kept
    return made
