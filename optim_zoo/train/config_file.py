"""Reads a config: a TOML file with overrides from the command line, checked as a whole."""

import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optim_zoo import ranges
from optim_zoo.errors import ArgumentTypeError, ArgumentValueError, UserError
from optim_zoo.train import optimization, sinks, tasks
from optim_zoo.train.config import Choice, Config, TaskChoice
from optim_zoo.train.config_values import (
    Sources,
    build_choice,
    build_section,
    build_stages,
    section_values,
    user_errors,
    user_errors_in,
)
from optim_zoo.train.tasks.base import Setup, Task

_NOT_SECTIONS = ("task_sections", "stages")  # fields of Config
SECTIONS: Mapping[str, type] = {
    name: kind for name, kind in typing.get_type_hints(Config).items() if name not in _NOT_SECTIONS
}
"""The sections of every config; a task adds its own."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Returns the config of a TOML file with ``section.key=value`` overrides applied.

    Args:
      path: the TOML file.
      overrides: such as ``train.steps=100``, or ``stages.1.steps=100`` for the second stage; the
        value is TOML, or a bare string. The last override of a key counts.

    Raises:
      UserError: the file cannot be read, or a section, key, type or value is not allowed. The
        sentence names the key, where it was set, and the nearest known names.
    """
    tree = read(path)
    split = [_split(override) for override in overrides]
    names = [value for section, key, value in split if (section, key) == ("task", "name")]
    section = tree.get("task")
    named = section.get("name") if isinstance(section, dict) else None
    from_command = {("task", "name"): f"command line (task.name={names[-1]})"} if names else {}
    with user_errors_in("task", Sources(str(path), from_command)):
        task = _find_task(_unquoted(names[-1]) if names else named)
    overridden: dict[tuple[str, str], str] = {}
    for override, (section, key, text) in zip(overrides, split, strict=True):
        value = _override_value(task, section, key, text, override)
        table = _table(tree, section, override)
        if isinstance(table, dict):
            table[key] = value
        overridden[section, key] = f"command line ({override})"
    return build(tree, str(path), overridden)


def read(path: str | Path) -> dict[str, Any]:
    """Returns the content of a TOML file.

    Raises:
      UserError: the file cannot be read, or it is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error


def build(
    tree: Mapping[str, Any], file: str, overridden: Mapping[tuple[str, str], str] | None = None
) -> Config:
    """Returns the config that a TOML tree describes.

    Args:
      tree: section -> key -> value; ``stages`` is a list of such tables.
      file: where the tree comes from, for messages.
      overridden: (section, key) -> where that value comes from instead.

    Raises:
      UserError: see `load`.
    """
    sources = Sources(file, overridden or {})
    values = dict(tree)
    tables = values.pop("stages", [])
    with user_errors(sources.of("stages")):
        if not (isinstance(tables, list) and all(isinstance(table, dict) for table in tables)):
            raise ArgumentTypeError("[[stages]]", "be an array of tables", tables)
    choice = build_section("task", TaskChoice, section_values(values, "task", sources), sources)
    with user_errors_in("task", sources):
        task = _find_task(choice.name)
    known: dict[str, Any] = {**SECTIONS, **task.sections}
    for name in values:
        if name == "second_stage":
            raise UserError(
                f"{sources.of(name)}: [second_stage] is replaced by [[stages]], one table per "
                "stage with what differs from [train], [schedule] and the task's sections"
            )
        with user_errors(sources.of(name)):
            ranges.check_choice("section", name, [*known, "stages"], argument="section")
    built: dict[str, Any] = {
        name: build_choice(name, section_values(values, name, sources), sources)
        if kind is Choice
        else build_section(name, kind, section_values(values, name, sources), sources)
        for name, kind in known.items()
    }
    own = {name: built.pop(name) for name in task.sections}
    stages = build_stages(tables, task, built["train"], built["schedule"], own, sources)
    config = Config(task_sections=own, stages=stages, **built)
    task.check(setup(config, Path()))
    with user_errors_in("output", sources):
        sinks.check(config.output.sinks)
    _check_arguments(config, sources)
    return config


def setup(config: Config, cache: Path) -> Setup:
    """Returns what the task of a config is made from."""
    return Setup(
        sections=config.task_sections,
        stages=config.stages,
        seed=config.run.seed,
        evaluation_batches=config.output.evaluation_batches,
        cache=cache,
    )


def make_task(config: Config, cache: Path) -> Task:
    """Returns the task of a config, whose data is cached in the folder ``cache``."""
    return tasks.find(config.task.name)(setup(config, cache))


def _find_task(name: Any) -> type[Task]:
    """The class of a task; an unnamed one is the default."""
    task = tasks.find(name if isinstance(name, str) else TaskChoice.name)
    clash = {*SECTIONS, "stages"} & set(task.sections)
    if clash:
        raise ArgumentValueError(
            "name", f"name a task without a section {clash.pop()}, which every config has", name
        )
    return task


def _check_arguments(config: Config, sources: Sources) -> None:
    """Makes schedules and optimizer once, so that their errors come before any work is done."""
    for index, stage in enumerate(config.stages):
        with user_errors_in(f"stages.{index}" if stage.table else "schedule", sources):
            optimization.stage_schedule(config, stage)
    with user_errors_in("optimizer", sources):
        optimizer = optimization.make_optimizer(config, ())
    with user_errors_in("precision", sources):
        optimization.wrapped(config, optimizer)


# Overrides


def _split(override: str) -> tuple[str, str, str]:
    """Section, key and text of the value; the section of a stage is ``stages.1``."""
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if section == "stages":
        index, dot, key = key.partition(".")
        if not (index.isdecimal() and len(index) < 4):
            dot = ""
        section = f"stages.{index}"
    if not (equals and dot and section and key):
        example = "stages.1.steps=100" if section.startswith("stages") else "train.steps=100"
        raise UserError(f"expected section.key=value, got {override!r}; for example {example}")
    return section, key, text.strip()


def _override_value(task: type[Task], section: str, key: str, text: str, override: str) -> Any:
    """The value of an override: TOML, but for strings, which need no quotes."""
    kinds: dict[str, Any] = {**SECTIONS, **task.sections}
    if not section.startswith("stages."):
        with user_errors(f"command line ({override})"):
            ranges.check_choice("section", section, [*kinds, "stages"], argument="section")
    kind = kinds.get(section, Choice)
    field = None if kind is Choice else typing.get_type_hints(kind).get(key)
    if field is str or (kind is Choice and key == "name"):
        return _unquoted(text)
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _table(tree: dict[str, Any], section: str, override: str) -> Any:
    """The table of a section or stage, which is made where the file has none."""
    if not section.startswith("stages."):
        return tree.setdefault(section, {})
    tables, index = tree.setdefault("stages", []), int(section.removeprefix("stages."))
    if not isinstance(tables, list):
        return tables
    if index > max(len(tables), 1):
        raise UserError(
            f"command line ({override}): the config has {max(len(tables), 1)} stages, and a new "
            f"one has the number {max(len(tables), 1)}; they count from 0"
        )
    tables += [{} for _ in range(index + 1 - len(tables))]
    return tables[index]


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if quoted else text
