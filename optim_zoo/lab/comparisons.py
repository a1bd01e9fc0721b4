"""The results of a sweep, grouped for comparison: by optimizer and batch size.

A group holds the runs that differ in learning rate and seed only. Its best learning rate is the one
with the best mean metric over the seeds that all rates share, and it counts as the best only if
rates were tried on both sides of it.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optim_zoo.lab import results
from optim_zoo.lab.folder import About
from optim_zoo.train import records
from optim_zoo.train.records import Floats

USABLE = 0.1  # a rate is usable if its metric is at most 10 % worse than the best one
# Columns that do not describe what a group is.
_OTHERS = {"run", "status", "optimizer", "learning_rate", "batch_size", "seed",
           "schedule.learning_rate", "run.seed", "train.batch_size", "optimizer.name", "train_loss",
           "steps", "examples", "seconds", "exit_code", "message"}  # fmt: skip

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Curve:
    """The held-out metric of a run over its steps; a smaller value is better."""

    steps: Floats
    values: Floats
    examples: Floats
    seconds: Floats  # of training, without compiling, evaluating and saving; NaN if not timed


@dataclasses.dataclass(frozen=True)
class Group:
    """The runs of one optimizer at one batch size."""

    label: str
    batch_size: int
    rows: Sequence[Row]
    about: About

    @functools.cached_property
    def scores(self) -> Mapping[float, float]:
        """Learning rate -> the mean metric over the seeds, smaller is better.

        It is infinite where a run has diverged or failed. Rates that ran with fewer seeds than
        others, as in a search, are compared by the seeds that all of them have.
        """
        seeds = set.intersection(
            *({row["seed"] for row in rows} for rows in self._by_rate().values())
        )
        return {
            rate: float(np.mean([self._score(row) for row in rows if row["seed"] in seeds]))
            if seeds
            else float(np.mean([self._score(row) for row in rows]))
            for rate, rows in self._by_rate().items()
        }

    def _by_rate(self) -> Mapping[float, Sequence[Row]]:
        rates = sorted({row["learning_rate"] for row in self.rows})
        return {rate: [r for r in self.rows if r["learning_rate"] == rate] for rate in rates}

    def _score(self, row: Row) -> float:
        return results.score(row, self.about.metric, self.about.higher_is_better)

    @property
    def best_rate(self) -> float | None:
        """The learning rate with the best metric, or None if no run has finished."""
        finite = [rate for rate, score in self.scores.items() if math.isfinite(score)]
        return min(finite, key=lambda rate: self.scores[rate], default=None)

    @property
    def is_interior(self) -> bool:
        """Whether rates were tried on both sides of the best one."""
        rates = list(self.scores)
        return self.best_rate is not None and self.best_rate not in (rates[0], rates[-1])

    @property
    def note(self) -> str:
        """Says why the best learning rate is none, and is empty if it is one."""
        if self.best_rate is None:
            return "no run has finished"
        if self.is_interior:
            return ""
        if len(self.scores) == 1:
            return "one rate, not tuned"
        return "at the edge of the tried rates"

    def values(self, rate: float) -> Floats:
        """Returns the metric of every seed of a learning rate, in its own sign."""
        found = [row.get(self.about.metric) for row in self._by_rate()[rate]]
        return np.array([value for value in found if value is not None], np.float64)

    @property
    def usable(self) -> tuple[float, float] | None:
        """The lowest and highest rate around the best one whose metric is at most 10 % worse."""
        best = self.best_rate
        if best is None:
            return None
        rates, limit = list(self.scores), self.scores[best] + USABLE * abs(self.scores[best])
        low = high = rates.index(best)
        while low > 0 and self.scores[rates[low - 1]] <= limit:
            low -= 1
        while high < len(rates) - 1 and self.scores[rates[high + 1]] <= limit:
            high += 1
        return rates[low], rates[high]

    def curves(self, folder: Path, rate: float) -> Iterator[tuple[int, Curve]]:
        """Yields the seed and the curve of every run with a learning rate."""
        for row in self._by_rate()[rate]:
            found = curve(folder / "runs" / row["run"], row, self.about)
            if found is not None:
                yield row["seed"], found


def groups(rows: Sequence[Row], about: About) -> list[Group]:
    """Returns the groups of a table, in its order of optimizers, then by batch size."""
    kept = _group_keys(rows)
    by_key: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row["optimizer"], *(row.get(name) for name in kept), row["batch_size"])
        by_key.setdefault(key, []).append(row)
    made = [
        Group(
            ", ".join([key[0], *(f"{n}={v}" for n, v in zip(kept, key[1:-1], strict=True)
                                 if v is not None)]),
            key[-1], each, about,
        )
        for key, each in by_key.items()
    ]  # fmt: skip
    order = list(dict.fromkeys(group.label for group in made))
    return sorted(made, key=lambda group: (order.index(group.label), group.batch_size))


def _group_keys(rows: Sequence[Row]) -> list[str]:
    """Returns the keys of the config that vary among the runs of one optimizer."""
    names = [
        name
        for row in rows[:1]
        for name in row
        if "." in name and name not in _OTHERS and not name.startswith("best_")
    ]
    found = []
    for name in names:
        for optimizer in {row["optimizer"] for row in rows}:
            if len({row.get(name) for row in rows if row["optimizer"] == optimizer}) > 1:
                found.append(name)
                break
    return found


def curve(run_folder: Path, row: Row, about: About) -> Curve | None:
    """Returns the held-out metric of a run, or None if it has no evaluation."""
    path = run_folder / "metrics.jsonl"
    seen = records.read(path) if path.exists() else None
    if seen is None or about.metric not in seen.held_out:
        return None
    steps, values = seen.held_out[about.metric]
    per_step = row["examples"] / max(row["steps"], 1)
    nothing = (np.empty(0), np.empty(0))
    at, units = seen.train.get(about.unit, nothing)
    rates = seen.train.get(f"{about.unit}_per_second", nothing)[1]
    seconds = np.full(steps.shape, np.nan)
    if at.size and rates.size == at.size:
        spent = np.diff(units, prepend=0) / rates
        spent = np.where(np.isfinite(spent), spent, 0)
        seconds = np.interp(steps, at, np.cumsum(spent))
    sign = -1.0 if about.higher_is_better else 1.0
    return Curve(steps, sign * values, steps * per_step, seconds)
