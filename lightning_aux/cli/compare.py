"""`lightning-aux compare`: train every variant with every seed, then say what the runs show."""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from lightning_aux.cli.compare_file import read_comparison
from lightning_aux.cli.progress import RunProgress
from lightning_aux.cli.table import result_table
from lightning_aux.cli.trainer_cli import WandbMode
from lightning_aux.cli.training_run import run
from lightning_aux.comparison import (
    ERROR_FILE,
    Comparison,
    ComparisonError,
    RunResult,
    finished_result,
    run_directory,
    summarise,
    write_comparison,
    write_tables,
)
from lightning_aux.report.comparison_page import write_report
from lightning_aux.report.figures import LIGHT, draw_curves, draw_differences, png

INTERRUPTED = 130  # what a shell reports for a command that SIGINT ended


def compare(args: Sequence[str]) -> int:
    """Run the subcommand.

    Args:
        args: The arguments after `compare`.

    Returns:
        Exit status: 0 when every run finished, 1 when one failed, 130 after Ctrl-C.

    Raises:
        SystemExit: With status 2 when arguments, the compare file or a config are wrong.
    """
    parser = _parser()
    options = parser.parse_args(args)
    console = _console()
    try:
        comparison = read_comparison(
            options.config, options.seeds, options.epochs, dict(options.set)
        )
        if not console.is_terminal:
            console.width += 20 * len(comparison.also)
        directory = (
            options.output
            or Path("runs") / options.config.resolve().parent.name / options.config.stem
        )
        if options.fresh:
            shutil.rmtree(directory / "runs", ignore_errors=True)
        if options.wandb != "off":
            os.environ.setdefault("WANDB_SILENT", "true")
        write_comparison(directory, comparison)
        results = _train(comparison, directory, options.wandb, console)
        _conclude(comparison, directory, results, console)
    except ComparisonError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        console.print("\nStopped. The same command goes on after the runs that are finished.")
        return INTERRUPTED
    return 1 if any(result.error for result in results) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-aux compare",
        description="Train a baseline and its variants over several seeds, paired by seed, and "
        "report the differences. Runs that are finished are kept: after Ctrl-C the same command "
        "goes on.",
    )
    parser.add_argument("-c", "--config", type=Path, required=True, help="the compare file (YAML)")
    parser.add_argument(
        "--output", type=Path, help="folder of all output (runs/<folder>/<name of the file>)"
    )
    parser.add_argument("--seeds", type=_integers, help="instead of the file's, e.g. 0,1,2")
    parser.add_argument("--epochs", type=int, help="instead of the config's trainer.max_epochs")
    parser.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a value for all variants by its dotted key, over the file's; may be repeated",
    )
    parser.add_argument(
        "--wandb",
        choices=("online", "offline", "off"),
        default="off",
        help="log every run to Weights & Biases too (%(default)s)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="run everything again, e.g. when code has changed"
    )
    return parser


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers such as 0,1,2, got {text!r}") from None


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(
            f"expected KEY=VALUE such as model.init_args.lr=0.1, got {text!r}"
        )
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: the value is not YAML: {error}") from None


def _console() -> Console:
    """The terminal; a file or a pipe has no width of its own and gets one that fits the table."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=110)


def _train(
    comparison: Comparison, directory: Path, wandb: WandbMode, console: Console
) -> list[RunResult]:
    """All results, kept ones included. Seeds outside, so that variants share slow periods."""
    order = [(name, seed) for seed in comparison.seeds for name in comparison.variants]
    results: dict[tuple[str, int], RunResult] = {}
    for name, seed in order:
        fingerprint = comparison.variants[name].fingerprint(seed)
        kept = finished_result(run_directory(directory, name, seed), fingerprint)
        if kept is not None:
            results[name, seed] = kept
    pending = [pair for pair in order if pair not in results]
    if results:
        console.print(
            f"{len(results)} of {len(order)} runs were finished before and are kept; "
            "--fresh runs them again."
        )
    with RunProgress(console, pending, kept=len(results)) as progress:
        for name, seed in pending:
            progress.start()
            where = run_directory(directory, name, seed)
            result = run(comparison.variants[name], seed, where, wandb, progress.update)
            progress.finish(result, comparison.decides.metric)
            results[name, seed] = result
            _check_metrics(comparison, result)
    return [results[pair] for pair in order]


def _check_metrics(comparison: Comparison, result: RunResult) -> None:
    """Do not train for hours towards a metric that nobody logs."""
    measures = comparison.measures if result.error is None else ()
    for missing in (each.metric for each in measures if each.metric not in result.metrics):
        near = difflib.get_close_matches(missing, result.metrics, n=1)
        guess = f" Did you mean '{near[0]}'?" if near else ""
        logged = ", ".join(sorted(result.metrics)) or "nothing"
        raise ComparisonError(
            f"metric: the run of '{result.variant}' logged no '{missing}'.{guess} "
            f"It logged: {logged}."
        )


def _conclude(
    comparison: Comparison, directory: Path, results: list[RunResult], console: Console
) -> None:
    summaries = summarise(comparison, results)
    write_tables(directory, comparison, results, summaries)
    for name, figure in (
        ("curves.png", draw_curves(comparison, results, LIGHT)),
        ("differences.png", draw_differences(comparison, summaries, LIGHT)),
    ):
        if figure is not None:
            (directory / name).write_bytes(png(figure))
    write_report(
        directory / "report.html",
        comparison,
        results,
        summaries,
        curves=partial(draw_curves, comparison, results),
        differences=partial(draw_differences, comparison, summaries),
    )
    console.print()
    console.print(result_table(comparison, summaries))
    for row in summaries:
        for seed, error in row.errors.items():
            console.print(Text(f"{row.name}, seed {seed} failed: {error}", style="red"))
            console.print(f"  {run_directory(directory, row.name, seed) / ERROR_FILE}")
    console.print(f"report: {directory / 'report.html'}")
