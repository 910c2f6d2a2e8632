"""`lightning-aux report`: a page about a run or a comparison, from what it left in its folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_aux import AuxiliaryError
from lightning_aux.comparison import COMPARISON_FILE, read_comparison_of
from lightning_aux.report.comparison_page import comparison_page
from lightning_aux.report.logs import METRICS_FILE
from lightning_aux.report.page import REPORT_FILE
from lightning_aux.report.run_page import CONFIGS, run_page


def report(args: Sequence[str]) -> int:
    """Run the subcommand.

    Args:
        args: Arguments without the subcommand's name.

    Returns:
        Exit status 0.

    Raises:
        SystemExit: With status 2 when the arguments are wrong.
        AuxiliaryError: When the folder holds neither a run nor a comparison.
    """
    given = _parser().parse_args(args)
    out = given.output or given.folder / REPORT_FILE
    out.write_text(page_of(given.folder), encoding="utf-8")
    print(f"wrote {out}")
    return 0


def page_of(folder: Path) -> str:
    """The page of what is in a folder.

    Raises:
        AuxiliaryError: When it is neither a run nor a comparison.
    """
    if not folder.is_dir():
        raise AuxiliaryError(f"report: {str(folder)!r} is not a folder (looked in {Path.cwd()}).")
    if (folder / COMPARISON_FILE).exists():
        try:
            read_comparison_of(folder)
        except (OSError, ValueError) as error:
            raise AuxiliaryError(
                f"report: {folder / COMPARISON_FILE} cannot be read: {error} Running the same "
                f"lightning-aux compare again writes it anew and keeps the finished runs."
            ) from error
        return comparison_page(folder)
    if any((folder / name).is_file() for name in (METRICS_FILE, *CONFIGS)):
        return run_page(folder)
    inside = sorted({path.parent for path in folder.rglob(METRICS_FILE)})
    hint = f" There are runs below it: {', '.join(map(str, inside[:3]))}." if inside else ""
    raise AuxiliaryError(
        f"report: {folder} is neither a comparison ({COMPARISON_FILE}) nor a run ({METRICS_FILE}, "
        f"which CSVLogger writes, or {' or '.join(CONFIGS)}).{hint}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-aux report",
        description="Write one HTML page about a run or a comparison: learning curves, terms and "
        "weights, gradients, teachers, schedules, differences, and what is missing. Made from the "
        "files in its folder, so it works while training goes on and long after.",
    )
    parser.add_argument(
        "folder", type=Path, help="of a run (has metrics.csv) or of a comparison (comparison.json)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"instead of {REPORT_FILE} in the folder"
    )
    return parser
