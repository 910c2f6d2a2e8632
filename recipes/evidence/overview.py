"""Writes docs/recipes.md: every recipe, what it asks, its command, and what was measured with it.

Tables come from the results in docs/evidence. Where a card or a page has the table of a recipe, it
is the one below `<!-- recipe: recipes/... -->` on that page.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_aux.report.units import Unit
from lightning_aux.report.wording import cells
from recipes.evidence.results import Measured, measured
from recipes.evidence.tasks import TASKS

INTRODUCTION = """Plain Lightning modules on data that trains in seconds: MNIST-1D (generated) and
scikit-learn's digits. Run them from the root of a checkout, after `pip install -c constraints.txt
'.[recipes]'`; everything is written below `runs/`. Each is a file to copy from: a configuration of
`lightning-aux fit`, or a comparison for `lightning-aux compare`."""
READING = """This page is written from the recipes and from kept results by `python -m
recipes.evidence`. What does not help is here too. **Better** and *worse* are what
`lightning-aux compare` says of a difference that is paired by seed; in tables that are taken over
from another page, that its 95 % interval leaves out zero, whatever the number of intervals.
Seeds, settings and the machine are on [the page of evidence](evidence.md). All tasks are small:
whether something helps you is what [a comparison on your own module](getting-started.md) says."""
TRAININGS = """Their methods are compared above; these are the configurations to begin from."""
VERDICTS = ("better", "no difference shown", "worse")
INTERVAL = re.compile(r"([+−-]?[\d.]+) \[([+−-]?[\d.]+), ([+−-]?[\d.]+)\]")
MARK = re.compile(r"^<!-- recipe: (?P<paths>[^>]*?) -->\n+", re.MULTILINE)
PAGES = (Path("README.md"), *sorted(Path("docs").rglob("*.md")))


@dataclass(frozen=True)
class Recipe:
    """A file in recipes/ that somebody can run.

    Attributes:
        path: where it is.
        question: its first line.
        command: how it is run.
    """

    path: Path
    question: str
    command: str

    @property
    def compares(self) -> bool:
        return not self.command.startswith("lightning-aux fit")

    @property
    def anchor(self) -> str:
        return f"{self.path.parent.name}-{self.path.stem}".replace("_", "-")


@dataclass(frozen=True)
class Result:
    """What one comparison has shown.

    Attributes:
        label: the task, or nothing where the recipe has one alone.
        command: that made it.
        table: Markdown.
        verdicts: of each difference.
        source: Markdown that says where more is.
    """

    label: str
    command: str
    table: str
    verdicts: Counter[str]
    source: str


def page() -> str:
    """The page, from the recipes and the kept results."""
    found = list(recipes())
    compared = [(recipe, results(recipe)) for recipe in found if recipe.compares]
    parts = [
        "# Recipes\n",
        _paragraph(INTRODUCTION),
        _paragraph(READING),
        "## Comparisons\n",
        _glance(compared),
        *(_section(recipe, each) for recipe, each in compared),
        "## Single trainings\n",
        _paragraph(TRAININGS),
        _trainings([recipe for recipe in found if not recipe.compares]),
    ]
    return "\n".join(parts)


def recipes() -> Iterator[Recipe]:
    """Every recipe, those of MNIST-1D first."""
    folders = [Path("recipes/mnist1d"), Path("recipes/digits")]
    for path in (path for folder in folders for path in sorted(folder.iterdir())):
        text = path.read_text("utf-8")
        if path.suffix == ".yaml":
            question = text.partition("\n")[0].removeprefix("# ")
            (command, *_) = re.findall(r"^#   (lightning-aux .+)$", text, re.MULTILINE)
            yield Recipe(path, question, command)
        elif path.suffix == ".py" and '__name__ == "__main__"' in text:
            question = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
            yield Recipe(path, question, f"python -m {'.'.join(path.with_suffix('').parts)}")


def results(recipe: Recipe) -> list[Result]:
    """What was measured with a recipe: kept results, else the table of a page."""
    kept = [_kept(measured(task)) for task in TASKS if task.recipe == str(recipe.path)]
    return kept or list(_written(recipe))


def _kept(each: Measured) -> Result:
    unit = Unit(each.comparison.decides.unit)
    metric = unit.label(each.comparison.decides.metric)
    heads = ["variant", metric, "difference [95 % interval]", "shown", "time per step"]
    rows = []
    for row in each.summaries:
        name, value, difference, said, ratio, *_ = cells(row, each.comparison)
        rows.append([name.replace("_", " "), value, difference, _marked(said), ratio])
    return Result(
        label=each.task.label,
        command=" ".join(["lightning-aux", *each.task.arguments]),
        table=_table(heads, rows),
        verdicts=Counter(row.verdict for row in each.methods if row.verdict is not None),
        source=f"[all of its metrics](evidence.md#{_slug(each.task.label)}), "
        f"[results of each run](evidence/{each.task.name}.csv)",
    )


def _written(recipe: Recipe) -> Iterator[Result]:
    for path in PAGES:
        text = path.read_text("utf-8")
        marks = MARK.finditer(text)
        mark = next((each for each in marks if str(recipe.path) in each["paths"].split()), None)
        if mark is None:
            continue
        table = text[mark.end() :].partition("\n\n")[0]
        heads, *body = [line.strip()[1:-1].split("|") for line in table.splitlines()]
        differ = [
            place for place in range(len(heads)) if any(INTERVAL.search(r[place]) for r in body)
        ]
        if len(paths := mark["paths"].split()) > 1:  # a column of differences for each of them
            differ = [differ[paths.index(str(recipe.path))]]
        verdicts: Counter[str] = Counter()
        for place in differ:
            # A column of differences is to the right of what differs.
            lower = "loss" in " ".join(heads[place - 1 : place + 1]).lower()
            verdicts.update(filter(None, (verdict(row[place], lower) for row in body)))
        title = re.findall(r"^# (.+)$", text, re.MULTILINE)[0]
        of_the_site = path.is_relative_to("docs")
        source = f"[{title}]({path.relative_to('docs')})" if of_the_site else "README.md"
        yield Result("", recipe.command, f"{table}\n", verdicts, source)
        return


def verdict(cell: str, lower: bool = False) -> str | None:
    """What a difference with its interval shows, ``None`` where there is no interval.

    Args:
        cell: text such as ``+1.3 [+0.5, +2.1]``.
        lower: whether less is better.
    """
    if (found := INTERVAL.search(cell)) is None:
        return None
    _, low, high = (float(each.replace("−", "-")) for each in found.groups())
    if low <= 0 <= high:
        return "no difference shown"
    return "better" if (low > 0) != lower else "worse"


def _glance(compared: Sequence[tuple[Recipe, list[Result]]]) -> str:
    rows = []
    for recipe, found in compared:
        counts = sum((each.verdicts for each in found), Counter[str]())
        shown = [str(counts[each]) for each in VERDICTS] if counts else ["–"] * 3
        said = "" if counts["better"] or not counts else " **Nothing helped.**"
        rows.append([f"[{recipe.question}](#{recipe.anchor}){said}", *shown])
    return _table(["", "better", "open", "worse"], rows)


def _section(recipe: Recipe, found: Sequence[Result]) -> str:
    parts = [f"### {recipe.question} {{ #{recipe.anchor} }}\n", f"`{recipe.path}`\n"]
    if not found:
        parts += [f"```sh\n{recipe.command}\n```\n", "Nothing is kept of it.\n"]
    for each in found:
        counts = each.verdicts
        total = sum(counts.values())
        said = (
            f"Of {total} differences to the baseline {counts['better']} are better, "
            f"{counts['worse']} worse; {counts['no difference shown']} leave it open. "
            if total
            else ""
        )
        if total and not counts["better"]:
            said = f"**Nothing helped here.** {said}"
        label = f"**{each.label}.** " if each.label else ""
        parts += [
            f"```sh\n{each.command}\n```\n",
            _paragraph(f"{label}{said}More: {each.source}."),
            each.table,
        ]
    return "\n".join(parts)


def _trainings(found: Sequence[Recipe]) -> str:
    rows = [[each.question, f"`{each.command}`"] for each in found]
    return _table(["", "command"], rows, numbers=False)


def _marked(said: str) -> str:
    return {"better": "**better**", "worse": "*worse*"}.get(said, said)


def _slug(label: str) -> str:
    """The anchor of a heading, as the site makes it."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", label.lower())).strip("-")


def _paragraph(text: str) -> str:
    return (
        textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False, break_long_words=False)
        + "\n"
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    rest = ["---:" if numbers else "---"] * (len(heads) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---", *rest], *rows]) + "\n"
