"""Every method that can be attached has a card, and every card answers the same questions."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

import lightning_aux
from lightning_aux.cli.catalogue import COSTS, NEEDS, catalogue

DOCS = Path(__file__).parents[2] / "docs"
CARDS = sorted(path for path in DOCS.glob("cards/*.md") if path.stem != "index")

SECTIONS = [
    "What it does",
    "When to use it",
    "Equation",
    "Arguments",
    "Cost per step",
    "What it composes badly with",
    "What we measured",
    "Source",
]


def documented(page: Path) -> list[str]:
    """The public names whose docstrings a page shows."""
    return re.findall(r"^::: lightning_aux\.(\w+)$", page.read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_a_card_has_the_sections_in_order(card: Path) -> None:
    assert re.findall(r"^## (.+)$", card.read_text("utf-8"), re.MULTILINE) == SECTIONS


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_a_card_is_of_the_class_that_it_is_called_after(card: Path) -> None:
    (name,) = documented(card)
    _, _, text = card.read_text("utf-8").split("---\n", 2)
    assert text.startswith(f"# {name}\n")


@pytest.mark.parametrize("name", lightning_aux.__all__)
def test_every_public_name_is_in_the_documentation(name: str) -> None:
    pages = {page for page in DOCS.rglob("*.md") if name in documented(page)}
    assert len(pages) == 1, f"{name} needs a card in docs/cards/ or a place in docs/api.md"


@pytest.mark.parametrize("name", lightning_aux.functional.__all__)
def test_every_formula_has_a_docstring_to_show(name: str) -> None:
    formula = getattr(lightning_aux.functional, name)
    assert not callable(formula) or formula.__doc__


def test_the_site_groups_the_cards_as_the_command_does() -> None:
    hooks = runpy.run_path(str(DOCS / "hooks.py"))
    shown = hooks["families"](SimpleNamespace(docs_dir=str(DOCS)))
    names = {
        family.lower(): [hooks["title_and_summary"](path)[0] for path in cards]
        for family, cards in shown.items()
    }
    listed: dict[str, list[str]] = {}
    for each in catalogue():
        listed.setdefault(each.kind, []).append(each.name)
    assert {family: sorted(cards) for family, cards in names.items()} == {
        family: sorted(cards) for family, cards in listed.items()
    }


def test_a_card_says_what_a_step_costs_and_what_is_needed_in_known_words() -> None:
    for each in catalogue():
        assert set(each.needs) <= set(NEEDS), each.name
        assert each.cost, each.name
        assert set(each.cost) <= set(COSTS), each.name
