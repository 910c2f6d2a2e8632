"""The grammar of schedule strings: a recursive-descent parser and the error that it raises.

The result is a small syntax tree with positions; `schedule.py` turns it into objects. Nothing here
knows what a kind computes, only how it is written.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, TypeAlias

Unit: TypeAlias = Literal["steps", "epochs", "percent"]

UNITS: dict[str, Unit] = {
    "steps": "steps",
    "step": "steps",
    "ep": "epochs",
    "epochs": "epochs",
    "epoch": "epochs",
    "%": "percent",
}
EDGES = ("start", "end")
TIME_EXAMPLE = "500 steps, 10ep or 30%"
EXAMPLES = {
    "constant": "constant(0.5)",
    "linear": "linear(0, 1, until=30%)",
    "cosine": "cosine(1, 0, until=10ep)",
    "exponential": "exponential(1, 0.01, until=500 steps)",
    "step": "step(1, 0.5, 0.1, at=[30%, 60%])",
    "early": "early(0.1, until=50%, shape=linear)",
    "late": "late(0.1, start=50%)",
    "during": "during(0.5, phase=main)",
    "sum": "sum(early(0.1, until=20%), late(0.1, start=80%))",
    "epochwise": "epochwise(linear(0, 0.8))",
    "chain": "chain(linear(0, 1, until=10ep), cosine(1, 0, until=50%))",
}
SCHEDULE_EXAMPLE = f"0.5 or {EXAMPLES['linear']}"

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_WORD = re.compile(r"[^\W\d]\w*")
_BORDER = re.compile(rf"({_WORD.pattern})\s*\.\s*({_WORD.pattern})")


class ScheduleError(ValueError):
    """A schedule or a time that does not parse or cannot exist.

    Attributes:
        argument: name of the argument at fault, for the parser to place the caret.
    """

    def __init__(self, message: str, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument


def pointed(text: str, position: int, message: str, example: str) -> ScheduleError:
    """Returns an error with `text`, a caret under `position`, the reason and an example."""
    return ScheduleError(f"{message}\n  {text}\n  {' ' * position}^\nexample: {example}")


@dataclass(frozen=True)
class Quantity:
    """A number with an optional unit of time; `end` is where the number stops."""

    value: float
    unit: Unit | None
    integral: bool
    start: int
    end: int


@dataclass(frozen=True)
class Word:
    """A bare or quoted word such as the `linear` of `shape=linear`, or `main.start`."""

    text: str
    start: int


@dataclass(frozen=True)
class Sequence:
    """`[item, item]`."""

    items: tuple[Node, ...]
    start: int


@dataclass(frozen=True)
class Argument:
    """One argument of a call, `key=value` or `value`."""

    key: str | None
    value: Node
    start: int


@dataclass(frozen=True)
class Call:
    """`kind(arguments)`; `end` is the position of the closing parenthesis."""

    kind: str
    arguments: tuple[Argument, ...]
    start: int
    end: int


Node: TypeAlias = Quantity | Word | Sequence | Call


def near(word: str, choices: list[str]) -> str:
    """Returns ` Did you mean …?` for the nearest choices, or nothing."""
    matches = get_close_matches(word.lower(), choices, n=2, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, matches))}?" if matches else ""


def parse(text: str) -> Node:
    """Parses a schedule string into a syntax tree.

    Args:
        text: the string; line breaks count as spaces.

    Returns:
        The tree, with positions in `text`.

    Raises:
        ScheduleError: with a caret under the character that does not fit.
    """
    parser = _Parser(text, SCHEDULE_EXAMPLE)
    node = parser.value()
    parser.finish()
    return node


def parse_time(text: str) -> Quantity | Word:
    """Parses a time such as `10ep` or `main.start`; arguments and errors as in `parse`."""
    parser = _Parser(text, TIME_EXAMPLE)
    parser.peek()
    if border := _BORDER.match(parser.text, parser.at):
        word = parser.border(border)
        parser.finish()
        return word
    number = _NUMBER.match(parser.text, parser.at)
    if number is None:
        raise parser.error(parser.at, f"expected a time, found {parser.found()}")
    node = parser.quantity(number)
    parser.finish()
    return node


class _Parser:
    """One method per rule of the grammar; `self.at` is the next character."""

    def __init__(self, text: str, example: str) -> None:
        self.text = one_line(text)
        self.at = 0
        self.examples = [example]

    def finish(self) -> None:
        if self.peek():
            raise self.error(self.at, f"expected the end, found {self.found()}")

    def value(self) -> Node:
        quote = self.peek()
        if quote in ("'", '"'):
            self.at += 1
            node = self.value()
            self.expect(quote)
            return node
        if quote == "[":
            return self.sequence()
        start = self.at
        if number := _NUMBER.match(self.text, start):
            return self.quantity(number)
        if len(self.examples) > 1 and (border := _BORDER.match(self.text, start)):
            return self.border(border)
        if word := _WORD.match(self.text, start):
            self.at = word.end()
            if self.peek() == "(" or len(self.examples) == 1:
                return self.call(word[0], start)
            return Word(word[0], start)
        kinds = ", ".join(EXAMPLES)
        raise self.error(start, f"expected a number or one of {kinds}, found {self.found()}")

    def border(self, words: re.Match[str]) -> Word:
        self.at = words.end()
        if words[2] not in EDGES:
            raise self.error(
                words.start(2),
                f"a phase has a start and an end, not {words[2]!r}.{near(words[2], list(EDGES))}",
                f"{words[1]}.start or {words[1]}.end",
            )
        return Word(f"{words[1]}.{words[2]}", words.start())

    def quantity(self, number: re.Match[str]) -> Quantity:
        self.at = number.end()
        unit: Unit | None = None
        if self.peek() == "%":
            self.at += 1
            unit = "percent"
        elif word := _WORD.match(self.text, self.at):
            if word[0] not in UNITS:
                hint = near(word[0], list(UNITS))
                raise self.error(
                    word.start(),
                    f"unknown unit of time {word[0]!r}; units are steps, ep (epochs) and %.{hint}",
                    TIME_EXAMPLE,
                )
            self.at = word.end()
            unit = UNITS[word[0]]
        value = float(number[0])
        if not math.isfinite(value):
            raise self.error(number.start(), f"{number[0]} is not a finite number")
        integral = number[0].lstrip("+-").isdigit()
        return Quantity(value, unit, integral, number.start(), number.end())

    def sequence(self) -> Sequence:
        start = self.at
        self.at += 1
        items = [self.value()]
        while self.peek() == ",":
            self.at += 1
            items.append(self.value())
        self.expect("]", "',' or ']'")
        return Sequence(tuple(items), start)

    def call(self, kind: str, start: int) -> Call:
        if kind not in EXAMPLES:
            hint = near(kind, list(EXAMPLES))
            raise self.error(
                start, f"unknown kind {kind!r}; kinds are {', '.join(EXAMPLES)}.{hint}"
            )
        self.examples.append(EXAMPLES[kind])
        self.expect("(")
        arguments: list[Argument] = []
        if self.peek() != ")":
            arguments.append(self.argument())
            while self.peek() == ",":
                self.at += 1
                arguments.append(self.argument())
        end = self.at
        self.expect(")", "',' or ')'")
        self.examples.pop()
        return Call(kind, tuple(arguments), start, end)

    def argument(self) -> Argument:
        self.peek()
        start = self.at
        if word := _WORD.match(self.text, start):
            self.at = word.end()
            if self.peek() == "=":
                self.at += 1
                return Argument(word[0], self.value(), start)
            self.at = start
        return Argument(None, self.value(), start)

    def peek(self) -> str:
        """Skips spaces and returns the next character, or an empty string at the end."""
        while self.at < len(self.text) and self.text[self.at] == " ":
            self.at += 1
        return self.text[self.at : self.at + 1]

    def expect(self, character: str, expected: str | None = None) -> None:
        if self.peek() != character:
            message = f"expected {expected or repr(character)}, found {self.found()}"
            raise self.error(self.at, message)
        self.at += 1

    def found(self) -> str:
        return repr(self.peek()) if self.peek() else "the end"

    def error(self, position: int, message: str, example: str | None = None) -> ScheduleError:
        return pointed(self.text, position, message, example or self.examples[-1])


def one_line(text: str) -> str:
    """Returns the text with every white-space character as one space, so that carets line up."""
    return re.sub(r"\s", " ", text)
