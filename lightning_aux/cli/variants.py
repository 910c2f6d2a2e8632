"""What a compare file says about its variants, as one whole fit config for each of them.

From below: the base, the values of a recipe, what is set for all variants, what the variant sets,
a point of its grid. Callbacks add up: those of the base, of the recipe, of the variant.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import Callback

from lightning_aux.cli.trainer_cli import AuxCLI, root_cause
from lightning_aux.cli.yaml_files import check_keys, guess, load_mapping
from lightning_aux.comparison import BASELINE, ComparisonError, Variant

_KEYS = {"recipe": str, "callbacks": list, "set": dict, "grid": dict}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.=+-]+")
_LONGEST_VALUE = 40
_LONGEST_NAME = 200  # most file systems allow 255 bytes
# Arguments of `fit` itself that a printed config contains; a comparison trains from scratch.
_FIT_ARGUMENTS = ("ckpt_path", "weights_only", "wandb", "seed_everything")
# What a run shows or where it writes is decided by the comparison.
_OWN_DISPLAY = ("ProgressBar", "ModelSummary")


@dataclass(frozen=True)
class Draft:
    """A variant as it is written, or one point of its grid, before its config is made.

    Attributes:
        name: Its name.
        written: The name in the compare file, of which a grid makes several.
        changes: The keys of the file, the grid with one value for each key.
    """

    name: str
    written: str
    changes: dict[str, Any]


def drafts(written: Mapping[Any, Any], path: Path) -> list[Draft]:
    """All variants of the file at `path`, the plain base first.

    Raises:
        ComparisonError: When a name, a key or a grid is not one.
    """
    found = [Draft(BASELINE, BASELINE, {})]
    for name, changes in written.items():
        where = _where(path, name)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ComparisonError(f"{where}: a name has letters, digits, '_', '.' and '-' only.")
        if name == BASELINE:
            if changes:
                raise ComparisonError(
                    f"{where}: this name is the plain base itself; choose another."
                )
            continue
        changes = {} if changes is None else changes
        if not isinstance(changes, dict):
            raise ComparisonError(f"{where}: expected {', '.join(_KEYS)}, got {changes!r}.")
        check_keys(changes, _KEYS, where)
        found += [
            Draft("-".join([name, *labels]), name, {**changes, "grid": point} if point else changes)
            for labels, point in _points(changes.get("grid") or {}, where)
        ]
    for draft in found:
        if len(draft.name) > _LONGEST_NAME:
            raise ComparisonError(
                f"{_where(path, draft.written)}: a folder cannot be named '{draft.name}': "
                "use fewer keys or shorter values in one grid."
            )
    return found


def chosen(found: Iterable[Draft], patterns: Iterable[str], reference: str) -> list[Draft]:
    """The reference and the variants that a pattern names, by their own or their written name.

    Raises:
        ComparisonError: When a pattern names nothing.
    """
    found, patterns = list(found), list(patterns)
    for pattern in patterns:
        if not any(_matches(draft, pattern) for draft in found):
            names = [draft.name for draft in found]
            raise ComparisonError(
                f"--only: no variant is named '{pattern}'.{guess(pattern, names)} "
                f"Variants: {', '.join(names)}."
            )
    return [
        draft
        for draft in found
        if draft.name == reference or any(_matches(draft, pattern) for pattern in patterns)
    ]


def _matches(draft: Draft, pattern: str) -> bool:
    return fnmatchcase(draft.name, pattern) or fnmatchcase(draft.written, pattern)


def _points(grid: dict[Any, Any], where: str) -> list[tuple[list[str], dict[str, Any]]]:
    """Every combination of the values, with what tells it apart in a name."""
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ComparisonError(f"{where}: grid: '{key}' is a list of values, not {values!r}.")
    keys = [str(key) for key in grid]
    parts = [
        [_NOT_IN_NAMES.sub("_", part) for part in key.split(".") if part != "init_args"] or [key]
        for key in keys
    ]
    last = [each[-1] for each in parts]
    labels = [each[-1] if last.count(each[-1]) == 1 else ".".join(each) for each in parts]
    choices = [
        [(f"{label}={text}", value) for text, value in zip(_texts(values), values, strict=True)]
        for label, values in zip(labels, grid.values(), strict=True)
    ]
    return [
        ([text for text, _ in point], dict(zip(keys, (value for _, value in point), strict=True)))
        for point in itertools.product(*choices)
    ]


def _texts(values: list[Any]) -> list[str]:
    """The values as parts of a name, numbered where two would read the same."""
    texts = [_text(value) for value in values]
    alike = [text.casefold() for text in texts]  # as some file systems see them
    return [
        text if alike.count(text.casefold()) == 1 else f"{text}.{position}"
        for position, text in enumerate(texts, start=1)
    ]


def _text(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        value = _class_name(value)
    written = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)
    text = _NOT_IN_NAMES.sub("_", written.replace("...", "").strip()).strip("_")
    return text[:_LONGEST_VALUE] or "empty"


def make_variant(
    draft: Draft, base: dict[str, Any], common: Mapping[str, Any], path: Path
) -> Variant:
    """The variant with its config, parsed.

    Args:
        draft: What is written about it.
        base: The base config, as `load_config` returns it.
        common: What is set for all variants, by dotted key.
        path: The compare file.

    Raises:
        ComparisonError: When the recipe cannot be read, a key names nothing, the config does not
            parse, or a callback refuses its arguments.
    """
    where = _where(path, draft.name)
    config, added = copy.deepcopy(base), []
    if recipe := draft.changes.get("recipe"):
        recipe_config = load_config(path.parent / recipe, f"recipe of {where}")
        added = _training_callbacks(recipe_config.get("trainer", {}).pop("callbacks", None))
        config = _laid_over(config, recipe_config)
    own = {**(draft.changes.get("set") or {}), **(draft.changes.get("grid") or {})}
    values = {str(key): value for key, value in {**common, **own}.items()}
    of_callbacks = {key: value for key, value in values.items() if key[:1].isupper()}
    for key, value in values.items():
        if key not in of_callbacks:
            _set(config, key, value, where)

    if not isinstance(trainer := config.setdefault("trainer", {}), dict):
        raise ComparisonError(f"{where}: 'trainer' is a mapping, not {trainer!r}.")
    of_base = _training_callbacks(trainer.get("callbacks"))
    added = [entry for entry in added if entry not in of_base]
    added += [_as_mapping(entry) for entry in draft.changes.get("callbacks") or []]
    callbacks = copy.deepcopy(of_base + added)
    for key, value in of_callbacks.items():
        _set_argument(callbacks, key, value, where)
    trainer["callbacks"] = callbacks
    trainer.update(logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.setdefault("devices", 1)
    if not any("Checkpoint" in _class_name(entry) for entry in callbacks):
        trainer.setdefault("enable_checkpointing", False)
    variant = Variant(draft.name, config, _resolve(config, where), draft.changes)
    for entry in callbacks:
        if entry not in of_base:
            _check_callback(entry, where)
    return variant


def load_config(path: Path, role: str) -> dict[str, Any]:
    """A fit config without the arguments of `fit` itself.

    Raises:
        ComparisonError: When it cannot be read, or continues a checkpoint.
    """
    content = load_mapping(path, role)
    if content.get("ckpt_path"):
        raise ComparisonError(f"{path}: a comparison trains from scratch: remove 'ckpt_path'.")
    return {key: value for key, value in content.items() if key not in _FIT_ARGUMENTS}


def _laid_over(below: Any, above: Any) -> Any:
    """Mappings are merged key by key, other values replaced, as are objects of another class."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return copy.deepcopy(above)
    if "class_path" in above and above["class_path"] != below.get("class_path"):
        return copy.deepcopy(above)
    merged = {key: _laid_over(below.get(key), value) for key, value in above.items()}
    return {**below, **merged}


