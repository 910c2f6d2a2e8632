"""The report of one run, made of what its logger left in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from lightning_aux.report.charts import charts_of_run, last_values
from lightning_aux.report.logs import Log, read_log
from lightning_aux.report.page import Page, details, table

CONFIGS = ("config.yaml", "hparams.yaml")


def run_page(folder: Path) -> str:
    """The page of the run in a folder, finished or not."""
    log = read_log(folder)
    page = Page(f"{folder.parent.name}/{folder.name}" if folder.parent.name else folder.name)
    groups = charts_of_run(log)
    if log.series:
        page.text([_extent(log)])
    problems = list(log.problems)
    if log.series and not any(name.startswith("val") for name in log.series):
        problems.append("Nothing was logged in validation (no name that begins with val).")
    if log.series and not any(name.startswith("aux/") for name in log.series):
        problems.append("Nothing of lightning_aux was logged: no callback of it was attached.")
    configs = {name: folder / name for name in CONFIGS if (folder / name).is_file()}
    if not configs:
        problems.append(f"There is no configuration beside the log ({' or '.join(CONFIGS)}).")
    page.problems(problems)
    values = last_values(log)
    ours = {name: value for name, value in values.items() if name.startswith("aux/")}
    theirs = {name: value for name, value in values.items() if name not in ours}
    page.section("Last values", _table(theirs))
    page.groups(groups)
    page.section("Last values of callbacks", _table(ours))
    page.section(
        "Settings",
        "".join(
            details(name, path.read_text(encoding="utf-8", errors="replace").strip())
            for name, path in configs.items()
        ),
    )
    return page.html()


def _extent(log: Log) -> str:
    """How far the log goes; what a test logs afterwards is no step more."""
    trained = {name: each for name, each in log.series.items() if not name.startswith("test")}
    steps = max((int(each.steps.max()) + 1 for each in trained.values()), default=0)
    return f"Logged up to step {steps}." if steps else "Logged by a test only."


def _table(values: Mapping[str, float]) -> str:
    rows = [[escape(name), f"{value:.5g}".replace("-", "−")] for name, value in values.items()]
    return table(["name", "value"], rows) if rows else ""
