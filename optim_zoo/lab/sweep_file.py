"""Reads a sweep: a TOML file that names a config and the keys of it that the runs vary.

::

    config = "../digits_lars.toml"   # relative to the sweep file
    jobs = 2                         # runs at a time
    in_process = false               # see `optim_zoo.lab.in_process`

    [overrides]                      # keys of the config for all runs
    train.steps = 100

    [grid]                           # keys of the config, each with a list of values
    train.batch_size = [128, 512]
    run.seed = [0, 1]

    [[grid.optimizer]]               # replaces [optimizer] of the config
    name = "lars"
    momentum = 0.9
    weight_decay = { grid = [0.0, 1e-4] }
    learning_rate = [0.3, 1.0, 3.0]  # schedule.learning_rate
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optim_zoo import ranges
from optim_zoo.errors import ArgumentTypeError, ArgumentValueError, UserError
from optim_zoo.lab import toml_values
from optim_zoo.train import config_file
from optim_zoo.train.config import MOST_SEED
from optim_zoo.train.config_values import user_errors

RATE, SEED = "schedule.learning_rate", "run.seed"


@dataclasses.dataclass(frozen=True)
class Search:
    """The search for a learning rate; see `optim_zoo.lab.search`."""

    learning_rates: tuple[
        float, ...
    ] = ()  # the coarse grid, where an optimizer has none of its own
    runs: int = 8  # the budget of each optimizer: the number of rates to try
    seeds: tuple[int, ...] = ()  # the best rate runs with all of them, the search with the first


@dataclasses.dataclass(frozen=True)
class Variant:
    """An optimizer of the sweep, with the keys that belong to it."""

    label: str  # its name in tables and plots
    fixed: Mapping[str, Any]  # config key -> value
    axes: Mapping[str, Sequence[Any]]  # config key -> values


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The content of a sweep file, with the overrides of the command line."""

    path: Path
    base: Path  # the config
    folder: Path  # where the sweep is written
    jobs: int  # runs at a time
    in_process: bool  # train the runs in this process, those of a group together
    metric: str  # the held-out metric to compare, as the task names it
    higher_is_better: bool  # whether a larger value of it is better
    retry: bool  # run failed runs again
    fixed: Mapping[str, Any]  # config key -> value, for all runs
    variants: Sequence[Variant]
    axes: Mapping[str, Sequence[Any]]  # config key -> values
    search: Search | None

    @property
    def source(self) -> str:
        """The name of this file in messages."""
        return str(self.path)


_KINDS = {"config": str, "dir": str, "jobs": int, "metric": str,
          "higher_is_better": bool, "in_process": bool, "retry": bool,
          "overrides": dict, "grid": dict, "search": dict}  # fmt: skip
_NAMES = {str: "a string", int: "a whole number", bool: "true or false", dict: "a table"}


def load(path: Path, arguments: Sequence[str] = ()) -> Sweep:
    """Returns the sweep of a TOML file.

    Args:
      path: the sweep file.
      arguments: ``key=value`` for a key of the sweep file, such as ``jobs=4``, or
        ``section.key=value`` for a key of the config, which then has this value in all runs.

    Raises:
      UserError: the file cannot be read, or a key or value is not allowed.
    """
    tree = config_file.read(path)
    last = _apply(tree, arguments)
    with user_errors(str(path)):
        for key, value in tree.items():
            ranges.check_choice("key of a sweep", key, _KINDS)
            if type(value) is not _KINDS[key]:
                raise ArgumentTypeError(key, f"be {_NAMES[_KINDS[key]]}", value)
        if "config" not in tree:
            raise ArgumentValueError("config", "name the TOML file of a config", None)
        if not ("grid" in tree or "search" in tree):
            raise UserError(
                f"{path}: a sweep needs [grid], with lists of values for keys of the config, or "
                f"[search], with learning_rates to begin with"
            )
        jobs, metric = tree.get("jobs", 1), tree.get("metric", "loss")
        ranges.check_count("jobs", jobs, 1)
        grid = dict(tree.get("grid", {}))
        tables = grid.pop("optimizer", [])
        if isinstance(tables, dict):  # such as optimizer.weight_decay = [0.0, 0.1]
            grid["optimizer"], tables = tables, []
        axes = {k: _values(f"grid.{k}", v) for k, v in toml_values.flat(grid).items()}
        search = _search(tree["search"]) if "search" in tree else None
        variants = [_variant(table) for table in _tables(tables)]
        sweep = Sweep(
            path=path,
            base=path.parent / Path(tree["config"]).expanduser(),
            folder=Path(tree.get("dir", "") or Path("runs") / path.stem).expanduser(),
            jobs=jobs,
            in_process=tree.get("in_process", False),
            metric=metric,
            higher_is_better=tree.get("higher_is_better", higher_is_better(metric)),
            retry=tree.get("retry", False),
            fixed={**toml_values.flat(tree.get("overrides", {})), **last},
            variants=_labelled([_without(variant, last) for variant in variants]),
            axes={key: values for key, values in axes.items() if key not in last},
            search=None if RATE in last else search,
        )
        _check_search(sweep)
    return sweep


def higher_is_better(metric: str) -> bool:
    """Returns whether a larger value of a metric is better: not for a loss or a perplexity."""
    return not any(word in metric for word in ("loss", "error", "perplexity"))


