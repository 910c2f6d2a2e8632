"""`lightning-aux teach`: a teacher's logits for the training data, written to disk once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_aux.cli.made import made_from
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
    made = made_from(given.config, "teach")
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
