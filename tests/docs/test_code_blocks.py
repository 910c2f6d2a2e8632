"""What the documentation shows works: Python blocks run, YAML callbacks can be built.

The blocks of one page run in order and share their names, as a reader would type them. A block
after `<!-- not run: reason -->` is left out.
"""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import lightning_aux

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("README.md"), *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(
    r"^(?P<not_run>[ ]*<!-- not run(?P<reason>[^\n]*)-->\n+)?"
    r"(?P<indent>[ ]*)```(?P<language>python|yaml)\b[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """One fenced block: where its first line of code is, what it says, and why it does not run."""

    line: int
    code: str
    reason: str | None


def blocks(page: Path, language: str) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        if match["language"] != language:
            continue
        line = text.count("\n", 0, match.start("code")) + 1
        reason = match["reason"].strip(" :") if match["not_run"] else None
        yield Block(line, textwrap.dedent(match["code"]), reason)


def pages_with(language: str) -> list[Any]:
    found = [page for page in PAGES if any(blocks(page, language))]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in found]


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_of_a_page_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # what an example logs or saves stays out of the checkout
    to_run = [block for block in blocks(page, "python") if block.reason is None]
    if not to_run:
        pytest.skip("; ".join(block.reason or "" for block in blocks(page, "python")))
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in to_run:
        # Leading newlines make a traceback name the line of the page.
        exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)


@pytest.mark.parametrize("page", pages_with("python"))
def test_a_block_that_does_not_run_says_why(page: Path) -> None:
    silent = [f"{page.name}:{b.line}" for b in blocks(page, "python") if b.reason == ""]
    assert not silent, f"write <!-- not run: reason --> before {silent}"


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_callbacks_in_yaml_blocks_can_be_built(page: Path) -> None:
    for block in blocks(page, "yaml"):
        for callback in callbacks_in(yaml.safe_load(block.code)):
            kind = getattr(lightning_aux, callback["class_path"].rpartition(".")[2], None)
            if kind is not None:  # a callback of Lightning's is Lightning's to test
                kind(**callback.get("init_args", {}))


def callbacks_in(config: Any) -> Iterator[dict[str, Any]]:
    """Every mapping with a `class_path`, wherever it is in the document."""
    if isinstance(config, dict):
        if "class_path" in config:
            yield config
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            yield from callbacks_in(value)


def test_a_failing_block_is_reported_with_the_line_of_its_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nok = 1\nraise ValueError\n```\n")
    (block,) = blocks(page, "python")
    assert block.line == 4
    assert block.code.splitlines()[1] == "raise ValueError"
