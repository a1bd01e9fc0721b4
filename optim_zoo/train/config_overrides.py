"""Overrides from the command line: ``section.key=value`` applied to the tree of a TOML file.

A name that is overridden (``optimizer.name``, ``schedule.name``, ``task.name``) may leave the file
with keys that only the replaced name has. These are dropped, each with a note, so that one file can
be used to compare optimizers.
"""

import dataclasses
import tomllib
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from optim_zoo import ranges
from optim_zoo.errors import ArgumentError, UserError
from optim_zoo.train import config_values
from optim_zoo.train.config import Choice
from optim_zoo.train.config_values import SECTIONS, Sources, find_task, user_errors, user_errors_in
from optim_zoo.train.tasks.base import Task

UNSET = "unset"  # `key=unset` removes the key, so that its default applies
_NAMED = ("task", "optimizer", "schedule")  # the sections whose name decides which keys are known


class Override(NamedTuple):
    """One argument of the command line."""

    section: str  # "stages.1" for a stage
    key: str
    value: str  # not yet parsed
    text: str  # the whole argument
    origin: str  # "command line"

    @property
    def source(self) -> str:
        """The name of this override in messages."""
        return f"{self.origin} ({self.text})"


def apply_overrides(
    tree: dict[str, Any], file: str, arguments: Sequence[str], origin: str = "command line"
) -> tuple[Mapping[tuple[str, str], str], list[str]]:
    """Applies overrides to the tree of a config file, in place.

    Args:
      tree: section -> key -> value.
      file: the name of the file, for messages.
      arguments: such as ``train.steps=100``. The last override of a key counts.
      origin: where the arguments come from, for messages.

    Returns:
      ``(section, key)`` of every override -> where it comes from; and a sentence about each key
      of the file that was dropped.

    Raises:
      UserError: an override is malformed, or its section does not exist.
    """
    overrides = [_split(argument, origin) for argument in arguments]
    before = _names(tree)
    named = {(o.section, o.key): o for o in overrides if o.key == "name" and o.section in _NAMED}
    sources = Sources(file, {place: override.source for place, override in named.items()})
    chosen = {section: _chosen(named.get((section, "name")), before[section]) for section in _NAMED}
    with user_errors_in("task", sources):
        task = find_task(chosen["task"])
    removed = [override for override in overrides if not _apply_one(tree, task, override)]
    overridden = {(o.section, o.key.partition(".")[0]): o.source for o in overrides}
    known = _known_keys(chosen)
    for override in removed:
        _check_removed(override, known)
    notes = _drop(tree, file, overridden, _known_keys(before), known, chosen) if named else []
    return overridden, notes


def _split(argument: str, origin: str) -> Override:
    """Returns the parts of an override; the section of a stage is ``stages.1``, for example."""
    name, equals, value = argument.partition("=")
    section, dot, key = name.strip().partition(".")
    if section == "stages":
        index, dot, key = key.partition(".")
        if not (index.isdecimal() and len(index) < 4):
            dot = ""
        section = f"stages.{index}"
    if not (equals and dot and section and key):
        example = "stages.1.steps=100" if section.startswith("stages") else "train.steps=100"
        raise UserError(f"expected section.key=value, got {argument!r}; for example {example}")
    return Override(section, key, value.strip(), argument, origin)


