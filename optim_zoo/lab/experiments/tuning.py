"""The search for a learning rate by `optim_zoo.lab.search`, whose runs a file keeps."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optim_zoo.lab import search
from optim_zoo.lab.experiments.training import Outcome
from optim_zoo.train.files import replace_file

DIVERGED = 20.0  # nats: a run whose loss is above this has diverged

Row = Mapping[str, Any]
Train = Callable[[float, int], Row]  # learning rate, seed -> the row of the run


class RunLog:
    """The rows of ``results.jsonl``. An experiment that was stopped continues with them."""

    def __init__(self, path: Path, setting: str) -> None:
        """Reads the rows of the same setting, and removes those of other ones.

        Args:
          path: the file, which may be missing. A last line that is incomplete is dropped.
          setting: everything that the rows do not say, such as the sizes of the model.
        """
        self.path, self.setting = path, setting
        self._rows: dict[str, Row] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row["setting"] == setting:
                self._rows[row["run"]] = row
        replace_file(path, "".join(map(_line, self._rows.values())).encode())

    @property
    def seconds(self) -> float:
        """The time of all runs."""
        return sum(row["seconds"] for row in self._rows.values())

    def row(self, run: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> Row:
        """Returns the row of a run, which ``make`` completes unless the file has it.

        Args:
          run: what identifies the run: flat and printable.
          make: returns the other columns.
        """
        name = " ".join(f"{key}={value}" for key, value in run.items())
        if name not in self._rows:
            began = time.perf_counter()
            made = make()
            seconds = time.perf_counter() - began
            row = {"run": name, **run, **made, "seconds": seconds, "setting": self.setting}
            with self.path.open("a") as file:
                file.write(_line(row))
            self._rows[name] = json.loads(_line(row))
        return self._rows[name]


def _line(row: Row) -> str:
    # JSON has no NaN: a number that is not finite is null.
    def finite(value: Any) -> Any:
        if isinstance(value, list):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({key: finite(value) for key, value in row.items()}) + "\n"


def columns(outcome: Outcome) -> dict[str, Any]:
    """Returns the columns of a run."""
    status = "finished" if outcome.metrics["loss"] <= DIVERGED else "diverged"  # or NaN
    return {"status": status, **outcome.metrics, "curve": [float(x) for x in outcome.curve]}


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The runs of one search."""

    rows: Mapping[float, Sequence[Row]]  # rate -> one row for each seed
    best: float | None  # None if every run has diverged
    interior: bool  # whether rates were tried on both sides of the best one

    def losses(self, rate: float) -> np.ndarray:
        """Returns the held-out loss of each seed; infinite where a run diverged."""
        return losses(self.rows[rate])

    @property
    def best_losses(self) -> np.ndarray:
        """The held-out losses at the best rate."""
        return np.array([np.inf]) if self.best is None else self.losses(self.best)


def losses(rows: Sequence[Row]) -> np.ndarray:
    """Returns the held-out loss of each row; infinite where it is above `DIVERGED`."""
    found = np.array([np.inf if row["loss"] is None else row["loss"] for row in rows])
    return np.where(found > DIVERGED, np.inf, found)


def tune(
    train: Train,
    coarse: Sequence[float],
    budget: int,
    *,
    search_seeds: Sequence[int],
    seeds: Sequence[int],
) -> Tuned:
    """Searches for the learning rate with the lowest mean loss.

    Args:
      train: trains with a learning rate and a seed.
      coarse: the coarse grid, in ascending order.
      budget: the number of learning rates to try.
      search_seeds: the seeds of every rate.
      seeds: all seeds of the best rate; it begins with ``search_seeds``.
    """
    rows: dict[float, list[Row]] = {}
    scores: dict[float, float] = {}
    while rates := search.next_rates(scores, coarse, budget):
        for rate in rates:
            rows[rate] = [train(rate, seed) for seed in search_seeds]
            scores[rate] = float(losses(rows[rate]).mean())
    found = search.best_rate(scores)
    if found is None:
        return Tuned(rows, None, False)
    best, interior = found
    rows[best] = [train(best, seed) for seed in seeds]
    return Tuned(dict(sorted(rows.items())), best, interior)
