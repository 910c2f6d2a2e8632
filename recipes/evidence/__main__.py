"""`python -m recipes.evidence`."""

import argparse
from pathlib import Path

from recipes.evidence import overview
from recipes.evidence.page import page
from recipes.evidence.results import train
from recipes.evidence.tasks import TASKS

PAGE = Path("docs/evidence.md")
RECIPES = Path("docs/recipes.md")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/evidence.md and docs/recipes.md.")
    parser.add_argument("--train", action="store_true", help="train what is not in runs/evidence")
    parser.add_argument("--only", nargs="+", choices=[task.name for task in TASKS], default=[])
    given = parser.parse_args()
    for task in TASKS:
        if given.train and (not given.only or task.name in given.only):
            train(task)
    for path, text in ((PAGE, page()), (RECIPES, overview.page())):
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