def _names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the names of task, optimizer and schedule in a tree, or None where one is missing."""
    sections = {section: tree.get(section) for section in _NAMED}
    return {
        section: values.get("name") if isinstance(values, dict) else None
        for section, values in sections.items()
    }


def _chosen(override: Override | None, name: Any) -> Any:
    """Returns the name after the override, if there is one."""
    if override is None:
        return name
    return None if override.value == UNSET else _unquoted(override.value)


def _apply_one(tree: dict[str, Any], task: type[Task], override: Override) -> bool:
    """Applies an override; returns false where it removes a key that the tree does not have."""
    value = _value(task, override)
    table = _table(tree, override)
    if not isinstance(table, dict):
        return True  # `build` rejects such a section
    root, dot, key = override.key.partition(".")
    if dot and _is_table(task, override.section, root):  # such as precision.state.nu
        table, root = table.setdefault(root, {}), key
        if not isinstance(table, dict):
            return True
    else:
        root = override.key
    if override.value == UNSET:
        return table.pop(root, None) is not None
    table[root] = value
    return True


def _kinds(task: type[Task]) -> Mapping[str, Any]:
    """Returns the dataclass of each section."""
    return {**SECTIONS, **task.sections}


def _is_table(task: type[Task], section: str, key: str) -> bool:
    kind = _kinds(task).get(section, Choice)
    field = None if kind is Choice else typing.get_type_hints(kind).get(key)
    return typing.get_origin(field) is dict


def _value(task: type[Task], override: Override) -> Any:
    """Returns the value of an override: TOML, except that strings need no quotes."""
    section, key = override.section, override.key
    if not section.startswith("stages."):
        with user_errors(override.source):
            known = [*_kinds(task), "stages"]
            ranges.check_choice("section", section, known, argument="section")
    kind = _kinds(task).get(section, Choice)
    field = None if kind is Choice else typing.get_type_hints(kind).get(key)
    if field is str or (kind is Choice and key == "name"):
        return _unquoted(override.value)
    try:
        return tomllib.loads(f"value = {override.value}")["value"]
    except tomllib.TOMLDecodeError:
        return override.value


def _table(tree: dict[str, Any], override: Override) -> Any:
    """Returns the table of a section or stage, which is added if the file has none."""
    if not override.section.startswith("stages."):
        return tree.setdefault(override.section, {})
    tables = tree.setdefault("stages", [])
    index = int(override.section.removeprefix("stages."))
    if not isinstance(tables, list):
        return tables
    if index > max(len(tables), 1):
        raise UserError(
            f"{override.source}: the config has {max(len(tables), 1)} stages, and a new "
            f"one has the number {max(len(tables), 1)}; they count from 0"
        )
    tables += [{} for _ in range(index + 1 - len(tables))]
    return tables[index]


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if quoted else text


def _known_keys(names: Mapping[str, Any]) -> Mapping[str, Collection[str]]:
    """Returns the keys that each section may have, given the names of task, optimizer and schedule.

    The result is empty if one of the names does not exist.
    """
    try:
        task = find_task(names["task"])
        choices = {
            section: ("name", *config_values.arguments_of(section, names[section]))
            for section in ("optimizer", "schedule")
        }
    except ArgumentError:
        return {}
    sections = {
        section: [field.name for field in dataclasses.fields(kind)]
        for section, kind in _kinds(task).items()
        if kind is not Choice
    }
    stage = [*config_values.STAGE_SIZES, *choices["schedule"][1:], *task.stage_keys]
    return {**sections, **choices, "stages": stage}


def _check_removed(override: Override, known: Mapping[str, Collection[str]]) -> None:
    """Checks that a key to remove is a known one, if the file does not have it."""
    section = override.section.partition(".")[0]
    if known:
        with user_errors(override.source):
            kind = f"key in [{override.section}]"
            ranges.check_choice(kind, override.key.partition(".")[0], known.get(section, ()))


def _drop(
    tree: dict[str, Any],
    file: str,
    overridden: Mapping[tuple[str, str], str],
    before: Mapping[str, Collection[str]],
    known: Mapping[str, Collection[str]],
    chosen: Mapping[str, Any],
) -> list[str]:
    """Removes the keys of the file that only the replaced names know; returns a note for each.

    Other unknown keys are kept, and `build` rejects them.
    """
    if not known:
        return []
    tables = [(name, name, table) for name, table in tree.items() if isinstance(table, dict)]
    stages = tree.get("stages")
    if isinstance(stages, list):
        tables += [
            (f"stages.{index}", "stages", table)
            for index, table in enumerate(stages)
            if isinstance(table, dict)
        ]
    owners = {
        section: chosen[section] or config_values.DEFAULT_NAMES[section] for section in _NAMED
    }
    owners["stages"] = f"{owners['schedule']} of task {owners['task']}"
    notes = []
    for name, section, table in tables:
        dropped = [
            key
            for key in table
            if (name, key) not in overridden
            and key in before.get(section, ())
            and key not in known.get(section, ())
        ]
        for key in dropped:
            del table[key]
            owner = owners.get(section, owners["task"])
            notes.append(f"note: {name}.{key} of {file} is ignored: {owner} does not have it")
        if section not in known and section in before and not table:
            del tree[name]
    return notes
