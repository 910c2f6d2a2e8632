"""The file that `lightning-aux compare` reads: which variants, which seeds, which metric.

Everything in it is checked here, every variant's config included, before anything trains.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import Callback

from lightning_aux.cli.trainer_cli import AuxCLI, root_cause
from lightning_aux.cli.yaml_keys import with_names_as_keys
from lightning_aux.comparison import BASELINE, Comparison, ComparisonError, Measure, Variant

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# Arguments of `fit` itself that a printed config contains; a comparison trains from scratch.
_FIT_ARGUMENTS = ("ckpt_path", "weights_only", "wandb", "seed_everything")
# What a run shows or where it writes is decided by the comparison.
_OWN_DISPLAY = ("ProgressBar", "ModelSummary")


_KEYS = {
    "title": str,
    "description": str,
    "base": str,
    "seeds": list,
    "metric": str,
    "mode": str,
    "unit": str,
    "also": dict,
    "curve": str,
    "baseline": str,
    "set": dict,
    "variants": dict,
}
_MEASURE_KEYS = {"mode": str, "unit": str}
_VARIANT_KEYS = {"callbacks": list, "set": dict}


def read_comparison(
    path: Path,
    seeds: Iterable[int] | None = None,
    epochs: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Comparison:
    """Read and check a compare file.

    Args:
        path: The YAML file.
        seeds: Instead of the file's seeds.
        epochs: Instead of the config's `trainer.max_epochs`.
        overrides: Values by dotted key, over those that the file sets for all variants.

    Returns:
        The comparison, with a parsed config per variant.

    Raises:
        ComparisonError: When a file is missing, a key or a name is unknown, a value has the wrong
            type, or the config of a variant does not parse.
    """
    content = _load_mapping(path, "compare file")
    _check_keys(content, _KEYS, str(path))
    for key in ("base", "metric"):
        if key not in content:
            raise ComparisonError(f"{path}: the key '{key}' is missing.")
    decides = _measure(content["metric"], content, str(path))
    also = _also(content.get("also") or {}, decides, path)

    base_path = path.parent / content["base"]
    base = _without_fit_arguments(_load_mapping(base_path, f"base of {path}"), base_path)
    common = {**(content.get("set") or {}), **(overrides or {})}
    if epochs is not None:
        common["trainer.max_epochs"] = epochs
    written: dict[str, Any] = content.get("variants") or {}
    variants = {BASELINE: _variant(BASELINE, {}, base, common, path)}
    for name, changes in written.items():
        variants[name] = _variant(name, changes or {}, base, common, path)

    reference = content.get("baseline", BASELINE)
    if reference not in variants:
        raise ComparisonError(
            f"{path}: baseline: there is no variant '{reference}'.{_guess(reference, variants)} "
            f"'{BASELINE}' is the plain base."
        )
    return Comparison(
        title=content.get("title", path.stem.replace("_", " ")),
        description=content.get("description", ""),
        decides=decides,
        also=also,
        curve=content.get("curve"),
        reference=reference,
        seeds=_seeds(content.get("seeds", [0, 1, 2]) if seeds is None else list(seeds), path),
        overrides=common,
        variants=variants,
    )


def _measure(metric: str, content: Mapping[str, Any], where: str) -> Measure:
    mode: Any = content.get("mode") or "max"
    if mode not in ("max", "min"):
        raise ComparisonError(f"{where}: mode is 'max' or 'min', not {mode!r}.")
    return Measure(metric, mode, content.get("unit") or "")


def _also(written: dict[Any, Any], decides: Measure, path: Path) -> tuple[Measure, ...]:
    measures = []
    for metric, content in written.items():
        where = f"{path}: also: '{metric}'"
        if metric == decides.metric:
            raise ComparisonError(f"{where} is the metric that decides; leave it out here.")
        if not isinstance(content, dict | None):
            raise ComparisonError(f"{where}: expected 'mode' and 'unit', got {content!r}.")
        _check_keys(content or {}, _MEASURE_KEYS, where)
        measures.append(_measure(str(metric), content or {}, where))
    return tuple(measures)


def _variant(
    name: Any, changes: Any, base: dict[str, Any], overrides: dict[str, Any], path: Path
) -> Variant:
    where = f"{path}: variant '{name}'"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ComparisonError(f"{where}: a name has letters, digits, '_', '.' and '-' only.")
    if name == BASELINE and changes:
        raise ComparisonError(f"{where}: this name is the plain base itself; choose another.")
    if not isinstance(changes, dict):
        raise ComparisonError(f"{where}: expected 'callbacks' and 'set', got {changes!r}.")
    _check_keys(changes, _VARIANT_KEYS, where)
    config = copy.deepcopy(base)
    for key, value in {**overrides, **(changes.get("set") or {})}.items():
        _set(config, key, value, where)
    added = list(changes.get("callbacks") or [])
    trainer = config.setdefault("trainer", {})
    trainer["callbacks"] = _training_callbacks(trainer.get("callbacks")) + added
    trainer.update(logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.setdefault("devices", 1)
    if not any("Checkpoint" in _class_name(entry) for entry in trainer["callbacks"]):
        trainer.setdefault("enable_checkpointing", False)
    variant = Variant(name, config, _resolve(config, where), changes)
    for entry in added:
        _check_callback(entry, where)
    return variant


def _resolve(config: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        parsed = _Unbuilt(config)
    except (ArgumentError, ModuleNotFoundError, ImportError) as error:
        raise ComparisonError(f"{where}: {error}") from error
    resolved = yaml.safe_load(parsed.parser.dump(parsed.config))
    assert isinstance(resolved, dict)
    return {key: value for key, value in resolved.items() if key not in _FIT_ARGUMENTS}


def _check_callback(entry: Any, where: str) -> None:
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


def _training_callbacks(callbacks: Any) -> list[Any]:
    entries = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    return [entry for entry in entries if not _class_name(entry).endswith(_OWN_DISPLAY)]


def _class_name(entry: Any) -> str:
    return str(entry.get("class_path") if isinstance(entry, dict) else entry)


def _set(config: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set the dotted `key`, making the mappings on its way that are not there yet."""
    *parents, last = str(key).split(".")
    inner: Any = config
    for depth, parent in enumerate(parents):
        if inner.get(parent) is None:
            inner[parent] = {}
        inner = inner[parent]
        if not isinstance(inner, dict):
            done = ".".join(parents[: depth + 1])
            raise ComparisonError(f"{where}: set: '{key}': '{done}' is not a mapping.")
    inner[last] = value


