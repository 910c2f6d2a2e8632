"""The file that `lightning-aux compare` reads: which variants, which seeds, which metric.

Everything in it is checked here, every variant's config included, before anything trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_aux.cli.variants import chosen, drafts, load_config, make_variant
from lightning_aux.cli.yaml_files import check_keys, guess, load_mapping
from lightning_aux.comparison import BASELINE, Comparison, ComparisonError, Measure

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


def read_comparison(
    path: Path,
    seeds: Iterable[int] | None = None,
    epochs: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    only: Iterable[str] = (),
) -> Comparison:
    """Read and check a compare file.

    Args:
        path: The YAML file.
        seeds: Instead of the file's seeds.
        epochs: Instead of the config's `trainer.max_epochs`.
        overrides: Values by dotted key, over those that the file sets for all variants.
        only: Patterns for names of variants; the others are left out, but for the reference.

    Returns:
        The comparison, with a parsed config per variant.

    Raises:
        ComparisonError: When a file is missing, a key or a name is unknown, a value has the wrong
            type, or the config of a variant does not parse.
    """
    content = load_mapping(path, "compare file")
    check_keys(content, _KEYS, str(path))
    for key in ("base", "metric"):
        if content.get(key) is None:
            raise ComparisonError(f"{path}: the key '{key}' is missing.")
    decides = _measure(content["metric"], content, str(path))
    also = _also(content.get("also") or {}, decides, path)

    base = load_config(path.parent / content["base"], f"base of {path}")
    common = {**(content.get("set") or {}), **(overrides or {})}
    if epochs is not None:
        common["trainer.max_epochs"] = epochs
    found = drafts(content.get("variants") or {}, path)
    names = [draft.name for draft in found]
    reference = content.get("baseline") or BASELINE
    if reference not in names:
        raise ComparisonError(
            f"{path}: baseline: there is no variant '{reference}'.{guess(reference, names)} "
            f"'{BASELINE}' is the plain base."
        )
    if only := list(only):
        found = chosen(found, only, reference)
    return Comparison(
        title=content.get("title") or path.stem.replace("_", " "),
        description=content.get("description") or "",
        decides=decides,
        also=also,
        curve=content.get("curve"),
        reference=reference,
        seeds=_seeds(content.get("seeds", [0, 1, 2]) if seeds is None else list(seeds), path),
        overrides=common,
        variants={draft.name: make_variant(draft, base, common, path) for draft in found},
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
        check_keys(content or {}, _MEASURE_KEYS, where)
        measures.append(_measure(str(metric), content or {}, where))
    return tuple(measures)


def _seeds(values: list[Any] | None, path: Path) -> tuple[int, ...]:
    good = values and all(type(seed) is int and seed >= 0 for seed in values)  # True is an int too
    if not values or not good or len(set(values)) < len(values):
        raise ComparisonError(f"{path}: seeds are different integers from 0 up, not {values}.")
    return tuple(values)
