"""Configs as TOML files: read with overrides, checked, written back, compared."""

import contextlib
import dataclasses
import inspect
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from optim_zoo import ranges, registry, schedules
from optim_zoo.errors import ArgumentError, ArgumentTypeError, ArgumentValueError, UserError
from optim_zoo.train import optimization
from optim_zoo.train.config import Choice, Config

# Arguments that the job sets and a config cannot: the rate comes from the schedule, the schedule's
# length from the stages, and what a layer is from the model.
_SET_BY_JOB = {
    "optimizer": ("learning_rate", "layers", "axis_name"),
    "schedule": ("total_steps",),
}
_DEFAULT_NAMES = {"optimizer": "lamb", "schedule": "warmup_polynomial"}
_UNCOMPARED = ("run.dir", "run.accept_changes")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a TOML file, overridden by ``section.key=value`` strings.

    Raises:
      UserError: the file cannot be read, or a section, key, type or value does not fit; the
        sentence names the key, where it stands, and the nearest known names.
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error
    overridden: dict[tuple[str, str], str] = {}
    for override in overrides:
        section, key, value = _parse_override(override)
        if isinstance(tree.setdefault(section, {}), dict):
            tree[section][key] = value
        overridden[section, key] = f"command line ({override})"
    sources = _Sources(str(path), overridden)
    config = _build(tree, sources)
    _check_arguments(config, sources)
    return config


@dataclasses.dataclass(frozen=True)
class _Sources:
    """Where the values of a config come from, as messages name it."""

    file: str
    overridden: Mapping[tuple[str, str], str]  # (section, key) -> the override that set it

    def of(self, section: str, *keys: str) -> str:
        """The override of the first of these keys that has one, else the file."""
        return next(
            (self.overridden[section, key] for key in keys if (section, key) in self.overridden),
            self.file,
        )


def _parse_override(override: str) -> tuple[str, str, Any]:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise UserError(
            f"expected section.key=value, got {override!r}; for example train.steps=100"
        )
    with _user_errors(f"command line ({override})"):
        ranges.check_choice("section", section, typing.get_type_hints(Config))
    if _field_type(section, key) is str:
        return section, key, _unquoted(text.strip())
    try:
        return section, key, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return section, key, text.strip()


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if quoted else text


def _field_type(section: str, key: str) -> Any:
    section_type = typing.get_type_hints(Config).get(section)
    if section_type is None or section_type is Choice:
        return str if key == "name" else None
    return typing.get_type_hints(section_type).get(key)


def _build(tree: Mapping[str, Any], sources: _Sources) -> Config:
    section_types = typing.get_type_hints(Config)
    for section, values in tree.items():
        with _user_errors(sources.of(section)):
            ranges.check_choice("section", section, section_types)
            if not isinstance(values, dict):
                raise ArgumentTypeError(f"[{section}]", "be a section with keys", values)
    sections: dict[str, Any] = {}
    for section, section_type in section_types.items():
        values = tree.get(section, {})
        make = _build_choice if section_type is Choice else _build_section
        sections[section] = make(section, section_type, values, sources)
    return Config(**sections)


def _build_section(
    section: str, section_type: type, values: Mapping[str, Any], sources: _Sources
) -> Any:
    types = typing.get_type_hints(section_type)
    arguments = {}
    for key, value in values.items():
        with _user_errors(sources.of(section, key)):
            ranges.check_choice(f"key in [{section}]", key, types)
            arguments[key] = _typed(f"{section}.{key}", value, types[key])
    with _user_errors_in(section, sources):
        return section_type(**arguments)


_KINDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false",
          dict: "a table"}  # fmt: skip


def _typed(name: str, value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if typing.get_origin(kind) is dict:
        return {k: _typed(f"{name}.{k}", v, str) for k, v in _typed(name, value, dict).items()}
    if type(value) is not kind:
        raise ArgumentTypeError(name, f"be {_KINDS[kind]}", value)
    return value


def _build_choice(section: str, _: type, values: Mapping[str, Any], sources: _Sources) -> Choice:
    name = values.get("name", _DEFAULT_NAMES[section])
    with _user_errors(sources.of(section, "name")):
        constructor = _constructor(section, name)
    parameters = inspect.signature(constructor).parameters
    allowed = [p for p in parameters if p not in _SET_BY_JOB[section]]
    for key in values:
        with _user_errors(sources.of(section, key)):
            ranges.check_choice(f"key in [{section}] for {name}", key, ["name", *allowed])
    arguments = {}
    for key in allowed:
        default = parameters[key].default
        if key in values:
            with _user_errors(sources.of(section, key)):
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
                sentence=f"{name} wraps another transformation, which a config has no words for: "
                f"{advice}",
            )
        return entry.constructor
    ranges.check_choice("schedule", name, schedules.SCHEDULES, argument="name")
    return schedules.SCHEDULES[name]


@contextlib.contextmanager
def _user_errors(source: str) -> Iterator[None]:
    """Turns the error of a check into a `UserError` that says where the value comes from."""
    try:
        yield
    except ArgumentError as error:
        raise UserError(f"{source}: {error}") from error


@contextlib.contextmanager
def _user_errors_in(section: str, sources: _Sources) -> Iterator[None]:
    """The same for a constructor whose arguments are the keys of a section.

    An error that carries no argument is said to come from the file.
    """
    try:
        yield
    except ArgumentError as error:
        source = sources.of(section, error.argument, *error.related)
        raise UserError(f"{source}: [{section}] {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{sources.file}: [{section}] {error}") from error


def _check_arguments(config: Config, sources: _Sources) -> None:
    """Makes schedules and optimizer once: what they refuse is told before any work is done."""
    for index, section in enumerate(("schedule", "second_stage")[: len(config.stages)]):
        with _user_errors_in(section, sources):
            optimization.stage_schedule(config, index)
    with _user_errors_in("optimizer", sources):
        optimizer = optimization.make_optimizer(config, ())
    with _user_errors_in("precision", sources):
        optimization.wrapped(config, optimizer)


def to_toml(config: Config) -> str:
    """The config as a TOML file that `load` reads back.

    What is None (off) is left out, and so is what `to_dict` leaves out.
    """
    return tomli_w.dumps(to_dict(config))


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The config by section, in values that TOML has.

    Without [distributed]: how many processes a run is spread over is another matter at each start.
    """
    sections = {}
    for field in dataclasses.fields(config):
        if field.name == "distributed":
            continue
        section = getattr(config, field.name)
        if isinstance(section, Choice):
            values = {"name": section.name, **section.arguments}
        else:
            values = dataclasses.asdict(section)
        sections[field.name] = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in values.items()
            if value is not None
        }
    return sections


def differences(before: Config, now: Config) -> list[str]:
    """The keys in which two configs differ, as ``key: before -> now``."""
    flat = [
        {f"{s}.{k}": v for s, section in to_dict(config).items() for k, v in section.items()}
        for config in (before, now)
    ]
    keys = [key for key in {**flat[0], **flat[1]} if key not in _UNCOMPARED]
    return [
        f"{key}: {flat[0].get(key, 'unset')} -> {flat[1].get(key, 'unset')}"
        for key in keys
        if flat[0].get(key) != flat[1].get(key)
    ]
