"""`lightning-aux compare`: train every variant with every seed, then say what the runs show."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.text import Text

from lightning_aux.cli.compare_file import read_comparison
from lightning_aux.cli.folder_lock import only_one_in
from lightning_aux.cli.processes import train_in_processes
from lightning_aux.cli.progress import RunProgress
from lightning_aux.cli.table import result_table
from lightning_aux.cli.terminal import terminal
from lightning_aux.cli.training_run import TrainingRun
from lightning_aux.comparison import (
    ERROR_FILE,
    JOB_FILE,
    Comparison,
    ComparisonError,
    RunResult,
    VariantSummary,
    finished_result,
    run_directory,
    summarise,
    write_comparison,
    write_tables,
)
from lightning_aux.report.comparison_page import comparison_page
from lightning_aux.report.figures import LIGHT, draw_curves, draw_differences, png
from lightning_aux.report.page import REPORT_FILE
from lightning_aux.report.wording import remarks

if TYPE_CHECKING:
    from lightning_aux.cli.cluster import Cluster

REPORT_ERROR_FILE = "report_error.txt"
_JOBS = "jobs"  # folder of what jobs print
INTERRUPTED = 130  # what a shell reports for a command that SIGINT ended


def compare(args: Sequence[str]) -> int:
    """Run the subcommand.

    Args:
        args: The arguments after `compare`.

    Returns:
        Exit status: 0 when every run finished with finite values of all metrics that are compared,
            1 when one did not or the report cannot be made, 130 after Ctrl-C.

    Raises:
        SystemExit: With status 2 when arguments, the compare file or a config are wrong.
    """
    parser = _parser()
    options = parser.parse_args(args)
    if options.cluster_set and options.cluster is None:
        parser.error("--cluster-set says how jobs are submitted: name a cluster with --cluster.")
    console = terminal(120)
    try:
        given = options.epochs, dict(options.set)
        comparison = read_comparison(options.config, options.seeds, *given, options.only)
        if not console.is_terminal:
            console.width += 20 * len(comparison.also)
        directory = (
            options.output
            or Path("runs") / options.config.resolve().parent.name / options.config.stem
        )
        cluster = _cluster(options, directory)
        if options.wandb != "off":
            os.environ.setdefault("WANDB_SILENT", "true")
        with only_one_in(directory):
            runs = _runs(comparison, directory, options)
            if options.only or options.seeds:
                comparison = _with_finished(comparison, given, directory, options, console)
            results = _train(runs, comparison, directory, options, cluster, console)
            good = _conclude(comparison, directory, results, console)
    except ComparisonError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        same = f"The same command{' without --fresh' if options.fresh else ''}"
        console.print(f"\nStopped. {same} goes on after the runs that are finished.")
        return INTERRUPTED
    return 0 if good else 1


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
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="train this variant and the one that is compared with, a pattern such as 'kd-*' for "
        "several; may be repeated. The table has others of the file too that were finished before",
    )
    parser.add_argument("--seeds", type=_integers, help="train these, not the file's, e.g. 0,1,2")
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
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--jobs",
        type=_at_least_one,
        default=1,
        metavar="N",
        help="how many runs are trained at once on this machine (%(default)s); times per step are "
        "rougher then",
    )
    where.add_argument(
        "--cluster",
        choices=("slurm", "local", "debug"),
        help="train every run as a job, through submitit: of Slurm, or to try it out as processes "
        "of this machine, or in this process",
    )
    parser.add_argument(
        "--cluster-set",
        type=_setting,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of submitit's AutoExecutor, e.g. timeout_min=60, slurm_partition=gpu, "
        "gpus_per_node=1, cpus_per_task=4; may be repeated",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="run everything again, e.g. when code has changed"
    )
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 up, got {text!r}")
    return int(text)


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


def _cluster(options: argparse.Namespace, directory: Path) -> Cluster | None:
    if options.cluster is None:
        return None
    from lightning_aux.cli.cluster import Cluster  # needs a package that nothing else needs

    return Cluster(options.cluster, dict(options.cluster_set), directory / _JOBS)


def _refuse_jobs_elsewhere(
    pending: Sequence[TrainingRun], directory: Path, cluster: str | None
) -> None:
    recorded = [run for run in pending if (run.directory / JOB_FILE).exists()]
    if not recorded:
        return
    try:
        from lightning_aux.cli.cluster import refuse_jobs_elsewhere
    except ImportError as error:
        record = recorded[0].directory / JOB_FILE
        raise ComparisonError(
            f"{record}: an earlier command submitted this run as a job. To ask whether it goes on "
            "needs submitit: pip install 'lightning-aux[cluster]'; or delete the file if the job "
            "is known to have ended."
        ) from error
    refuse_jobs_elsewhere(recorded, directory / _JOBS, cluster)


def _runs(
    comparison: Comparison, directory: Path, options: argparse.Namespace
) -> list[TrainingRun]:
    """Every variant with every seed. Seeds outside, so that variants share slow periods."""
    return [
        TrainingRun(variant, seed, run_directory(directory, name, seed), options.wandb)
        for seed in comparison.seeds
        for name, variant in comparison.variants.items()
    ]


def _with_finished(
    selected: Comparison,
    given: tuple[int | None, dict[str, Any]],
    directory: Path,
    options: argparse.Namespace,
    console: Console,
) -> Comparison:
    """The comparison with the variants and seeds of its file that were finished before, too."""
    try:
        whole = read_comparison(options.config, None, *given)
    except ComparisonError as error:
        console.print(Text(f"The table has nothing but what is selected: {error}"))
        return selected
    finished = [
        run
        for run in _runs(whole, directory, options)
        if finished_result(run.directory, run.fingerprint)
    ]
    names = {*selected.variants, *(run.variant.name for run in finished)}
    return replace(
        selected,
        seeds=tuple(sorted({*selected.seeds, *(run.seed for run in finished)})),
        variants={name: each for name, each in whole.variants.items() if name in names},
    )


def _train(
    runs: list[TrainingRun],
    comparison: Comparison,
    directory: Path,
    options: argparse.Namespace,
    cluster: Cluster | None,
    console: Console,
) -> list[RunResult]:
    """All results: of `runs`, which are trained or kept, and what else the comparison has."""
    results: dict[tuple[str, int], RunResult] = {}
    for run in [] if options.fresh else runs:
        kept = finished_result(run.directory, run.fingerprint)
        if kept is not None:
            _check_metrics(comparison, kept)
            results[run.variant.name, run.seed] = kept
    pending = [run for run in runs if (run.variant.name, run.seed) not in results]
    _refuse_jobs_elsewhere(pending, directory, options.cluster)
    write_comparison(directory, comparison)
    if options.fresh:
        for run in runs:
            run.clear()
    if results:
        console.print(
            f"{len(results)} of {len(runs)} runs were finished before and are kept; "
            "--fresh runs them again."
        )
    at_once = min(options.jobs, len(pending)) or 1
    alone = at_once == 1 if cluster is None else cluster.name == "debug"
    pending = [replace(run, alone=alone) for run in pending]
    progress = RunProgress(console, pending, len(results), None if cluster else at_once)
    if cluster is None:
        ending = train_in_processes(pending, at_once, progress)
    else:
        ending = cluster.train(pending, adopt=not options.fresh, progress=progress)
    with progress, contextlib.closing(ending):
        for result in ending:
            progress.finish(result, comparison.decides.metric)
            results[result.variant, result.seed] = result
            _check_metrics(comparison, result)
    there = (
        results.get((run.variant.name, run.seed)) or run.result()
        for run in _runs(comparison, directory, options)
    )
    return [result for result in there if result is not None]


def _check_metrics(comparison: Comparison, result: RunResult) -> None:
    """Do not train for hours towards a metric that nobody logs."""
    measures = comparison.measures if result.error is None else ()
    for missing in (each.metric for each in measures if each.metric not in result.metrics):
        near = difflib.get_close_matches(missing, result.metrics, n=1)
        guess = f" Did you mean '{near[0]}'?" if near else ""
        logged = ", ".join(sorted(result.metrics)) or "nothing"
        raise ComparisonError(
            f"metric: the run of '{result.variant}' logged no '{missing}'.{guess} "
            f"It logged: {logged}. Once the model logs it, --fresh trains this run again."
        )


def _conclude(
    comparison: Comparison, directory: Path, results: list[RunResult], console: Console
) -> bool:
    """Say and write what the runs show, what may fail last; whether all of it is there and good."""
    summaries = summarise(comparison, results)
    write_tables(directory, comparison, results, summaries)
    console.print()
    console.print(result_table(comparison, summaries))
    for remark in remarks(results):
        console.print(remark)
    failed = {
        (row.name, seed): error
        for row in summaries
        for measured in (*row.also, row)
        for seed, error in measured.errors.items()
    }
    for (name, seed), error in failed.items():
        console.print(Text(f"{name}, seed {seed} failed: {error}", style="red"))
        details = run_directory(directory, name, seed) / ERROR_FILE
        if details.exists():
            console.print(f"  {details}")
    try:
        _draw(comparison, directory, results, summaries)
    except Exception as error:
        details = directory / REPORT_ERROR_FILE
        details.write_text(traceback.format_exc())
        said = f"the report failed: {type(error).__name__}: {' '.join(str(error).split())}"
        again = f"`lightning-aux report {directory}` makes it without training. {details}"
        console.print(Text(f"{said}; {again}", style="red"))
        return False
    (directory / REPORT_ERROR_FILE).unlink(missing_ok=True)
    console.print(f"report: {directory / REPORT_FILE}")
    return not failed


def _draw(
    comparison: Comparison,
    directory: Path,
    results: list[RunResult],
    summaries: list[VariantSummary],
) -> None:
    for name, figure in (
        ("curves.png", draw_curves(comparison, results, LIGHT)),
        ("differences.png", draw_differences(comparison, summaries, LIGHT)),
    ):
        if figure is not None:
            (directory / name).write_bytes(png(figure))
    (directory / REPORT_FILE).write_text(comparison_page(directory), encoding="utf-8")
