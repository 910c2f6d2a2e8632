"""What the documentation shows works: Python blocks run, YAML can be built, commands work.

The blocks of one page run in order and share their names, as a reader would type them. A block with
a title, ```` ```yaml title="fit.yaml" ````, is a file of that name; the commands of a page that has
such files run with them. A block after `<!-- not run: reason -->` is left out.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import lightning_aux
from lightning_aux.cli import main
from lightning_aux.cli.compare_file import read_comparison
from lightning_aux.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(
    r"^(?P<not_run>[ ]*<!-- not run(?P<reason>[^\n]*)-->\n+)?"
    r"(?P<indent>[ ]*)```(?P<language>python|yaml|sh|bash)\b(?P<info>[^\n]*)\n"
    r"(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
TITLE = re.compile(r'title="([^"]+)"')
QUICK = ("list", "inspect", "schedule")  # what a command of a page without files does too


class Block(NamedTuple):
    """One fenced block: its first line of code, what it says, its file, and why it does not run."""

    line: int
    language: str
    code: str
    title: str | None
    reason: str | None


def all_blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        language = "sh" if match["language"] == "bash" else match["language"]
        title = TITLE.search(match["info"])
        reason = match["reason"].strip(" :") if match["not_run"] else None
        code = textwrap.dedent(match["code"])
        yield Block(line, language, code, title[1] if title else None, reason)


def blocks(page: Path, language: str) -> Iterator[Block]:
    return (block for block in all_blocks(page) if block.language == language)


def pages_with(language: str) -> list[Any]:
    found = [page for page in PAGES if any(blocks(page, language))]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in found]


def write(block: Block) -> bool:
    """Write a block with a title; whether it has one."""
    if block.title is not None:
        Path(block.title).write_text(block.code, encoding="utf-8")
    return block.title is not None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory from which files can be imported, with the recipes beside it."""
    monkeypatch.chdir(tmp_path)  # what an example logs or saves stays out of the checkout
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_of_a_page_run_in_order(page: Path, folder: Path) -> None:
    found = list(blocks(page, "python"))
    to_run = [block for block in found if block.reason is None]
    if not to_run:
        pytest.skip("; ".join(block.reason or "" for block in found))
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in to_run:
        if not write(block):
            # Leading newlines make a traceback name the line of the page.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)


@pytest.mark.parametrize("page", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in PAGES])
def test_a_block_that_does_not_run_says_why(page: Path) -> None:
    silent = [f"{page.name}:{b.line}" for b in all_blocks(page) if b.reason == ""]
    assert not silent, f"write <!-- not run: reason --> before {silent}"


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_callbacks_in_yaml_blocks_can_be_built(page: Path) -> None:
    for block in blocks(page, "yaml"):
        for callback in callbacks_in(yaml.safe_load(block.code)):
            kind = getattr(lightning_aux, callback["class_path"].rpartition(".")[2], None)
            if kind is not None:  # a callback of Lightning's is Lightning's to test
                kind(**callback.get("init_args", {}))


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_comparisons_in_yaml_blocks_can_be_read(page: Path, folder: Path) -> None:
    """Their base is a file of the page, or one of the recipes for MNIST-1D."""
    for file in (ROOT / "recipes" / "mnist1d").glob("*.yaml"):
        shutil.copy(file, folder)
    found = [block for block in blocks(page, "yaml") if "variants" in yaml.safe_load(block.code)]
    for block in all_blocks(page):
        write(block)
    for number, block in enumerate(found):
        path = folder / f"comparison{number}.yaml"
        path.write_text(block.code, encoding="utf-8")
        assert len(read_comparison(path).variants) > 1


def callbacks_in(config: Any) -> Iterator[dict[str, Any]]:
    """Every mapping with a `class_path`, and every class named in a list of callbacks."""
    if isinstance(config, dict):
        if "class_path" in config:
            yield config
        listed = config.get("callbacks")
        for name in listed if isinstance(listed, list) else [listed]:
            if isinstance(name, str):
                yield {"class_path": name}
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            yield from callbacks_in(value)


