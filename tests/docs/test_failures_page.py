"""The page of failures that cannot happen here is true: every row has its tests, by their names.

``python tests/docs/test_failures_page.py`` writes the tests that there are into the page.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "failures.md"
WAITING = "## Not yet"

# The failures that users of comparable systems reported; the page has a row for each.
NUMBERS = (
    1, 2, 3, 5, 8, 9, 10, 11, 13, 14, 15, 16, 17, 18, 20, 22, 23, 24, 25, 26, 27, 28, 29, 30,
    31, 33, 35, 36, 37, 38, 39, 40, 41, 42, 44, 45, 47, 48, 49, 50, 51, 53, 56, 58, 59, 60, 61,
    63, 64, 66, 67, 68, 69, 71, 73, 75, 77, 78, 79, 80,
)  # fmt: skip
REPORTED = [f"F{number:02}" for number in NUMBERS]

ROW = re.compile(r"^\| \[(F\d\d)\]\((https://\S+)\) \| (.+) \|$", re.MULTILINE)
NODE = re.compile(r"`([\w/.]+\.py::\w+)`")
ID_IN_NAME = re.compile(r"(?:^|(?<=_))f\d\d(?=_|$)")
ON_A_GPU = ROOT / "tests" / "gpu" / "checks.py"  # functions that test_gpu.py is parametrised with


def named_tests() -> dict[str, list[str]]:
    """Every number in the name of a test, and those tests as `file::name` below `tests/`."""
    found: dict[str, list[str]] = {each: [] for each in REPORTED}
    for path in sorted([*(ROOT / "tests").rglob("test_*.py"), ON_A_GPU]):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            starts = ("test_", "f") if path == ON_A_GPU else ("test_",)
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith(starts):
                continue
            for number in dict.fromkeys(ID_IN_NAME.findall(node.name)):
                place = f"{path.relative_to(ROOT / 'tests')}::{node.name}"
                found.setdefault(number.upper(), []).append(place)
    return found


def rows(text: str) -> dict[str, list[str]]:
    """Number to the cells after it, link left out."""
    return {number: rest.split(" | ") for number, _, rest in ROW.findall(text)}


def parts(page: str) -> tuple[str, str]:
    """The page before and after the failures that wait for something."""
    prevented, heading, waiting = page.partition(f"{WAITING}\n")
    assert heading
    return prevented, waiting


def with_tests(page: str) -> str:
    """The page with the last cell of every row before `WAITING` made from the tests there are."""
    tests = named_tests()

    def row(match: re.Match[str]) -> str:
        number, link, rest = match.groups()
        cells = rest.split(" | ")[:2]
        listed = "<br>".join(f"`{place}`" for place in tests[number])
        return " | ".join([f"| [{number}]({link})", *cells, listed]) + " |"

    prevented, waiting = parts(page)
    return ROW.sub(row, prevented) + f"{WAITING}\n" + waiting


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text("utf-8")


def test_every_reported_failure_has_one_row(page: str) -> None:
    assert len(REPORTED) == 60
    assert Counter(number for number, *_ in ROW.findall(page)) == Counter(REPORTED)
    lines = [line for line in page.splitlines() if re.match(r"\|\s*\[?F\d\d", line)]
    assert len(lines) == len(REPORTED)  # no row in another form, which nothing here would look at


def test_every_row_says_what_went_wrong_and_what_prevents_it_or_what_it_waits_for(
    page: str,
) -> None:
    prevented, waiting = parts(page)
    assert {number: len(cells) for number, cells in rows(prevented).items()} == dict.fromkeys(
        rows(prevented), 3
    )
    assert {number: len(cells) for number, cells in rows(waiting).items()} == dict.fromkeys(
        rows(waiting), 2
    )
    for cells in (rows(prevented) | rows(waiting)).values():
        assert all(len(cell) > 10 for cell in cells[:2])


def test_every_prevented_failure_has_a_test_with_its_number(page: str) -> None:
    without = [
        number for number, cells in rows(parts(page)[0]).items() if not NODE.search(cells[2])
    ]
    assert without == [], "write the test, or move the row to the failures that wait"


def test_every_test_on_the_page_is_there_and_has_the_number_of_its_row(page: str) -> None:
    tests = named_tests()
    for number, cells in rows(page).items():
        assert [node for node in NODE.findall(cells[-1]) if node not in tests[number]] == []


def test_every_test_with_a_number_is_on_the_page_in_the_row_of_that_number(page: str) -> None:
    listed = {number: NODE.findall(cells[-1]) for number, cells in rows(page).items()}
    missing = {
        number: [place for place in places if place not in listed.get(number, [])]
        for number, places in named_tests().items()
    }
    assert {number: places for number, places in missing.items() if places} == {}, (
        "run python tests/docs/test_failures_page.py"
    )


if __name__ == "__main__":
    PAGE.write_text(with_tests(PAGE.read_text("utf-8")), "utf-8")
