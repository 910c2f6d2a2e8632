"""Where things are in the user's model and batch: ``Taps``, module paths and key paths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn

from lightning_aux.engine.errors import AuxiliaryError, near_matches

if TYPE_CHECKING:
    from lightning_aux.engine.step import Pass

    Tap: TypeAlias = str | Callable[[Pass], Any]
else:  # what jsonargparse checks values of a config against: a name it cannot find is any value
    Tap = str | Callable

__all__ = [
    "Locations",
    "Tap",
    "describe",
    "find_logits",
    "find_target",
    "is_glob",
    "key_path",
    "matches_any",
    "modules_at",
    "plain_path",
]

LOGITS_KEYS = ("logits", "prediction_logits", "preds", "y_hat", "output")
TARGET_KEYS = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True)
class Locations:
    """The common taps as plain values; ``None`` means the default applies."""

    logits: Tap | None = None
    target: Tap | None = None
    features: Tap | None = None
    input: Tap | None = None
    mask: Tap | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None

    def over(self, other: Locations) -> Locations:
        """These locations, with the gaps filled from ``other``."""
        return Locations(
            logits=self.logits or other.logits,
            target=self.target or other.target,
            features=self.features or other.features,
            input=self.input or other.input,
            mask=self.mask or other.mask,
            forward=self.forward or other.forward,
        )

    def module_paths(self) -> Iterator[str]:
        """The module paths named here (``target`` and ``mask`` are paths into the batch)."""
        for tap in (self.logits, self.features, self.input):
            if isinstance(tap, str):
                yield tap


def is_glob(path: str) -> bool:
    """Whether ``path`` may stand for more than one module."""
    return any(character in path for character in "*?[")


def modules_at(root: nn.Module, path: str, asked_by: str) -> dict[str, nn.Module]:
    """The submodules of ``root`` that ``path`` (a module path or a glob) names.

    A compiled submodule is reached by the path it has without compilation.

    Raises:
        AuxiliaryError: no module has that path; the message lists near matches.
    """
    named: dict[str, nn.Module] = {}
    for name, module in root.named_modules():
        named.setdefault(plain_path(name), module)
    named.pop("", None)
    if path in named:
        return {path: named[path]}
    found = {name: module for name, module in named.items() if fnmatchcase(name, path)}
    if is_glob(path) and found:
        return found
    raise AuxiliaryError(
        f"{asked_by}: no module of {type(root).__name__} has the path {path!r}. "
        f"{near_matches(path, named)}"
    )


def plain_path(name: str) -> str:
    """A module's name without the ``_orig_mod`` that ``torch.compile`` puts in between."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def matches_any(name: str, globs: Iterable[str]) -> bool:
    """Whether the plain name of a parameter matches one of ``globs``."""
    return any(fnmatchcase(name, plain_path(glob)) for glob in globs)


def key_path(nested: Any, path: str, what: str) -> Any:
    """Follow a dotted path such as ``"1"``, ``"labels"`` or ``"graph.y"`` into a nested batch.

    Each part is a key of a mapping, a position in a sequence, or the name of an attribute.
    """
    here = nested
    for position, part in enumerate(path.split(".")):
        if isinstance(here, Mapping) and part in here:
            here = here[part]
        elif isinstance(here, Sequence) and not isinstance(here, str) and _is_position(part, here):
            here = here[int(part)]
        elif not isinstance(here, Mapping | Tensor) and hasattr(here, part):
            here = getattr(here, part)
        else:
            reached = ".".join(path.split(".")[:position]) or "the batch"
            raise AuxiliaryError(
                f"{what}: the key path {path!r} ends at {reached}, which is {describe(here)}. "
                f"Name a path that exists there."
            )
    return here


def find_logits(returned: Any) -> tuple[Any, str] | None:
    """The logits in what a model returned and how they were found, or ``None``."""
    if isinstance(returned, Tensor):
        return returned, ""
    if isinstance(returned, Mapping):
        for key in LOGITS_KEYS:
            if isinstance(returned.get(key), Tensor):
                return returned[key], f"[{key!r}]"
        return None
    if isinstance(getattr(returned, "logits", None), Tensor):
        return returned.logits, ".logits"
    if isinstance(returned, Sequence) and returned and isinstance(returned[0], Tensor):
        return returned[0], "[0]"
    return None


def find_target(batch: Any) -> tuple[Any, str] | None:
    """The labels in a batch and how they were found, or ``None``."""
    if isinstance(batch, Mapping):
        for key in TARGET_KEYS:
            if key in batch:
                return batch[key], f"batch[{key!r}]"
        return None
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return (batch[1], "batch[1]") if len(batch) >= 2 else None
    if isinstance(batch, Tensor):
        return None
    for key in TARGET_KEYS:
        if isinstance(getattr(batch, key, None), Tensor):
            return getattr(batch, key), f"batch.{key}"
    return None


def example_of_target(batch: Any) -> str:
    """A key path for a message: the first key that is called like a target, or one of the usual."""
    if isinstance(batch, Mapping):
        names = TARGET_KEYS[:-1]
        for key in batch:
            if isinstance(key, str) and any(name in key.lower() for name in names):
                return key
        return TARGET_KEYS[0]
    return "1" if isinstance(batch, Sequence | Tensor) else TARGET_KEYS[0]


def _is_position(part: str, sequence: Sequence[Any]) -> bool:
    return part.lstrip("-").isdigit() and -len(sequence) <= int(part) < len(sequence)


def describe(value: Any) -> str:
    """A value in a few words for a message: its type, keys, length or shape."""
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {sorted(map(str, value))}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        kinds = ", ".join(type(entry).__name__ for entry in value)
        return f"a {type(value).__name__} of {len(value)} ({kinds})"
    return f"a {type(value).__name__}"