# ----------------------------------------------------------------------------------- shell
def commands(block: Block) -> Iterator[list[str]]:
    """The words of each line, comments left out."""
    for line in block.code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def is_placeholder(word: str) -> bool:
    """`FILE`, `CHECKPOINT`: to be replaced by the reader."""
    return re.fullmatch(r"[A-Z_]+(\.\w+)?", word) is not None


@pytest.mark.parametrize("page", pages_with("sh"))
def test_what_shell_blocks_name_exists(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {block.title for block in all_blocks(page)}
    for block in blocks(page, "sh"):
        for words in commands(block):
            where = f"{page.name}:{block.line}: {' '.join(words)}"
            assert exists(words, files, capsys), where


def exists(words: Sequence[str], files: set[str | None], capsys: Any) -> bool:
    # A bare name is a file of the reader's, unless the page has it.
    named = [word for word in words if word.endswith(".yaml") and "/" in word]
    if not all((ROOT / name).is_file() or name in files for name in named):
        return False
    makefile = (ROOT / "Makefile").read_text("utf-8")
    match list(words):
        case ["lightning-aux", command, *rest]:
            return command in COMMANDS and options_exist(command, rest, capsys)
        case ["make", target, *_]:
            return f"\n{target}:" in makefile
        case ["python", "-m", "pip" | "pytest", *_] | ["pip", "install", *_]:
            return True
        case ["python", "-m", module, *_]:
            place = ROOT / module.replace(".", "/")
            return place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()
        case _:
            return True


def options_exist(command: str, rest: Sequence[str], capsys: Any) -> bool:
    """Whether the help of a command knows every option that is used."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    known = set(re.findall(r"--[\w.-]+", capsys.readouterr().out))
    given = {word.partition("=")[0] for word in rest if word.startswith("--")}
    own = {option for option in given if not re.match(r"--(model|data|trainer)\b", option)}
    return own <= known


def to_run(page: Path, block: Block) -> Iterator[list[str]]:
    """What of a block is run: everything where the page has its own files, else what is quick."""
    titled = any(each.title for each in all_blocks(page))
    if block.reason is None and block.language == "sh":
        for words in commands(block):
            complete = words[0] == "lightning-aux" and not any(map(is_placeholder, words))
            if complete and (titled or words[1] in QUICK):
                yield words[1:]


def with_commands() -> list[Any]:
    found = [page for page in PAGES if any(any(to_run(page, each)) for each in all_blocks(page))]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in found]


@pytest.mark.parametrize("page", with_commands())
def test_commands_of_a_page_run_in_order(page: Path, folder: Path) -> None:
    """Those that train do it for one epoch with two seeds, so that this is quick."""
    short = {
        "compare": ["--epochs", "1", "--seeds", "0,1"],
        "fit": ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"],
        "inspect": ["--steps", "0"],
    }
    for block in all_blocks(page):
        if not write(block):
            for words in to_run(page, block):
                status = main([*words, *short.get(words[0], [])])
                assert status == 0, f"{page.name}:{block.line}: {' '.join(words)}"


def test_a_failing_block_is_reported_with_the_line_of_its_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nok = 1\nraise ValueError\n```\n")
    (block,) = blocks(page, "python")
    assert block.line == 4
    assert block.code.splitlines()[1] == "raise ValueError"


@pytest.mark.parametrize(
    "line",
    [
        "lightning-aux compare --config recipes/mnist1d/no_such.yaml",
        "lightning-aux compara --config recipes/mnist1d/noisy_labels.yaml",
        "lightning-aux list --need labels",
        "make demos",
        "python -m recipes.no_such",
    ],
)
def test_a_command_that_cannot_work_is_noticed(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not exists(shlex.split(line), set(), capsys)
