"""The page of recipes is what its generator makes of the recipes and of kept results."""

import csv
import re
from collections import Counter
from pathlib import Path
from statistics import fmean, stdev

import pytest
from scipy.stats import t

from recipes.evidence.__main__ import RECIPES
from recipes.evidence.overview import MARK, PAGES, page, recipes, verdict


@pytest.fixture(autouse=True)
def at_the_root(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)


def test_the_page_is_what_the_recipes_and_results_say():
    """Run `python -m recipes.evidence` when this fails; it trains nothing."""
    assert RECIPES.read_text("utf-8") == page()


def test_every_recipe_is_on_the_page():
    text = RECIPES.read_text("utf-8")
    found = {str(each.path): each for each in recipes()}
    assert set(found) >= {str(path) for path in Path("recipes").glob("*/*.yaml")}
    compared = {path for path, each in found.items() if each.compares}
    assert [path for path in compared if f"`{path}`" not in text] == []
    assert [each.command for path, each in found.items() if path not in compared] == re.findall(
        r"\| `(lightning-aux fit [^`]+)` \|", text
    )


def test_every_comparison_has_a_measured_table():
    _, *sections = re.split(r"^##+ .*$", RECIPES.read_text("utf-8"), flags=re.MULTILINE)[1:-1]
    assert len(sections) == sum(each.compares for each in recipes())
    assert [each for each in sections if "\n|" not in each] == []


def test_every_marked_table_is_of_a_recipe_that_is_there():
    marked = [
        name
        for path in PAGES
        for found in MARK.finditer(path.read_text("utf-8"))
        for name in found["paths"].split()
    ]
    assert marked
    assert [name for name in marked if not Path(name).is_file()] == []


def test_verdicts_are_those_of_the_results():
    """Counted on the page, and again from the runs with Student's t written out."""
    section = (
        RECIPES.read_text("utf-8").partition("{ #mnist1d-calibration }")[2].partition("###")[0]
    )
    shown = Counter(
        re.findall(r"\| (?:\*+)?(better|worse|no difference shown)(?:\*+)? \|", section)
    )
    with open("docs/evidence/mnist1d_calibration.csv", newline="") as file:
        runs = {
            (run["variant"], run["seed"]): float(run["test_ece"]) for run in csv.DictReader(file)
        }
    seeds = sorted({seed for _, seed in runs})
    expected: Counter[str] = Counter()
    for variant in {name for name, _ in runs} - {"baseline"}:
        differences = [runs[variant, seed] - runs["baseline", seed] for seed in seeds]
        half = t.ppf(0.975, len(seeds) - 1) * stdev(differences) / len(seeds) ** 0.5
        low, high = fmean(differences) - half, fmean(differences) + half
        expected[
            "no difference shown" if low <= 0 <= high else "better" if high < 0 else "worse"
        ] += 1
    assert shown == expected


@pytest.mark.parametrize(
    ("cell", "lower", "said"),
    [
        ("+1.3 [+0.5, +2.1]", False, "better"),
        ("+1.3 [+0.5, +2.1]", True, "worse"),
        ("−1.3 [−2.1, −0.5] points", True, "better"),
        ("+0.1 [−0.0, +0.3]: no difference shown", False, "no difference shown"),
        ("90.1 ± 0.2", False, None),
    ],
)
def test_what_a_difference_shows(cell, lower, said):
    assert verdict(cell, lower) == said