def _set(config: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set the dotted `key`, making the mappings on its way that are not there yet."""
    *parents, last = key.split(".")
    inner: Any = config
    for depth, parent in enumerate(parents):
        if inner.get(parent) is None:
            inner[parent] = {}
        inner = inner[parent]
        if not isinstance(inner, dict):
            done = ".".join(parents[: depth + 1])
            raise ComparisonError(f"{where}: '{key}': '{done}' is not a mapping.")
    inner[last] = copy.deepcopy(value)


def _set_argument(callbacks: list[dict[str, Any]], key: str, value: Any, where: str) -> None:
    """Set an argument of the callback whose class the key begins with."""
    name, _, argument = key.partition(".")
    names = [_class_name(entry) for entry in callbacks]
    if not argument:
        raise ComparisonError(f"{where}: '{key}': expected an argument too: '{name}.weight'.")
    if names.count(name) != 1:
        count = f"{names.count(name)} callbacks are" if name in names else "no callback is"
        near = "" if name in names else guess(name, names)
        raise ComparisonError(
            f"{where}: '{key}': {count} of the class '{name}'.{near} "
            f"Callbacks: {', '.join(names) or 'none'}."
        )
    entry = callbacks[names.index(name)]
    entry["init_args"] = dict(entry.get("init_args") or {})
    _set(entry["init_args"], argument, value, where)


def _training_callbacks(callbacks: Any) -> list[dict[str, Any]]:
    entries = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    mappings = map(_as_mapping, entries)
    return [entry for entry in mappings if not _class_name(entry).endswith(_OWN_DISPLAY)]


def _as_mapping(entry: Any) -> dict[str, Any]:
    return entry if isinstance(entry, dict) else {"class_path": str(entry)}


def _class_name(entry: Mapping[str, Any]) -> str:
    return str(entry.get("class_path")).rpartition(".")[2]


def _resolve(config: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        parsed = _Unbuilt(config)
    except (ArgumentError, ModuleNotFoundError, ImportError) as error:
        raise ComparisonError(f"{where}: {error}") from error
    resolved = yaml.safe_load(parsed.parser.dump(parsed.config))
    assert isinstance(resolved, dict)
    return {key: value for key, value in resolved.items() if key not in _FIT_ARGUMENTS}


def _check_callback(entry: dict[str, Any], where: str) -> None:
    """Make the callback once, so that a value it refuses is known now and not in its first run."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)
    try:
        parser.instantiate(parser.parse_object({"callback": entry}))
    except Exception as error:
        raise ComparisonError(f"{where}: {_class_name(entry)}: {root_cause(error)}") from error


class _Unbuilt(AuxCLI):
    """Parses a config, which imports its classes and checks their arguments, and stops there."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(
            args={**copy.deepcopy(config), "seed_everything": False}, run=False, exit_on_error=False
        )

    def instantiate_classes(self) -> None:
        """Make nothing."""


def _where(path: Path, name: Any) -> str:
    return f"{path}: variant '{name}'"