def _without_fit_arguments(base: dict[str, Any], path: Path) -> dict[str, Any]:
    if base.get("ckpt_path"):
        raise ComparisonError(f"{path}: a comparison trains from scratch: remove 'ckpt_path'.")
    return {key: value for key, value in base.items() if key not in _FIT_ARGUMENTS}


def _seeds(values: list[Any], path: Path) -> tuple[int, ...]:
    good = all(isinstance(seed, int) and seed >= 0 for seed in values)
    if not values or not good or len(set(values)) < len(values):
        raise ComparisonError(f"{path}: seeds are different integers from 0 up, not {values}.")
    return tuple(values)


def _load_mapping(path: Path, role: str) -> dict[str, Any]:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")])
        raise ComparisonError(f"{role}: there is no file {path}.{_did_you_mean(near)}")
    try:
        content = with_names_as_keys(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise ComparisonError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ComparisonError(f"{path}: expected keys and values, got {type(content).__name__}.")
    return content


def _check_keys(content: Mapping[Any, Any], known: Mapping[str, type], where: str) -> None:
    for key, value in content.items():
        if key not in known:
            raise ComparisonError(
                f"{where}: unknown key '{key}'.{_guess(key, known)} Keys: {', '.join(known)}."
            )
        if value is not None and not isinstance(value, known[key]):
            raise ComparisonError(f"{where}: '{key}' is a {known[key].__name__}, not {value!r}.")


def _guess(name: Any, known: Iterable[str]) -> str:
    return _did_you_mean(difflib.get_close_matches(str(name), list(known)))


def _did_you_mean(near: list[str]) -> str:
    return f" Did you mean '{near[0]}'?" if near else ""
