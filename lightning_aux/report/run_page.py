"""The report of one run, made of what its logger left in its folder."""

from __future__ import annotations

from html import escape
from pathlib import Path

from lightning_aux.report.charts import charts_of_run, last_values
from lightning_aux.report.logs import read_log
from lightning_aux.report.page import Page, details, table

CONFIGS = ("config.yaml", "hparams.yaml")


def run_page(folder: Path) -> str:
    """The page of the run in a folder, finished or not."""
    log = read_log(folder)
    page = Page(f"{folder.parent.name}/{folder.name}" if folder.parent.name else folder.name)
    groups = charts_of_run(log)
    if log.series:
        steps = int(max(each.steps.max() for each in log.series.values())) + 1
        page.text([f"Logged up to step {steps}."])
    problems = list(log.problems)
    if log.series and not any(name.startswith("val") for name in log.series):
        problems.append("Nothing was logged in validation (no name that begins with val).")
    if log.series and not any(name.startswith("aux/") for name in log.series):
        problems.append("Nothing of lightning_aux was logged: no callback of it was attached.")
    configs = {name: folder / name for name in CONFIGS if (folder / name).is_file()}
    if not configs:
        problems.append(f"There is no configuration beside the log ({' or '.join(CONFIGS)}).")
    page.problems(problems)
    rows = [
        [escape(name), f"{value:.5g}", str(int(log.series[name].steps[-1]) + 1)]
        for name, value in last_values(log).items()
    ]
    page.groups(groups)
    page.section("Last values", table(["name", "value", "step"], rows) if rows else "")
    page.section(
        "Settings",
        "".join(
            details(name, path.read_text(encoding="utf-8", errors="replace").strip())
            for name, path in configs.items()
        ),
    )
    return page.html()
