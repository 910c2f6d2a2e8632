"""`lightning-aux export`: a plain checkpoint of averaged, or of quantised, weights."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_aux import AuxiliaryError, Taps
from lightning_aux.weights import export as write_average
from lightning_aux.weights import quantized as write_quantized
from lightning_aux.weights import recompute_batch_norm
from lightning_aux.weights.batch_norm import as_in_training, measured_norms
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
    if given.quantized:
        write_quantized(given.checkpoint, given.out)
    else:
        write_average(given.checkpoint, given.out, given.teacher)
    print(f"wrote {given.out}")
    if given.config is not None:
        layers = _recompute(given.config, given.out, given.batches)
        print(f"measured the statistics of {layers} BatchNorm layer{'s' * (layers != 1)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-aux export",
        description="Write the average in a checkpoint, or its quantised weights, as a plain "
        "checkpoint, which loads with strict=True wherever the model is known.",
    )
    parser.add_argument("checkpoint", type=Path, help="of a run with EMAWeights or a teacher")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--teacher", help="whose weights; not needed where only one teacher has any")
    which.add_argument(
        "--quantized", action="store_true", help="no average, but what QuantizedWeights evaluates"
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
    module: Any = made.model
    trainer: Any = made.trainer
    read = read_checkpoint(path, "export")
    module.load_state_dict(weights_in(read, str(path)), strict=True)
    # As far as a fit would have it, so that the user's hooks find what they expect.
    trainer.strategy.connect(module)
    trainer._data_connector.attach_data(module, datamodule=made.datamodule)
    trainer.training = True
    source = made.datamodule if made.datamodule is not None else module
    source.prepare_data()
    source.setup("fit")
    data = source.train_dataloader()
    trainer.precision_plugin.convert_module(module.to(trainer.strategy.root_device))
    norms = measured_norms(module)
    trained = [each for each in norms.values() if each.training]
    forward = next((e.locations.forward for e in trainer.callbacks if isinstance(e, Taps)), None)
    run = as_in_training(trainer, module, forward)
    total = batches if batches is not None else _length(data)
    try:
        layers = recompute_batch_norm(
            module, itertools.islice(data, total), run, total=total, norms=trained
        )
    except Exception as error:
        raise AuxiliaryError(
            f"export: {str(path)!r} is written, but with the statistics of BatchNorm that the "
            f"average has: running {type(module).__name__} on the training data of {str(config)!r} "
            f"ended with {type(error).__name__}: {error}. Say how it runs with "
            f"Taps(forward=...) among the callbacks there."
        ) from error
    if layers:
        write_checkpoint(read, {k: v.cpu() for k, v in module.state_dict().items()}, path)
    frozen = [name for name, each in norms.items() if not each.training]
    if frozen:
        print(f"left as they are, in evaluation mode from the start: {', '.join(frozen)}")
    return layers


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None
