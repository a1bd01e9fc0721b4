"""Reads a config: a TOML file with overrides from the command line, checked as a whole."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optim_zoo import ranges
from optim_zoo.errors import ArgumentTypeError, UserError
from optim_zoo.train import optimization, sinks, tasks
from optim_zoo.train.config import MOST, Choice, Config, Stage, TaskChoice
from optim_zoo.train.config_overrides import apply_overrides
from optim_zoo.train.config_values import (
    SECTIONS,
    Sources,
    build_choice,
    build_section,
    build_stages,
    find_task,
    section_values,
    user_errors,
    user_errors_in,
)
from optim_zoo.train.tasks.base import Setup, Task


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    notes: list[str] | None = None,
    origin: str = "command line",
) -> Config:
    """Returns the config of a TOML file with ``section.key=value`` overrides applied.

    Args:
      path: the TOML file.
      overrides: such as ``train.steps=100``, or ``stages.1.steps=100`` for the second stage; the
        value is TOML, or a bare string. ``optimizer.weight_decay=unset`` removes the key. The last
        override of a key counts.
      notes: receives a sentence about each key of the file that is ignored, because the optimizer,
        schedule or task that an override names does not have it.
      origin: where the overrides come from, for messages.

    Raises:
      UserError: the file cannot be read, or a section, key, type or value is not allowed. The
        message names the key, where it was set, and the nearest known names.
    """
    tree = read(path)
    overridden, dropped = apply_overrides(tree, str(path), overrides, origin)
    if notes is not None:
        notes += dropped
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
        task = find_task(choice.name)
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


def setup(config: Config, cache: Path, *, reads_data: bool = True) -> Setup:
    """Returns what the task of a config is made from."""
    return Setup(
        sections=config.task_sections,
        stages=config.stages,
        seed=config.run.seed,
        evaluation_batches=config.output.evaluation_batches,
        cache=cache,
        reads_data=reads_data,
    )


def make_task(config: Config, cache: Path, *, reads_data: bool = True) -> Task:
    """Returns the task of a config.

    Args:
      config: the config.
      cache: the folder for what the task makes once from its data.
      reads_data: whether the task reads its data; without it the task can only use a trained model.
    """
    return tasks.find(config.task.name)(setup(config, cache, reads_data=reads_data))


def _check_arguments(config: Config, sources: Sources) -> None:
    """Builds the schedules and the optimizer once, so that their errors appear at the start."""
    for index, stage in enumerate(config.stages):
        section = f"stages.{index}" if stage.table else "schedule"
        _check_warmup(section, stage, sources)
        with user_errors_in(section, sources, also=("schedule",)):
            optimization.stage_schedule(config, stage)
    if config.total_steps > MOST:
        steps = [(f"stages.{index}", "steps") for index in range(len(config.stages))]
        raise UserError(
            f"{sources.of_any(*steps, ('train', 'steps'))}: the stages must have at most {MOST} "
            f"steps together, got {config.total_steps}"
        )
    with user_errors_in("optimizer", sources):
        optimizer = optimization.make_optimizer(config, ())
    with user_errors_in("precision", sources):
        optimization.wrapped(config, optimizer)


def _check_warmup(section: str, stage: Stage, sources: Sources) -> None:
    """Checks that a stage is at least as long as its warmup, and names the keys of the config.

    A schedule checks this too, but its error would name ``total_steps``, which is not a key.
    """
    warmup = stage.schedule.get("warmup_steps")
    if not isinstance(warmup, int) or warmup <= stage.steps:
        return
    places = {
        key: (section if key in stage.table else otherwise, key)
        for key, otherwise in (("warmup_steps", "schedule"), ("steps", "train"))
    }
    names = {key: ".".join(place) for key, place in places.items()}
    raise UserError(
        f"{sources.of_any(*places.values())}: {names['warmup_steps']} must be at most "
        f"{names['steps']}, got {warmup} and {stage.steps}: lower {names['warmup_steps']} or raise "
        f"{names['steps']}"
    )
