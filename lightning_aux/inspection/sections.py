"""The tables that a terminal, a page and a notebook show, and their plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from textwrap import fill, wrap

from lightning_aux.inspection.found import Inspection, Member, ModuleFound

__all__ = ["Section", "as_text", "headline", "sections"]

NOTHING = "–"
_WIDE = 44


@dataclass(frozen=True)
class Section:
    """One table.

    Attributes:
        title: above it.
        heads: of its columns.
        rows: of texts.
        note: under it.
        failed: the rows that tell of a failure.
        tree: whether the first column has paths of a tree.
    """

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    failed: frozenset[int] = frozenset()
    tree: bool = False


def headline(found: Inspection) -> list[str]:
    """What is the most important, in a sentence each."""
    total = next((each.parameters for each in found.modules if not each.path), 0)
    time = f", {milliseconds(found.seconds)} a step" if found.seconds else ""
    lines = [f"{found.name}: {count(total)} parameters, one batch on {found.device}{time}."]
    if found.error:
        lines.append(f"Fails: {found.error}")
    if found.together:
        lines.append(f"Each callback works, but not all together: {found.together}")
    for each in found.members:
        if each.error:
            said = each.error.removeprefix(f"{each.name}: ")
            lines.append(f"{each.name} would fail: {said}")
    if found.members and not found.fails:
        n = len(found.members)
        works = f"All {n} callbacks work" if n > 1 else "The callback works"
        lines.append(f"{works} on this batch.")
    if found.others:
        names = ", ".join(found.others)
        lines.append(f"Not looked at, because they are not of lightning_aux: {names}.")
    lines += [f"{note[0].upper()}{note[1:]}." for note in found.notes]
    return lines


def sections(found: Inspection) -> list[Section]:
    """The tables that are not empty."""
    tables = [_members(found), _bindings(found), _batch(found), _modules(found)]
    return [each for each in tables if each.rows]


def _bindings(found: Inspection) -> Section:
    rows = [
        (each.what, each.where or NOTHING, str(each.shape or ""), each.error or each.why)
        for each in found.bindings
    ]
    return Section(
        "Where things are",
        ("what", "where", "shape", "how it is known"),
        tuple(rows),
        "What objectives read unless Taps says otherwise. The classifier and the encoder are a "
        "belief.",
        frozenset(place for place, each in enumerate(found.bindings) if each.error),
    )


def _batch(found: Inspection) -> Section:
    rows = [
        (each.path or "(the batch)", str(each.shape or each.type), ", ".join(each.roles))
        for each in found.batch
    ]
    return Section(
        "The batch",
        ("key path", "holds", "serves as"),
        tuple(rows),
        "Taps(target=...) and Taps(mask=...) take these key paths.",
    )


def _modules(found: Inspection) -> Section:
    rows = []
    for each, same in collapsed(found.modules):
        path = f"{each.path} … {same.rpartition('.')[2]}" if same else each.path
        rows.append(
            (
                path or "(the module)",
                each.type,
                str(each.output or ("" if each.calls or not each.path else "never called")),
                count(each.parameters) if each.parameters else "",
                ", ".join(_kind(each, kind) for kind in each.kinds),
            )
        )
    return Section(
        "The module",
        ("path", "type", "output", "parameters", "what it is"),
        tuple(rows),
        "Everything with an output can be tapped. Dropout: DropoutSchedule. Residual blocks: "
        "StochasticDepthSchedule. Classifier: Taps(logits=...), DualHeadDistillation.",
        tree=True,
    )


def _members(found: Inspection) -> Section:
    heads = ("callback", "bound to", "parameters", "memory", "time per step", "verdict")
    rows = [_member(each, found.seconds) for each in found.members]
    return Section(
        "Callbacks",
        heads,
        tuple(rows),
        "Parameters are those of a head. Memory: the tensors that a callback holds, a head's "
        "gradients and optimizer state included. Time: what it adds, roughly: the median of three "
        "rounds and half their range.",
        frozenset(place for place, each in enumerate(found.members) if each.error),
    )


def _member(each: Member, plain: float | None) -> tuple[str, ...]:
    time = NOTHING
    if each.seconds is not None:
        share = f", {100 * each.seconds / plain:+.0f} %" if plain else ""
        time = f"{1000 * each.seconds:+.2f} ± {1000 * each.spread:.2f} ms{share}".replace("-", "−")
    said = ["would fail"] if each.error else list(each.notes) or ["works"]
    if each.term is not None and not each.error:
        said.append(f"term {each.term:.4g}")
    return (
        each.name if each.name == each.type else f"{each.name} ({each.type})",
        "; ".join(each.binds) or NOTHING,
        count(each.parameters) if each.parameters else NOTHING,
        size(each.bytes) if each.bytes else NOTHING,
        time,
        "; ".join(said),
    )


def _kind(module: ModuleFound, kind: str) -> str:
    return f"dropout {module.rate:g}" if kind == "dropout" and module.rate is not None else kind


def collapsed(modules: Sequence[ModuleFound]) -> list[tuple[ModuleFound, str]]:
    """The tree with equal numbered neighbours as one: each row, and the path of the last like it.

    Of ``layer.0`` to ``layer.11`` the modules inside are shown once.
    """
    below: dict[str, list[ModuleFound]] = {}
    for each in modules:
        if each.path:
            below.setdefault(each.path.rpartition(".")[0], []).append(each)

    def signature(each: ModuleFound) -> object:
        own = (each.type, each.output, each.parameters, each.calls, each.kinds, each.rate)
        inside = [(c.path.rpartition(".")[2], signature(c)) for c in below.get(each.path, [])]
        return (own, tuple(inside))

    rows: list[tuple[ModuleFound, str]] = []

    def show(children: list[ModuleFound]) -> None:
        place = 0
        while place < len(children):
            first, end = children[place], place + 1
            if first.path.rpartition(".")[2].isdigit():
                while (
                    end < len(children)
                    and children[end].path.rpartition(".")[2].isdigit()
                    and signature(children[end]) == signature(first)
                ):
                    end += 1
            last = children[end - 1].path if end - place > 1 else ""
            rows.append((first, last))
            show(below.get(first.path, []))
            place = end

    rows += [(each, "") for each in modules if not each.path]
    show(below.get("", []))
    return rows


def as_text(found: Inspection) -> str:
    """All of it, for a terminal or a log file without colours."""
    parts = ["\n".join(fill(line, 100, subsequent_indent="  ") for line in headline(found))]
    parts += [_text(each) for each in sections(found)]
    return "\n\n".join(parts)


def _text(section: Section) -> str:
    table = [[[head] for head in section.heads]]
    for path, *cells in section.rows:  # which is to be found by searching for it
        table.append([[path], *(wrap(cell, _WIDE) or [""] for cell in cells)])
    columns = zip(*table, strict=True)
    widths = [max(len(line) for cell in column for line in cell) for column in columns]
    lines = [
        "  ".join(line.ljust(width) for line, width in zip(parts, widths, strict=True)).rstrip()
        for row in table
        for parts in zip_longest(*row, fillvalue="")
    ]
    return "\n".join([section.title.upper(), *lines, fill(section.note, 100)])


def count(number: int) -> str:
    """A number of parameters in three digits."""
    for factor, unit in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return str(number)


def size(number: int) -> str:
    """Bytes in three digits."""
    for factor, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number} B"


def milliseconds(seconds: float) -> str:
    """A time in three digits."""
    return f"{1000 * seconds:.3g} ms"
