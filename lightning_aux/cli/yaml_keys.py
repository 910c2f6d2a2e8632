"""YAML as the command reads it: a bare `on:` is the name of an argument, not the boolean true."""

from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

PARSER_MODE = "lightning_aux_yaml"


def with_names_as_keys(value: Any) -> Any:
    """The nest with the keys that YAML 1.1 takes for booleans as the words that were written.

    Args:
        value: What a YAML loader returned.

    Returns:
        The same with `True` and `False` as keys replaced by `"on"` and `"off"`; values stay.
    """
    if isinstance(value, dict):
        names = {True: "on", False: "off"}
        return {
            names[key] if isinstance(key, bool) else key: with_names_as_keys(entry)
            for key, entry in value.items()
        }
    return [with_names_as_keys(entry) for entry in value] if isinstance(value, list) else value


def _load(text: str) -> Any:
    return with_names_as_keys(get_loader("yaml")(text))


set_loader(PARSER_MODE, _load, exceptions=(yaml.YAMLError,))
