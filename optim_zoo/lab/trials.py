"""The runs of a sweep: every combination of its values, each with a checked config."""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from optim_zoo.errors import UserError
from optim_zoo.lab import toml_values
from optim_zoo.lab.sweep_file import RATE, SEED, Sweep, Variant
from optim_zoo.train import config_file
from optim_zoo.train.config import Config

# What a run of a sweep writes, unless the sweep says otherwise.
_QUIET = {"output.sinks": [], "output.keep_checkpoints": 1}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    id: str  # the name of its folder: readable, with a digest of all overrides
    optimizer: str  # the label of the optimizer
    keys: Mapping[str, Any]  # the keys that the sweep sets for it; None where it removes one
    config: Config

    @property
    def rate(self) -> float:
        """The learning rate of the schedule."""
        return float(self.config.schedule.arguments.get("learning_rate", float("nan")))

    @property
    def batch_size(self) -> int:
        """The batch size of the first stage."""
        return self.config.stages[0].batch_size

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.config.run.seed

    def __str__(self) -> str:
        return f"{self.optimizer}, rate {self.rate:g}, batch {self.batch_size}, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Point:
    """A combination of everything but the learning rate and the seeds of a search."""

    variant: Variant
    keys: Mapping[str, Any]


def points(sweep: Sweep) -> Iterator[Point]:
    """Yields every combination of the grid, optimizers first, the last key fastest.

    In a search, the learning rates of an optimizer are its coarse grid and are left out here.
    """
    replaced = _replaced(sweep)
    for variant in sweep.variants or [Variant("", {}, {})]:
        cleared = dict.fromkeys(replaced, toml_values.UNSET) if sweep.variants else {}
        axes = {**variant.axes, **sweep.axes}
        if sweep.search is not None:
            axes.pop(RATE, None)
        seeds_last = sorted(axes, key=lambda key: key == SEED)
        for values in itertools.product(*(axes[key] for key in seeds_last)):
            varied = dict(zip(seeds_last, values, strict=True))
            own = {**cleared, **variant.fixed}
            yield Point(variant, {**own, **varied, **sweep.fixed})


def _replaced(sweep: Sweep) -> Sequence[str]:
    """Returns the keys of [optimizer] in the config, which [[grid.optimizer]] replaces."""
    table = config_file.read(sweep.base).get("optimizer", {})
    keys = table if isinstance(table, dict) else {}
    return [f"optimizer.{key}" for key in keys if key != "name"]


def grid(sweep: Sweep) -> list[Trial]:
    """Returns the runs of a sweep without a search, without repetitions."""
    return unique(trial(sweep, point.variant, point.keys) for point in points(sweep))


def unique(trials: Iterator[Trial]) -> list[Trial]:
    """Returns the runs in their order, each once."""
    return list({trial.id: trial for trial in trials}.values())


def trial(sweep: Sweep, variant: Variant, keys: Mapping[str, Any]) -> Trial:
    """Returns a run, whose config is checked.

    Args:
      sweep: the sweep.
      variant: the optimizer.
      keys: config key -> value.

    Raises:
      UserError: a key or value is not allowed; the message names the sweep file.
    """
    quiet = {key: value for key, value in _QUIET.items() if key not in keys}
    overrides = [toml_values.override(key, value) for key, value in {**keys, **quiet}.items()]
    for key in keys:
        if key in ("run.dir", "run.accept_changes") or "." not in key:
            raise UserError(f"{sweep.source}: {key} cannot be a key of a sweep's runs")
    config = config_file.load(sweep.base, overrides, origin=sweep.source)
    label = variant.label or config.optimizer.name
    shown = {key: None if value == toml_values.UNSET else value for key, value in keys.items()}
    made = Trial("", label, shown, config)
    return dataclasses.replace(made, id=_id(made))


def _id(trial: Trial) -> str:
    set_keys = {key: value for key, value in trial.keys.items() if value is not None}
    digest = hashlib.sha256(json.dumps(set_keys, sort_keys=True).encode()).hexdigest()[:8]
    parts = (trial.optimizer, f"lr{trial.rate:g}", f"batch{trial.batch_size}", f"seed{trial.seed}")
    name = re.sub(r"[^\w.+-]+", "_", "-".join(parts))
    return f"{name[:80]}-{digest}"


def folder_of(sweep_folder: Path, trial: Trial) -> Path:
    """Returns the run folder of a run."""
    return sweep_folder / "runs" / trial.id