def _apply(tree: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """Applies the keys of a sweep file in place; returns those of the config with their values."""
    last = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not (key and equals):
            raise UserError(f"expected key=value, got {argument!r}; for example jobs=4")
        table = tree
        if key.startswith("search."):
            table, key = tree.setdefault("search", {}), key.partition(".")[2]
        if "." in key:
            last[key] = toml_values.parsed(value)
        elif isinstance(table, dict):
            is_text = table is tree and _KINDS.get(key) is str
            table[key] = value if is_text else toml_values.parsed(value)
    return last


def _values(name: str, values: Any) -> Sequence[Any]:
    """Checks the values of a key in [grid]."""
    if not isinstance(values, list):
        raise ArgumentTypeError(name, "be a list of values", values, "for one value, [value]")
    if not values:
        raise ArgumentValueError(name, "have at least one value", values)
    distinct = {toml_values.text(value) for value in values}
    if len(distinct) < len(values):
        raise ArgumentValueError(name, "have distinct values", values)
    return values


def _tables(tables: Any) -> Sequence[Mapping[str, Any]]:
    if not (isinstance(tables, list) and all(isinstance(table, dict) for table in tables)):
        raise ArgumentTypeError("[[grid.optimizer]]", "be an array of tables", tables)
    return tables


def _variant(table: Mapping[str, Any]) -> Variant:
    """Returns the optimizer that a [[grid.optimizer]] table describes."""
    if not isinstance(table.get("name"), str):
        expected = "name an optimizer in every [[grid.optimizer]]"
        raise ArgumentTypeError("name", expected, table.get("name"))
    label = table.get("label", "")
    if not isinstance(label, str):
        raise ArgumentTypeError("grid.optimizer.label", "be a string", label)
    fixed: dict[str, Any] = {}
    axes: dict[str, Sequence[Any]] = {}
    for key, value in table.items():
        if key == "label":
            continue
        name = f"grid.optimizer.{key} of {table['name']}"
        if key == "learning_rate":
            axes[RATE] = _values(name, value if isinstance(value, list) else [value])
        elif isinstance(value, dict):
            if value.keys() != {"grid"}:
                raise ArgumentValueError(name, "be a value or { grid = [values] }", value)
            axes[f"optimizer.{key}"] = _values(name, value["grid"])
        else:
            fixed[f"optimizer.{key}"] = value
    return Variant(label, fixed, axes)


def _without(variant: Variant, last: Mapping[str, Any]) -> Variant:
    """Removes the keys that the command line sets."""
    kept = [
        {key: value for key, value in keys.items() if key not in last}
        for keys in (variant.fixed, variant.axes)
    ]
    return Variant(variant.label, *kept)


def _labelled(variants: Sequence[Variant]) -> Sequence[Variant]:
    """Gives every optimizer a label; arguments are part of it where one name occurs twice."""
    names = [str(variant.fixed.get("optimizer.name", "")) for variant in variants]
    labels = []
    for variant, name in zip(variants, names, strict=True):
        label = variant.label or name
        if not variant.label and names.count(name) > 1:
            others = [v.fixed for v, n in zip(variants, names, strict=True) if n == name]
            label += "".join(
                f" {key.removeprefix('optimizer.')}={toml_values.text(value)}"
                for key, value in variant.fixed.items()
                if any(other.get(key) != value for other in others)
            )
        labels.append(label)
    if len(set(labels)) < len(labels):
        expected = "be distinct in every [[grid.optimizer]]"
        raise ArgumentValueError("label", expected, labels, "add label = ...")
    return [dataclasses.replace(v, label=n) for v, n in zip(variants, labels, strict=True)]


def _search(table: Mapping[str, Any]) -> Search:
    """Returns the search that [search] describes."""
    for key in table:
        known = [field.name for field in dataclasses.fields(Search)]
        ranges.check_choice("key in [search]", key, known)
    rates = table.get("learning_rates", [])
    search = Search(
        _rates("search.learning_rates", rates) if rates else (),
        table.get("runs", Search.runs),
        tuple(_values("search.seeds", table["seeds"])) if "seeds" in table else (),
    )
    ranges.check_count("search.runs", search.runs, 2)
    for seed in search.seeds:
        ranges.check_count("search.seeds", seed)
        if seed > MOST_SEED:
            raise ArgumentValueError("search.seeds", f"be at most {MOST_SEED}", seed)
    return search


def _rates(name: str, rates: Any) -> tuple[float, ...]:
    """Checks the coarse grid of a search, and returns it in ascending order."""
    values = _values(name, rates)
    for rate in values:
        ranges.check(name, rate, 0.0, open_low=True, open_high=True)
    if len(values) < 2:
        raise ArgumentValueError(name, "have at least two rates to search from", rates)
    return tuple(sorted(map(float, values)))


def coarse_grid(sweep: Sweep, variant: Variant) -> tuple[float, ...]:
    """Returns the coarse grid of the search for an optimizer: its own, or that of [search]."""
    assert sweep.search is not None
    if RATE in variant.axes:
        return _rates(f"learning_rate of {variant.label}", list(variant.axes[RATE]))
    return sweep.search.learning_rates


def _check_search(sweep: Sweep) -> None:
    """Checks that every optimizer has a coarse grid within the budget."""
    if sweep.search is None:
        return
    for key, advice in ((RATE, "search.learning_rates"), (SEED, "search.seeds")):
        if key in sweep.axes:
            raise ArgumentValueError(
                f"grid.{key}", "be absent where there is [search]", sweep.axes[key], f"use {advice}"
            )
    for variant in sweep.variants or [Variant("", {}, {})]:
        rates = coarse_grid(sweep, variant)
        if not rates:
            raise ArgumentValueError(
                "search.learning_rates", "have at least two rates to search from", []
            )
        if len(rates) > sweep.search.runs:
            raise ArgumentValueError(
                "search.runs", f"be at least the {len(rates)} rates of the coarse grid",
                sweep.search.runs,
            )  # fmt: skip
