"""From the syntax tree of a schedule string to the schedule, with errors that point at the string.

Which kinds exist and what their arguments hold comes from the classes; nothing here knows them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from .horizon import Border, Duration
from .parse import (
    EXAMPLES,
    SCHEDULE_EXAMPLE,
    TIME_EXAMPLE,
    Argument,
    Call,
    Node,
    Quantity,
    ScheduleError,
    Sequence,
    Word,
    near,
    one_line,
    parse,
    pointed,
)

if TYPE_CHECKING:
    from .schedule import Schedule

Role: TypeAlias = Literal["value", "values", "time", "end", "times", "shape", "phase", "parts"]

_EXPECTED: dict[Role, str] = {
    "shape": "a shape such as linear",
    "phase": "the name of a phase of training",
    "time": f"a time such as {TIME_EXAMPLE}",
    "end": f"a time such as {TIME_EXAMPLE}",
    "times": f"a time, or times in brackets, such as {TIME_EXAMPLE}",
}


def build(text: str, kinds: Mapping[str, type[Schedule]]) -> Schedule:
    """Parses a string and makes the schedule that it describes.

    Args:
        text: the string.
        kinds: the class of each kind.

    Raises:
        ScheduleError: with a caret under the character that does not fit and a valid example.
    """
    return _Builder(one_line(text), kinds).schedule(parse(text))


class _Builder:
    """Holds the text, to which the positions in the tree refer, and the classes."""

    def __init__(self, text: str, kinds: Mapping[str, type[Schedule]]) -> None:
        self.text = text
        self.kinds = kinds

    def schedule(self, node: Node) -> Schedule:
        if isinstance(node, Quantity):
            return self.kinds["constant"](**{"value": self.read("value", node, SCHEDULE_EXAMPLE)})
        if not isinstance(node, Call):
            message = "expected a number or a schedule"
            raise pointed(self.text, node.start, message, SCHEDULE_EXAMPLE)
        cls, example = self.kinds[node.kind], EXAMPLES[node.kind]
        found = self.assign(cls, node)
        values = {name: self.read_all(cls.arguments[name], found[name], example) for name in found}
        for field in dataclasses.fields(cls):
            if field.name not in values and field.default is dataclasses.MISSING:
                message = f"{node.kind} needs {field.name}"
                raise pointed(self.text, node.end, message, example)
        try:
            return cls(**values)
        except ScheduleError as error:
            place = _place(error, found, node)
            raise pointed(self.text, place, str(error), example) from None

    def assign(self, cls: type[Schedule], call: Call) -> dict[str, list[Argument]]:
        """Gives each argument of a call its name, as Python does for a function call."""
        names = list(cls.arguments)
        gathers = cls.arguments[names[0]] in ("values", "parts")
        named = names[1:] if gathers else names
        found: dict[str, list[Argument]] = {}
        for index, argument in enumerate(call.arguments):
            name, wrong = argument.key, None
            if name is None:
                if any(earlier.key for earlier in call.arguments[:index]):
                    wrong = "an argument without a name cannot follow one with a name"
                elif not gathers and index >= len(names):
                    wrong = f"{call.kind} takes at most {len(names)} arguments: {', '.join(names)}"
                name = names[0 if gathers else min(index, len(names) - 1)]
            elif name not in named:
                takes = ", ".join(named) or "only schedules"
                wrong = f"{call.kind} has no argument {name!r}; it takes {takes}."
                wrong += near(name, named)
            elif name in found:
                wrong = f"{name} is given twice"
            if wrong:
                raise pointed(self.text, argument.start, wrong, EXAMPLES[call.kind])
            found.setdefault(name, []).append(argument)
        return found

    def read_all(self, role: Role, arguments: list[Argument], example: str) -> Any:
        if role in ("values", "parts"):
            return [self.read(role, argument.value, example) for argument in arguments]
        return self.read(role, arguments[0].value, example)

    def read(self, role: Role, node: Node, example: str) -> Any:
        """Reads one argument, or one item of it, in its role."""
        if role == "parts":
            return self.schedule(node)
        if role == "times" and isinstance(node, Sequence):
            return [self.read("time", item, example) for item in node.items]
        if isinstance(node, Word):
            border = "." in node.text
            if role in ("shape", "phase") and not border:
                return node.text
            if role in ("time", "end", "times") and border:
                return Border.from_word(node)
        if role in ("time", "end", "times") and isinstance(node, Quantity):
            return Duration.from_quantity(node, self.text)
        if role in ("value", "values") and isinstance(node, Quantity) and node.unit is None:
            return node.value
        expected = _EXPECTED.get(role, "a finite number without a unit")
        raise pointed(self.text, node.start, f"expected {expected}", example)


def _place(error: ScheduleError, found: dict[str, list[Argument]], call: Call) -> int:
    """Returns where the argument stands that the error names as `name` or `name[index]`."""
    name, _, index = (error.argument or "").rstrip("]").partition("[")
    return found[name][int(index or 0)].value.start if name in found else call.end
