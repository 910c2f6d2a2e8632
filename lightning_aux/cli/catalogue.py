"""Everything that can be attached, in one line each: read from the classes and from their cards."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

import lightning_aux
from lightning_aux import AuxiliaryError, Objective, Taps
from lightning_aux.engine import Attached
from lightning_aux.engine.errors import near_matches

__all__ = ["COSTS", "KINDS", "NEEDS", "Method", "catalogue", "method"]

NEEDS = {
    "logits": "class logits, which the model returns or Taps(logits=...) finds",
    "labels": "labels in the batch",
    "index": "samples with an index: a dataset that is not iterable only",
    "teacher": "a teacher: another callback, a second model, or its stored logits",
    "path": "the path of a module of yours",
    "dropout": "dropout in the model",
    "validation": "validation data",
    "checkpoints": "several checkpoints, of a run or of several seeds",
    "files": "a folder that `lightning-aux teach` has written",
}
COSTS = {
    "free": "next to nothing",
    "logits": "a pass over the logits",
    "weights": "a second set of weights",
    "samples": "memory for each sample",
    "teacher": "a teacher's forward",
    "repeat": "a part of the model again",
    "disk": "reading a file",
    "sometimes": "more passes, only where it measures",
    "evaluation": "a pass over the logits, only in evaluation",
    "end": "evaluations, only when training ends",
}
# By the module of the package that the class is in.
KINDS = {
    "objectives": "objectives",
    "teachers": "teachers",
    "averages": "weights",
    "quantized_weights": "weights",
    "attribute_schedules": "schedules",
    "phases": "schedules",
    "diagnostics": "diagnostics",
}

_CARD = re.compile(r"\A---\n(?P<front>.*?)^---\n(?P<text># (?P<name>\w+)\n.*)", re.DOTALL | re.M)
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


@dataclass(frozen=True)
class Method:
    """A public callback class and what its card says of it.

    Attributes:
        name: of the class.
        kind: what it is, a value of `KINDS`.
        summary: the card's first sentence.
        needs: what the user's model or data have to have, of `NEEDS`.
        cost: classes of what a step costs, of `COSTS`.
        papers: arXiv numbers in the order of the card's sources.
        card: the card as Markdown, with the class's arguments.
    """

    name: str
    kind: str
    summary: str
    needs: tuple[str, ...]
    cost: tuple[str, ...]
    papers: tuple[str, ...]
    card: str


@cache
def catalogue() -> tuple[Method, ...]:
    """All methods, in the order of `KINDS`, and then of the alphabet."""
    cards = {}
    for path in _folder().glob("*.md"):
        if found := _CARD.match(path.read_text("utf-8")):
            cards[found["name"]] = found
    methods = [_method(kind, cards[kind.__name__]) for kind in _classes()]
    order = list(KINDS.values())
    return tuple(sorted(methods, key=lambda each: (order.index(each.kind), each.name.lower())))


def method(name: str) -> Method:
    """The method of that name, however it is written: ``ZLoss``, ``z_loss``, ``zloss``.

    Raises:
        AuxiliaryError: there is none; near matches are named.
    """
    known = {each.name: each for each in catalogue()}
    for each in known.values():
        if _plain(each.name) == _plain(name):
            return each
    raise AuxiliaryError(f"list: no method is called {name!r}. {near_matches(name, known)}")


def _classes() -> Iterable[type[Attached]]:
    for name in lightning_aux.__all__:
        found = getattr(lightning_aux, name)
        frame = (Objective, Taps)
        if inspect.isclass(found) and issubclass(found, Attached) and found not in frame:
            yield found


def _method(kind: type[Attached], card: re.Match[str]) -> Method:
    front, text = yaml.safe_load(card["front"]), card["text"]
    _, summary, _ = text.split("\n\n", 2)
    source = text.partition("\n## Source\n")[2]
    return Method(
        name=kind.__name__,
        kind=KINDS[kind.__module__.split(".")[1]],
        summary=" ".join(summary.split()),
        needs=tuple(front["needs"]),
        cost=tuple(front["cost"]),
        papers=tuple(dict.fromkeys(_ARXIV.findall(source))),
        card=text.replace(f"::: lightning_aux.{kind.__name__}\n", _arguments(kind)),
    )


def _arguments(kind: type[Attached]) -> str:
    """The signature and the docstring's section on arguments, where the site shows the whole."""
    given = ", ".join(str(each).split(": ")[0] for each in _parameters(kind))
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(kind) or "", re.DOTALL | re.M)
    listed = inspect.cleandoc(f"\n{section[1]}") if section else ""
    return f"```text\n{kind.__name__}({given})\n\n{listed}\n```\n"


def _parameters(kind: type[Attached]) -> Iterable[str]:
    for each in kind.init_parameters().values():
        yield each.name if each.default is each.empty else f"{each.name}={each.default!r}"


def _folder() -> Path:
    """The cards: within the installed package, or beside it in the repository."""
    package = Path(lightning_aux.__file__).parent
    for folder in (package / "cards", package.parent / "docs" / "cards"):
        if folder.is_dir():
            return folder
    raise AuxiliaryError(
        f"list: the cards are neither in {package} nor beside it. Install the package again."
    )


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()
