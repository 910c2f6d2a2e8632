"""YAML files that people write: read, their keys checked, and near names suggested."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_aux.cli.yaml_keys import with_names_as_keys
from lightning_aux.comparison import ComparisonError


def load_mapping(path: Path, role: str) -> dict[str, Any]:
    """The keys and values of a file; `role` says in an error what the file is for."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")])
        raise ComparisonError(f"{role}: there is no file {path}.{_did_you_mean(near)}")
    try:
        content = with_names_as_keys(yaml.load(path.read_text(), _Loader))
    except yaml.YAMLError as error:
        raise ComparisonError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ComparisonError(f"{path}: expected keys and values, got {type(content).__name__}.")
    return content


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would forget the first."""

    def compose_mapping_node(self, anchor: dict[str, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                first = seen.setdefault((key.tag, key.value), key)
                if first is not key:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key '{key.value}' is there already, in line "
                        f"{first.start_mark.line + 1}",
                        problem_mark=key.start_mark,
                    )
        return node


def check_keys(content: Mapping[Any, Any], known: Mapping[str, type], where: str) -> None:
    """Refuse keys that are not known, and values of another type than theirs."""
    for key, value in content.items():
        if key not in known:
            raise ComparisonError(
                f"{where}: unknown key '{key}'.{guess(key, known)} Keys: {', '.join(known)}."
            )
        if value is not None and not isinstance(value, known[key]):
            raise ComparisonError(f"{where}: '{key}' is a {known[key].__name__}, not {value!r}.")


def guess(name: Any, known: Iterable[str]) -> str:
    """A question about the name that is nearest, or nothing."""
    return _did_you_mean(difflib.get_close_matches(str(name), list(known)))


def _did_you_mean(near: list[str]) -> str:
    return f" Did you mean '{near[0]}'?" if near else ""
