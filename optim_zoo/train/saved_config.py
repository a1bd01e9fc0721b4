"""Writes the config into a run folder, reads it back, and compares it with another one."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.train import config_file, config_values
from optim_zoo.train.config import Choice, Config
from optim_zoo.train.config_overrides import apply_overrides

CONFIG_FILE = "config.toml"  # the name of the config in a run folder
_UNCOMPARED = ("run.dir", "run.accept_changes", "output.sinks")


def to_toml(config: Config) -> str:
    """Returns the config as the text of a TOML file that `load` reads back.

    Values that are None, which TOML cannot express, are left out, as is what `sections` leaves out.
    """
    tree: dict[str, Any] = sections(config)
    tables = [tree.pop(f"stages.{index}", {}) for index in range(len(config.stages))]
    if any(tables) or len(tables) > 1:
        tree["stages"] = tables
    return tomli_w.dumps(tree)


def of_run(config: Config, folder: Path) -> str:
    """Returns the config to save in a run folder, which resumes the run from any directory.

    Relative paths become absolute: ``run.dir`` and what the task names in its ``paths``.
    """
    task = config_values.find_task(config.task.name)
    own = dict(config.task_sections)
    for name in task.paths:
        section, _, key = name.partition(".")
        own[section] = dataclasses.replace(
            own[section], **{key: _absolute(getattr(own[section], key))}
        )
    of_stages = [
        key for key, section in task.stage_keys.items() if f"{section}.{key}" in task.paths
    ]
    stages = tuple(
        dataclasses.replace(
            stage,
            table={k: _absolute(v) if k in of_stages else v for k, v in stage.table.items()},
        )
        for stage in config.stages
    )
    run = dataclasses.replace(config.run, dir=os.path.abspath(folder))
    return to_toml(dataclasses.replace(config, run=run, task_sections=own, stages=stages))


def _absolute(path: str) -> str:
    """Returns an absolute path; "", which means a default, is returned unchanged."""
    return os.path.abspath(os.path.expanduser(path)) if path else path


def folder_of(path: Path) -> Path | None:
    """Returns the run folder if ``path`` is its saved config, and None otherwise."""
    folder = path.absolute().parent
    is_saved = path.name == CONFIG_FILE and (folder / "metrics.jsonl").exists()
    return folder if is_saved else None


def load(path: Path, overrides: Sequence[str] = (), notes: list[str] | None = None) -> Config:
    """Returns a config that `to_toml` has written, also if an earlier version wrote it.

    Args:
      path: the file.
      overrides: see `config_file.load`.
      notes: see `config_file.load`.

    Raises:
      UserError: the file cannot be read, this version cannot run its config, or an override is not
        allowed.
    """
    tree = _updated(config_file.read(path))
    overridden, dropped = apply_overrides(tree, str(path), overrides)
    if notes is not None:
        notes += dropped
    return config_file.build(tree, str(path), overridden)


def _updated(tree: dict[str, Any]) -> dict[str, Any]:
    """Turns a config that an earlier version has saved into one of this version.

    It renames what has another name now, and sets each key that is missing, because the version did
    not have it yet, to the value that the version used.
    """
    second = tree.pop("second_stage", {})
    if second.get("steps", 0):
        tree["stages"] = [{}, second]
    if tree.get("task") == {"name": "bert_mlm"}:
        tree["task"] = {"name": "masked_language"}
    for key, value in _earlier_values(tree).items():
        section, _, name = key.partition(".")
        tree[section] = {name: value, **tree.get(section, {})}
    return tree


def _earlier_values(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the ``earlier_values`` of the task; none where `build` will report another error."""
    choice = tree.get("task", {})
    try:
        return config_values.find_task(choice.get("name")).earlier_values
    except (ArgumentTypeError, ArgumentValueError):
        return {}


def sections(config: Config) -> dict[str, dict[str, Any]]:
    """Returns the config by section, in the types of values that TOML has.

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
    """Returns the keys in which two configs differ, as ``key: before -> now``.

    Where the name of a constructor differs, arguments that only one of the two has are left out.
    The paths of the run folder and of the data are not compared; the task compares the data itself.
    """
    flat = [_flat(config) for config in (before, now)]
    uncompared = {*_UNCOMPARED, *config_values.find_task(now.task.name).paths}
    renamed = [
        section
        for section in ("optimizer", "schedule")
        if flat[0][f"{section}.name"] != flat[1][f"{section}.name"]
    ]
    return [
        f"{key}: {flat[0].get(key, 'unset')} -> {flat[1].get(key, 'unset')}"
        for key in {**flat[0], **flat[1]}
        if key not in uncompared
        and flat[0].get(key) != flat[1].get(key)
        and not (key.partition(".")[0] in renamed and (key in flat[0]) != (key in flat[1]))
    ]


def _flat(config: Config) -> dict[str, Any]:
    """Returns every value, keyed by ``section.key``.

    If there are several stages, each has all the values that it uses, not only those that its table
    sets.
    """
    tree = {name: own for name, own in sections(config).items() if not name.startswith("stages.")}
    if len(config.stages) > 1:
        tree |= {f"stages.{i}": _values(s.settings) for i, s in enumerate(config.stages)}
    flat: dict[str, Any] = {"stages": len(config.stages)}
    return flat | {f"{name}.{k}": v for name, section in tree.items() for k, v in section.items()}
