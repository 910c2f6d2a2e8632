"""Lists the method cards in the navigation and on their front page, by family.

A new method then needs its card and no other change in the documentation.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from mkdocs.utils.meta import get_data

MARK = "<!-- list of cards -->"

# The families of `lightning-aux list`, by the part of the package that a class is in, which is read
# from the source: the build imports nothing.
FAMILIES = {
    "objectives": "Objectives",
    "teachers": "Teachers",
    "averages": "Weights",
    "quantized_weights": "Weights",
    "attribute_schedules": "Schedules",
    "phases": "Schedules",
    "diagnostics": "Diagnostics",
}
SAID = {
    "Objectives": "Add a term to the loss of your training step.",
    "Teachers": "A second set of weights, or another model, that objectives learn from.",
    "Weights": "Averages and other weights that are evaluated, saved or deployed.",
    "Schedules": "Change a rate or any attribute over the course of training.",
    "Diagnostics": "Measure and log, and change nothing.",
}


def families(config: MkDocsConfig) -> dict[str, list[Path]]:
    """Returns the cards of each family in alphabetical order, without their front page."""
    package = Path(config.docs_dir).parent / "lightning_aux"
    parts = {
        name: path.relative_to(package).parts[0].removesuffix(".py")
        for path in package.rglob("*.py")
        for name in re.findall(r"^class (\w+)\(", path.read_text("utf-8"), re.MULTILINE)
    }
    found: dict[str, list[Path]] = {family: [] for family in SAID}
    for path in sorted(Path(config.docs_dir, "cards").glob("*.md")):
        if path.stem != "index":
            title, _ = title_and_summary(path)
            found[FAMILIES[parts[title]]].append(path)
    return found


def title_and_summary(path: Path) -> tuple[str, str]:
    """Returns the name of a card's method and its first sentence."""
    text, _ = get_data(path.read_text("utf-8"))
    title, _, text = text.partition("\n")
    return title.removeprefix("# "), text.strip().split("\n\n", 1)[0].replace("\n", " ")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Appends the cards to the section of the navigation that is called Cards."""
    assert config.nav is not None
    section = next(entry["Cards"] for entry in config.nav if "Cards" in entry)
    for family, cards in families(config).items():
        section.append({family: [f"cards/{path.name}" for path in cards]})
    return config


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Writes the list of cards, each with its first sentence, its needs and its cost."""
    if MARK not in markdown:
        return markdown
    parts = []
    for family, cards in families(config).items():
        parts += [f"## {family}\n", f"{SAID[family]}\n"]
        parts += ["| method | | needs | costs |", "|---|---|---|---|"]
        for path in cards:
            title, summary = title_and_summary(path)
            _, front = get_data(path.read_text("utf-8"))
            needs, cost = (", ".join(front[key]) or "–" for key in ("needs", "cost"))
            parts.append(f"| [`{title}`]({path.name}) | {summary} | {needs} | {cost} |")
        parts.append("")
    return markdown.replace(MARK, "\n".join(parts))
