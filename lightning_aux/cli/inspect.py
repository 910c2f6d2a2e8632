"""`lightning-aux inspect`: what can be attached to a configured model, and what callbacks do."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_aux import inspect as look_at
from lightning_aux.cli.made import made_from
from lightning_aux.cli.terminal import terminal
from lightning_aux.inspection import Inspection
from lightning_aux.inspection.sections import Section, headline, sections

# What of a Trainer decides what a step is, and how long training lasts.
_KEPT = (
    *("accelerator", "precision", "max_epochs", "max_steps", "accumulate_grad_batches"),
    *("gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches", "deterministic"),
    *("benchmark", "detect_anomaly", "log_every_n_steps"),
)


def inspect(args: Sequence[str]) -> int:
    """Run the subcommand.

    Args:
        args: Arguments without the subcommand's name.

    Returns:
        Exit status: 0, or 1 when training would fail.

    Raises:
        SystemExit: With status 2 when the arguments or the config are wrong.
        AuxiliaryError: When there is no such file, no data, or a model that cannot be copied.
    """
    given = _parser().parse_args(args)
    found = inspected(given.config, given.steps)
    show(found, terminal(120))
    if given.html is not None:
        given.html.write_text(found.html(), encoding="utf-8")
        print(f"wrote {given.html}")
    return int(found.fails)


def inspected(config: Path, steps: int | None) -> Inspection:
    """What a config of `fit` describes, with one batch of its training data.

    Args:
        config: The file.
        steps: Steps that are timed in each round; None for about 0.3 seconds of them.
    """
    made = made_from(config, "inspect")
    chosen = made.config_init["trainer"]
    arguments = {key: chosen[key] for key in _KEPT if chosen.get(key) is not None}
    data = made.datamodule
    if data is None:
        made.model.prepare_data()
        data = made.model.train_dataloader()
    # Lightning has put its own beside those of the config.
    named = {each.class_path.rpartition(".")[2] for each in _listed(made.config["trainer"])}
    callbacks = [each for each in _listed(chosen) if type(each).__name__ in named]
    return look_at(made.model, data, callbacks, steps=steps, **arguments)


def _listed(trainer: Any) -> list[Any]:
    callbacks = trainer.get("callbacks") or []
    return callbacks if isinstance(callbacks, list) else [callbacks]


def show(found: Inspection, console: Console) -> None:
    """Print the findings as tables."""
    for line in headline(found):
        bad = " would fail: " in line or line.startswith(("Fails:", "Each callback works, but"))
        console.print(Text(line, style="red" if bad else ""))
    for each in sections(found):
        console.print()
        console.print(_table(each))


def _table(section: Section) -> Table:
    table = Table(
        title=section.title,
        title_justify="left",
        title_style="bold",
        caption=section.note,
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    for place, head in enumerate(section.heads):
        narrow = 0 if place or section.tree else 12
        table.add_column(
            head, no_wrap=section.tree and not place, overflow="fold", min_width=narrow or None
        )
    for place, row in enumerate(section.rows):
        style: Any = "red" if place in section.failed else None
        table.add_row(*map(Text, row), style=style)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-aux inspect",
        description="Run one batch through copies of the configured model, on one device: show its "
        "modules, the layout of the batch, what the defaults bind to, and what every callback "
        "binds to, costs, or fails with. Nothing is written or trained.",
    )
    parser.add_argument("--config", type=Path, required=True, help="of fit: model, data, Trainer")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the tables as a page too")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="steps that are timed, three times over; 0 for none"
    )
    return parser
