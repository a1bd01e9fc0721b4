"""Config keys and values as text: ``section.key=value`` overrides, and nested tables flattened."""

import json
import math
import tomllib
from collections.abc import Mapping
from typing import Any

UNSET = "unset"  # as on the command line: removes a key, so that its default applies
_CONSTRUCTORS = ("optimizer", "schedule")  # sections whose strings need quotes


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested tables, keyed by ``section.key``.

    Args:
      tree: nested tables.
      prefix: the key of ``tree`` itself, followed by a dot.
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def override(key: str, value: Any) -> str:
    """Returns the override that sets a key of a config to a value, such as ``train.steps=100``."""
    section, _, name = key.partition(".")
    if isinstance(value, str) and (
        value == UNSET or name == "name" or section not in _CONSTRUCTORS
    ):
        return f"{key}={value}"
    return f"{key}={text(value)}"


def text(value: Any) -> str:
    """Returns a value as TOML writes it, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(text, value))}]"
    if isinstance(value, dict):
        pairs = (f"{json.dumps(key)} = {text(item)}" for key, item in value.items())
        return f"{{{', '.join(pairs)}}}"
    return repr(value)


def parsed(value: str) -> Any:
    """Returns the value of a text on the command line, which is TOML or a bare string."""
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value
