"""Turns the values of a config file into sections, constructor arguments and stages."""

import contextlib
import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from optim_zoo import ranges, schedules
from optim_zoo.errors import ArgumentError, ArgumentTypeError, ArgumentValueError, UserError
from optim_zoo.train import optimization, tasks
from optim_zoo.train.by_path import ByPath
from optim_zoo.train.config import MOST, MOST_SEED, Choice, Config, Stage, TaskChoice, Train
from optim_zoo.train.tasks.base import Task

_NOT_SECTIONS = ("task_sections", "stages")  # fields of Config
SECTIONS: Mapping[str, type] = {
    name: kind for name, kind in typing.get_type_hints(Config).items() if name not in _NOT_SECTIONS
}
"""The sections of every config; a task adds its own."""

# Arguments that the job sets and a config cannot: the learning rate comes from the schedule, the
# length of the schedule from the stages, and the layers from the task.
_SET_BY_JOB = {
    # Keras has an argument `name`, which here is the key of the optimizer itself.
    "optimizer": (*optimization.LEARNING_RATE_NAMES, "layers", "axis_name", "name"),
    "schedule": ("total_steps",),
}
DEFAULT_NAMES = {
    "task": TaskChoice.name,
    "optimizer": "lamb",
    "schedule": "warmup_polynomial",
}
STAGE_SIZES = ("steps", "batch_size", "micro_batches")  # keys of [train] that a stage may override


@dataclasses.dataclass(frozen=True)
class Sources:
    """Says in messages where the values of a config come from: the file or an override."""

    file: str
    overridden: Mapping[tuple[str, str], str]  # (section, key) -> the override that set it

    def of(self, section: str, *keys: str) -> str:
        """Returns the override of the first of these keys that has one, else the file.

        An argument such as ``betas[0]`` or ``state.nu`` belongs to the key ``betas`` or ``state``.
        """
        return self.of_any(*((section, re.split(r"[.\[]", key)[0]) for key in keys))

    def of_any(self, *places: tuple[str, str]) -> str:
        """Returns the override of the first ``(section, key)`` that has one, else the file."""
        return next((self.overridden[p] for p in places if p in self.overridden), self.file)

    def of_section(self, section: str) -> str:
        """Returns the overrides of any key of a section, else the file."""
        texts = [text for (name, _), text in self.overridden.items() if name == section]
        return " and ".join(texts) or self.file


# Sections


def section_values(tree: Mapping[str, Any], name: str, sources: Sources) -> Mapping[str, Any]:
    """Returns the keys and values of a section, which may be missing from the file."""
    values = tree.get(name, {})
    if not isinstance(values, dict):
        with user_errors(sources.of(name)):
            raise ArgumentTypeError(f"[{name}]", "be a section with keys", values)
    return values


def build_section(section: str, kind: type, values: Mapping[str, Any], sources: Sources) -> Any:
    """Returns the dataclass ``kind`` made from the values of a section."""
    types = typing.get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        with user_errors(sources.of(section, key)):
            ranges.check_choice(f"key in [{section}]", key, types)
            arguments[key] = _typed(f"{section}.{key}", value, types[key])
    with user_errors_in(section, sources):
        return kind(**arguments)


_LARGE = "write a large number that need not be whole with an exponent, such as 1e10"
_KINDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false",
          dict: "a table", tuple: "a list of strings"}  # fmt: skip


def _typed(name: str, value: Any, kind: Any) -> Any:
    """Returns a value of the file, converted to the type of its key."""
    _check_size(name, value, _LARGE if kind is float else "")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if typing.get_origin(kind) is dict:
        return {k: _typed(f"{name}.{k}", v, str) for k, v in _typed(name, value, dict).items()}
    if typing.get_origin(kind) is tuple:
        if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise ArgumentTypeError(name, f"be {_KINDS[tuple]}", value)
        return tuple(value)
    if type(value) is not kind:
        raise ArgumentTypeError(name, f"be {_KINDS[kind]}", value)
    return value


def _check_size(name: str, value: Any, advice: str = "") -> None:
    """Raises `ArgumentValueError` if a whole number, alone or in a list, does not fit in 32 bits.

    JAX counts in 32 bits and would raise an `OverflowError`.
    """
    for item in value if isinstance(value, list) else [value]:
        most = MOST_SEED if name == "run.seed" else MOST
        if isinstance(item, int) and abs(item) > most:
            raise ArgumentValueError(name, f"be at most {most}", item, advice)


def find_task(name: Any) -> type[Task]:
    """Returns the class of a task; anything but a string is the default task.

    Raises:
      ArgumentValueError: there is no such task, or a section of it has the name of a section that
        every config has.
      ArgumentTypeError: the import path names something that is not a task.
    """
    task = tasks.find(name if isinstance(name, str) else DEFAULT_NAMES["task"])
    clash = {*SECTIONS, "stages"} & set(task.sections)
    if clash:
        raise ArgumentValueError(
            "name", f"name a task without a section {clash.pop()}, which every config has", name
        )
    return task


