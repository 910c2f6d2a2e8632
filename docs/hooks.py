"""Lists the method cards in the navigation and on their front page.

A new method then needs its card and no other change in the documentation.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from mkdocs.utils.meta import get_data

MARK = "<!-- list of cards -->"


def cards(config: MkDocsConfig) -> list[Path]:
    """Returns the cards in alphabetical order, without their front page."""
    found = Path(config.docs_dir, "cards").glob("*.md")
    return sorted(path for path in found if path.stem != "index")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Appends the cards to the section of the navigation that is called Cards."""
    assert config.nav is not None
    section = next(entry["Cards"] for entry in config.nav if "Cards" in entry)
    section.extend(f"cards/{path.name}" for path in cards(config))
    return config


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Writes the list of cards, each with its first sentence, its needs and its cost."""
    if MARK not in markdown:
        return markdown
    rows = []
    for path in cards(config):
        text, front = get_data(path.read_text("utf-8"))
        title, _, text = text.partition("\n")
        summary = text.strip().split("\n\n", 1)[0].replace("\n", " ")
        needs, cost = (", ".join(front[key]) for key in ("needs", "cost"))
        rows.append(f"| [{title.removeprefix('# ')}]({path.name}) | {summary} | {needs} | {cost} |")
    head = ["| method | | needs | costs |", "|---|---|---|---|"]
    return markdown.replace(MARK, "\n".join([*head, *rows]))
