"""The config of a run as its folder keeps it: written, read back and compared."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from optim_zoo.train import config_file
from optim_zoo.train.config import Choice, Config

_UNCOMPARED = ("run.dir", "run.accept_changes", "output.sinks")


def to_toml(config: Config) -> str:
    """Returns the config as a TOML file that `load` reads back.

    What is None, which TOML cannot express, is left out, and so is what `sections` leaves out.
    """
    tree: dict[str, Any] = sections(config)
    tables = [tree.pop(f"stages.{index}", {}) for index in range(len(config.stages))]
    if any(tables) or len(tables) > 1:
        tree["stages"] = tables
    return tomli_w.dumps(tree)


def load(path: Path) -> Config:
    """Returns a config that `to_toml` has written, also if an earlier version wrote it.

    Raises:
      UserError: the file cannot be read, or this version cannot run its config.
    """
    return config_file.build(_updated(config_file.read(path)), str(path))


def _updated(tree: dict[str, Any]) -> dict[str, Any]:
    """A config of version 0.1 as it is written since 0.2: [[stages]] instead of [second_stage]."""
    second = tree.pop("second_stage", {})
    if second.get("steps", 0):
        tree["stages"] = [{}, second]
    if tree.get("task") == {"name": "bert_mlm"}:
        tree["task"] = {"name": "masked_language"}
    return tree


def sections(config: Config) -> dict[str, dict[str, Any]]:
    """Returns the config by section, in values that TOML has.

    A ``[[stages]]`` table is the section ``stages.0`` or higher; a stage that sets nothing has
    none. [distributed] is left out, because a run may be resumed on other processes.
    """
    tree: dict[str, dict[str, Any]] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "distributed":
            continue
        if field.name == "task_sections":
            tree |= {name: _values(dataclasses.asdict(own)) for name, own in value.items()}
        elif field.name == "stages":
            tree |= {f"stages.{i}": _values(s.table) for i, s in enumerate(value) if s.table}
        elif isinstance(value, Choice):
            tree[field.name] = _values({"name": value.name, **value.arguments})
        else:
            tree[field.name] = _values(dataclasses.asdict(value))
    return tree


def _values(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
        if value is not None
    }


def differences(before: Config, now: Config) -> list[str]:
    """Returns the keys in which two configs differ, as ``key: before -> now``."""
    flat = [_flat(config) for config in (before, now)]
    keys = [key for key in {**flat[0], **flat[1]} if key not in _UNCOMPARED]
    return [
        f"{key}: {flat[0].get(key, 'unset')} -> {flat[1].get(key, 'unset')}"
        for key in keys
        if flat[0].get(key) != flat[1].get(key)
    ]


def _flat(config: Config) -> dict[str, Any]:
    """Every value by ``section.key``; several stages by the values in use, however they are set."""
    tree = {name: own for name, own in sections(config).items() if not name.startswith("stages.")}
    if len(config.stages) > 1:
        tree |= {f"stages.{i}": _values(s.settings) for i, s in enumerate(config.stages)}
    flat: dict[str, Any] = {"stages": len(config.stages)}
    return flat | {f"{name}.{k}": v for name, section in tree.items() for k, v in section.items()}
