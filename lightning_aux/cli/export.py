"""`lightning-aux export`: a plain checkpoint of averaged weights."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_aux import AuxiliaryError
from lightning_aux.weights import export as write_average
from lightning_aux.weights import recompute_batch_norm
from lightning_aux.weights.files import read_checkpoint, weights_in, write_checkpoint


def export(args: Sequence[str]) -> int:
    """Run the subcommand.

    Args:
        args: Arguments without the subcommand's name.

    Returns:
        Exit status 0.

    Raises:
        SystemExit: With status 2 when the arguments are wrong.
        AuxiliaryError: When the checkpoint cannot be read or has no average of that name.
    """
    given = _parser().parse_args(args)
    write_average(given.checkpoint, given.out, given.teacher)
    print(f"wrote {given.out}")
    if given.config is not None:
        layers = _recompute(given.config, given.out, given.batches)
        print(f"measured the statistics of {layers} BatchNorm layer{'s' * (layers != 1)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-aux export",
        description="Write the average in a checkpoint as a plain checkpoint, which loads with "
        "strict=True wherever the model is known.",
    )
    parser.add_argument("checkpoint", type=Path, help="of a run with EMAWeights or a teacher")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument(
        "--teacher", help="whose weights; not needed where only one teacher has any"
    )
    parser.add_argument(
        "--recompute-batch-norm",
        dest="config",
        metavar="CONFIG",
        type=Path,
        help="measure BatchNorm's running statistics again, over the training data of this config",
    )
    parser.add_argument(
        "--batches", type=int, help="how many batches to measure them on; all by default"
    )
    return parser


def _recompute(config: Path, path: Path, batches: int | None) -> int:
    """Measure with the model and the data of ``config``, and write the file once more."""
    import yaml

    from lightning_aux.cli.trainer_cli import AuxCLI
    from lightning_aux.cli.yaml_keys import with_names_as_keys

    if not config.is_file():
        raise AuxiliaryError(f"export: {str(config)!r} is not a file (looked in {Path.cwd()}).")
    content = with_names_as_keys(yaml.safe_load(config.read_text()))
    for key in ("ckpt_path", "weights_only"):  # of a training, in the config that it has saved
        content.pop(key, None)
    made = AuxCLI(args=content, run=False)
    module, trainer = made.model, made.trainer
    read = read_checkpoint(path, "export")
    module.load_state_dict(weights_in(read, str(path)), strict=True)
    source = made.datamodule if made.datamodule is not None else module
    source.trainer = trainer
    source.prepare_data()
    source.setup("fit")
    data = source.train_dataloader()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module.to(device)

    def run(batch: Any) -> Any:
        batch = module.transfer_batch_to_device(batch, device, 0)
        return module(batch[0] if isinstance(batch, list | tuple) else batch)

    total = batches if batches is not None else _length(data)
    layers = recompute_batch_norm(module, itertools.islice(data, total), run, total=total)
    if layers:
        write_checkpoint(read, {k: v.cpu() for k, v in module.state_dict().items()}, path)
    return layers


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None
