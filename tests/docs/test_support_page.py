"""The committed support matrix has a row for everything registered, and every column."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_aux.registry import ENTRIES
from tests.support_matrix import COLUMNS, FAILED, INTRODUCTION, NEVER, SupportMatrix, rows

PAGE = Path(__file__).parents[2] / "docs" / "support.md"


def table(text: str) -> dict[str, dict[str, str]]:
    """Label of the row to column to cell."""
    lines = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("|")]
    header, _, *body = lines
    return {label: dict(zip(header[1:], cells, strict=True)) for label, *cells in body}


@pytest.fixture(scope="module")
def committed() -> dict[str, dict[str, str]]:
    return table(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_registry_entry_has_a_row_with_every_column(committed: Any, entry: str) -> None:
    """Run `make support` when this fails: the page is written from the tests."""
    assert tuple(committed[f"`{entry}`"]) == COLUMNS


def test_the_page_has_no_rows_but_those(committed: Any) -> None:
    assert list(committed) == list(rows().values())


def test_the_words_on_the_page_are_those_of_the_plugin() -> None:
    assert PAGE.read_text(encoding="utf-8").startswith(INTRODUCTION)


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_claimed_was_counted_and_nothing_failed(committed: Any, entry: str) -> None:
    """A term has been shown to work in every column; so has whatever else can be compared."""
    cells = committed[f"`{entry}`"]
    assert FAILED not in cells.values()
    if ENTRIES[entry].objective is not None:
        assert NEVER not in cells.values()
    assert all(cell == NEVER or int(cell) > 0 for cell in cells.values())


def test_a_failure_outweighs_what_passed_and_what_never_ran_is_a_dash() -> None:
    def report(entry: str, column: str, outcome: str, when: str = "call") -> Any:
        return SimpleNamespace(
            user_properties=[("vouches", [entry, column])],
            failed=outcome == "failed",
            passed=outcome == "passed",
            when=when,
        )

    matrix = SupportMatrix(None)
    for each in [
        report("ema_teacher", "ddp", "passed"),
        report("ema_teacher", "ddp", "passed"),
        report("ema_teacher", "ddp", "passed", when="setup"),
        report("frozen_teacher", "ddp", "passed"),
        report("frozen_teacher", "ddp", "failed"),
        report("head", "manual", "skipped"),
        report("head", "FSDP2", "failed", when="setup"),
    ]:
        matrix.pytest_runtest_logreport(each)
    cells = table(matrix.table())
    assert cells["`ema_teacher`"]["ddp"] == "2"
    assert cells["`frozen_teacher`"]["ddp"] == FAILED
    assert cells[rows()["head"]]["manual"] == NEVER
    assert cells[rows()["head"]]["FSDP2"] == FAILED
