"""The support matrix: which registry entry has been shown to work where, counted while tests run.

A test in ``tests/contract`` with a parameter ``entry`` says what it vouches for with the marker
``vouches(column)``, on itself, its module or one of its parameters; without one it vouches for
training in one process. ``pytest --support-matrix docs/support.md`` writes the table.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

COLUMNS = (
    "one process",
    "manual",
    "accumulation",
    "bf16-mixed",
    "bf16-true",
    "compile",
    "resume",
    "ddp",
    "ddp_spawn",
    "FSDP2",
    "FSDP2 uneven",
)
# Beside the registry: what is said of heads is shown with the smallest objective that has one.
OTHER_ROWS = {"head": "an objective with a head"}
CONTRACT = Path(__file__).with_name("contract")
PROPERTY = "vouches"
NEVER, FAILED = "–", "FAILED"

INTRODUCTION = """# Support matrix

What `make support` counted: how many tests of the [contract](contract.md) passed for each entry of
the registry in each column. A dash means that no test is about that pair; a pair with a test that
does not pass says FAILED. A test may count in several columns: accumulation under `ddp` is
in both.

- **one process**: everything else that the contract promises, on a single CPU process.
- **manual**: manual optimisation.
- **accumulation**: gradient accumulation, with an uneven last window.
- **compile**: `torch.compile(module)`, `module.compile()`, a compiled submodule.
- **resume**: stopped and resumed, against never stopped, to the last bit.
- **ddp**, **ddp_spawn**: two CPU processes with half a batch each.
- **FSDP2**: `ModelParallelStrategy` with `fully_shard`, two CPU processes with equal shards;
  **uneven**: five rows and a single element over two processes.
"""


def rows() -> dict[str, str]:
    """Parameter of the tests to label in the table."""
    from lightning_aux.registry import ENTRIES  # after the settings of the process are made

    return {**{entry: f"`{entry}`" for entry in ENTRIES}, **OTHER_ROWS}


class SupportMatrix:
    """Counts outcomes; under pytest-xdist reports carry them from the workers.

    Args:
        path: where the table goes, if anywhere.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.passed: dict[tuple[str, str], int] = defaultdict(int)
        self.failed: set[tuple[str, str]] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for pair in vouched(item):
                item.user_properties.append((PROPERTY, list(pair)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name != PROPERTY:
                continue
            pair = (value[0], value[1])
            if report.failed:
                self.failed.add(pair)
            elif report.when == "call" and report.passed:
                self.passed[pair] += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.path is not None and not hasattr(session.config, "workerinput"):
            self.path.write_text(INTRODUCTION + "\n" + self.table(), encoding="utf-8")

    def table(self) -> str:
        """Entries by columns, in Markdown."""
        lines = [["entry", *COLUMNS], ["---", *["---:"] * len(COLUMNS)]]
        lines += [
            [label, *(self._cell(row, column) for column in COLUMNS)]
            for row, label in rows().items()
        ]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def _cell(self, row: str, column: str) -> str:
        if (row, column) in self.failed:
            return FAILED
        return str(self.passed.get((row, column), NEVER))


def vouched(item: pytest.Item) -> list[tuple[str, str]]:
    """The pairs of entry and column that a test speaks for."""
    entry: Any = getattr(item, "callspec", None) and item.callspec.params.get("entry")
    if CONTRACT not in item.path.parents or entry not in rows():
        return []
    columns = dict.fromkeys(
        column for marker in item.iter_markers("vouches") for column in marker.args
    )
    unknown = [column for column in columns if column not in COLUMNS]
    if unknown:
        raise pytest.UsageError(f"{item.nodeid} vouches for {unknown}; known: {list(COLUMNS)}")
    # One training may be of several entries.
    together = item.get_closest_marker("stands_for")
    entries = together.args if together else (entry,)
    return [(each, column) for each in entries for column in columns or COLUMNS[:1]]