def arguments_of(section: str, name: Any) -> Mapping[str, inspect.Parameter]:
    """Returns the arguments of a constructor that a config may set, and the keys of the job.

    Args:
      section: ``optimizer`` or ``schedule``.
      name: the name of the constructor; None for the default one.

    Raises:
      ArgumentValueError: there is no such constructor, or a config cannot use it.
    """
    parameters = inspect.signature(_constructor(section, name)).parameters
    own = inspect.signature(ByPath).parameters if section == "optimizer" else {}
    return {
        key: parameter
        for key, parameter in {**parameters, **own}.items()
        if key not in _SET_BY_JOB[section] and parameter.kind is not parameter.VAR_KEYWORD
    }


def build_choice(section: str, values: Mapping[str, Any], sources: Sources) -> Choice:
    """Returns the constructor that a section names, with its arguments checked by name."""
    name = values.get("name", DEFAULT_NAMES[section])
    with user_errors(sources.of(section, "name")):
        parameters = arguments_of(section, name)
    if section == "optimizer":
        name = optimization.short_name(name)
    for key in values:
        with user_errors(sources.of(section, key)):
            ranges.check_choice(f"key in [{section}] for {name}", key, ["name", *parameters])
    arguments = {}
    for key, parameter in parameters.items():
        if key in values:
            with user_errors(sources.of(section, key)):
                arguments[key] = _argument(f"{section}.{key}", values[key], parameter.default)
        elif parameter.default is inspect.Parameter.empty:
            source = sources.of(section, key, "name")
            raise UserError(f"{source}: {section}.{key} is missing; {name} needs it")
        else:
            arguments[key] = parameter.default
    return Choice(name, arguments)


def _argument(name: str, value: Any, default: Any) -> Any:
    """Returns a value of the file in the form that a constructor expects."""
    if isinstance(default, bool):
        return _typed(name, value, bool)
    _check_size(name, value, _LARGE)
    if isinstance(value, list):
        value = tuple(value)
    # The default itself, because default exclusions may match nothing (rules.optional).
    return default if value == default else value


def _constructor(section: str, name: Any) -> Callable[..., Any]:
    if name is None:
        name = DEFAULT_NAMES[section]
    if section == "optimizer":
        return optimization.find_optimizer(name)
    ranges.check_choice("schedule", name, schedules.SCHEDULES, argument="name")
    return schedules.SCHEDULES[name]


# Stages


def build_stages(
    tables: Sequence[Mapping[str, Any]],
    task: type[Task],
    train: Train,
    schedule: Choice,
    sections: Mapping[str, Any],
    sources: Sources,
) -> tuple[Stage, ...]:
    """Returns the stages: what each table sets, and the rest from the sections."""
    sizes = {key: typing.get_type_hints(Train)[key] for key in STAGE_SIZES}
    own_types = {
        key: typing.get_type_hints(task.sections[name])[key]
        for key, name in task.stage_keys.items()
    }
    stages = []
    for index, table in enumerate(tables or [{}]):
        name = f"stages.{index}"
        values = {}
        for key, value in table.items():
            with user_errors(sources.of(name, key)):
                ranges.check_choice(
                    f"key in [[stages]] {index}", key, [*sizes, *schedule.arguments, *own_types]
                )
                if key in schedule.arguments:
                    values[key] = _argument(f"{name}.{key}", value, schedule.arguments[key])
                else:
                    values[key] = _typed(f"{name}.{key}", value, {**sizes, **own_types}[key])
        with user_errors_in(name, sources):
            size = dataclasses.replace(train, **{k: v for k, v in values.items() if k in sizes})
            own = dict(sections)
            for key, section in task.stage_keys.items():
                if key in values:
                    own[section] = dataclasses.replace(own[section], **{key: values[key]})
        arguments = {key: values.get(key, value) for key, value in schedule.arguments.items()}
        stages.append(
            Stage(
                steps=size.steps,
                batch_size=size.batch_size,
                micro_batches=size.micro_batches,
                schedule=arguments,
                sections=own,
                table=values,
                settings={key: getattr(size, key) for key in sizes}
                | arguments
                | {key: getattr(own[name], key) for key, name in task.stage_keys.items()},
            )
        )
    return tuple(stages)


# Errors


@contextlib.contextmanager
def user_errors(source: str) -> Iterator[None]:
    """Turns the error of a check into a `UserError` that says where the value comes from."""
    try:
        yield
    except ArgumentError as error:
        raise UserError(f"{source}: {error}") from error


@contextlib.contextmanager
def user_errors_in(section: str, sources: Sources, also: Sequence[str] = ()) -> Iterator[None]:
    """Does the same for a constructor whose arguments are the keys of a section.

    An error without an argument is attributed to all overrides of the section, else to the file.

    Args:
      section: the section that the message names.
      sources: where the values come from.
      also: other sections that the arguments may come from.
    """
    try:
        yield
    except ArgumentError as error:
        keys = (error.argument, *error.related)
        found = [sources.of(name, *keys) for name in (section, *also)]
        source = next((each for each in found if each != sources.file), sources.file)
        raise UserError(f"{source}: [{section}] {error}") from error
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"{sources.of_section(section)}: [{section}] {error}") from error
