"""`lightning-aux list`: what can be attached, what it needs and costs, and its card."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rich.box import SIMPLE
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from lightning_aux import AuxiliaryError
from lightning_aux.cli.catalogue import COSTS, NEEDS, Method, catalogue, method
from lightning_aux.cli.terminal import terminal
from lightning_aux.engine.errors import near_matches

__all__ = ["listing"]


def listing(args: Sequence[str]) -> int:
    """Run the subcommand.

    Args:
        args: Arguments without the subcommand's name.

    Returns:
        Exit status 0.

    Raises:
        SystemExit: With status 2 when the arguments are wrong.
        AuxiliaryError: For a need or a method that does not exist; near matches are named.
    """
    given = _parser().parse_args(args)
    console = terminal()
    if given.show is not None:
        shown = method(given.show)
        if given.json:
            print(json.dumps(asdict(shown), indent=2))
        else:
            console.print(Markdown(shown.card))
        return 0
    needs, without = _known("--needs", given.needs), _known("--without", given.without)
    chosen = [
        each for each in catalogue() if needs <= set(each.needs) and not without & set(each.needs)
    ]
    if given.json:
        print(json.dumps([_line(each) for each in chosen], indent=2))
    else:
        _print(chosen, console)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-aux list",
        description="What can be attached: each with what it needs, what a step costs, and its "
        "paper.",
        epilog="needs: " + "; ".join(f"{word}: {meaning}" for word, meaning in NEEDS.items()),
    )
    parser.add_argument(
        "--needs",
        metavar="WORDS",
        action="append",
        default=[],
        help="only what makes use of these, for example labels or labels,index",
    )
    parser.add_argument(
        "--without",
        metavar="WORDS",
        action="append",
        default=[],
        help="what your model or data have not: leave out whatever needs it",
    )
    parser.add_argument("--show", metavar="NAME", help="print the card of one of them")
    parser.add_argument("--json", action="store_true", help="for machines")
    return parser


def _known(option: str, given: Iterable[str]) -> set[str]:
    words = {word.strip() for each in given for word in each.split(",") if word.strip()}
    for word in sorted(words - set(NEEDS)):
        raise AuxiliaryError(f"list: {option} {word}: {near_matches(word, NEEDS)}")
    return words


def _line(each: Method) -> dict[str, object]:
    return {key: value for key, value in asdict(each).items() if key != "card"}


def _print(chosen: Sequence[Method], console: Console) -> None:
    for kind in dict.fromkeys(each.kind for each in chosen):
        table = Table(title=kind, title_justify="left", title_style="bold", box=SIMPLE)
        table.add_column("name", no_wrap=True, style="cyan")
        table.add_column("what it does, needs, and costs in a step", ratio=1)
        table.add_column("arXiv", no_wrap=True)
        table.expand = True
        for each in chosen:
            if each.kind == kind:
                table.add_row(each.name, _text(each), next(iter(each.papers), ""))
        console.print(table)
    console.print(
        f"{len(chosen)} of {len(catalogue())}. lightning-aux list --show NAME prints the card.",
        soft_wrap=True,
    )


def _text(each: Method) -> Text:
    needs = ", ".join(each.needs) or "nothing"
    cost = ", ".join(COSTS[word] for word in each.cost)
    return Text.assemble(each.summary, (f"\nneeds {needs}; costs {cost}", "dim"))
