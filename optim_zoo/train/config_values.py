"""Turns the values of a config file into sections, constructor arguments and stages."""

import contextlib
import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from optim_zoo import ranges, registry, schedules
from optim_zoo.errors import ArgumentError, ArgumentTypeError, ArgumentValueError, UserError
from optim_zoo.train.config import Choice, Stage, Train
from optim_zoo.train.tasks.base import Task

# Arguments that the job sets and a config cannot: the learning rate comes from the schedule, the
# length of the schedule from the stages, and the layers from the task.
_SET_BY_JOB = {
    "optimizer": ("learning_rate", "layers", "axis_name"),
    "schedule": ("total_steps",),
}
_DEFAULT_NAMES = {"optimizer": "lamb", "schedule": "warmup_polynomial"}
_STAGE_SIZES = ("steps", "batch_size", "micro_batches")  # of [train], for each stage


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where the values of a config come from, as messages name it."""

    file: str
    overridden: Mapping[tuple[str, str], str]  # (section, key) -> the override that set it

    def of(self, section: str, *keys: str) -> str:
        """The override of the first of these keys that has one, else the file."""
        return next(
            (self.overridden[section, key] for key in keys if (section, key) in self.overridden),
            self.file,
        )


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


_KINDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false",
          dict: "a table", tuple: "a list of strings"}  # fmt: skip


def _typed(name: str, value: Any, kind: Any) -> Any:
    """A value of the file as the type of its key wants it."""
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


def build_choice(section: str, values: Mapping[str, Any], sources: Sources) -> Choice:
    """Returns the constructor that a section names, with its arguments checked by name."""
    name = values.get("name", _DEFAULT_NAMES[section])
    with user_errors(sources.of(section, "name")):
        constructor = _constructor(section, name)
    parameters = inspect.signature(constructor).parameters
    allowed = [p for p in parameters if p not in _SET_BY_JOB[section]]
    for key in values:
        with user_errors(sources.of(section, key)):
            ranges.check_choice(f"key in [{section}] for {name}", key, ["name", *allowed])
    arguments = {}
    for key in allowed:
        default = parameters[key].default
        if key in values:
            with user_errors(sources.of(section, key)):
                arguments[key] = _argument(f"{section}.{key}", values[key], default)
        elif default is inspect.Parameter.empty:
            raise UserError(f"{sources.file}: {section}.{key} is missing; {name} needs it")
        else:
            arguments[key] = default
    return Choice(name, arguments)


def _argument(name: str, value: Any, default: Any) -> Any:
    """A value of the file as a constructor wants it."""
    if isinstance(default, bool):
        return _typed(name, value, bool)
    if isinstance(value, list):
        value = tuple(value)
    # The default itself, because default exclusions may match nothing (rules.optional).
    return default if value == default else value


def _constructor(section: str, name: Any) -> Callable[..., Any]:
    if section == "optimizer":
        entry = registry.get(name)
        if entry.wraps:
            advice = "name an optimizer that stands by itself, such as ranger or lamb"
            raise ArgumentValueError(
                "name",
                "be an optimizer that wraps no other transformation",
                name,
                advice,
                sentence=f"{name} wraps another transformation, which a config cannot express: "
                f"{advice}",
            )
        return entry.constructor
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
    sizes = {key: typing.get_type_hints(Train)[key] for key in _STAGE_SIZES}
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
def user_errors_in(section: str, sources: Sources) -> Iterator[None]:
    """Does the same for a constructor whose arguments are the keys of a section.

    An error without an argument is attributed to the file.
    """
    try:
        yield
    except ArgumentError as error:
        source = sources.of(section, error.argument, *error.related)
        raise UserError(f"{source}: [{section}] {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{sources.file}: [{section}] {error}") from error
