"""Trains with every optimizer at every batch size: tuned, and scaled from the smallest batch."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from optim_zoo.lab import fits
from optim_zoo.lab.experiments import Say, byte_problem, training
from optim_zoo.lab.experiments.optimizers import OPTIMIZERS, Optimizer, grid
from optim_zoo.lab.experiments.tuning import Row, RunLog, Train, Tuned, columns, losses, tune
from optim_zoo.train.tasks.byte_language.sections import Model

# The middle of the coarse grid at the smallest batch.
MIDDLES = MappingProxyType({"momentum": 0.3, "adamw": 3e-3, "lamb": 1e-2, "lars": 0.1})
NOISE_DECAY = 0.9
NOISE_AT = (0.25, 0.5, 0.75, 1.0)  # fractions of the run at which the noise scale is reported


@dataclasses.dataclass(frozen=True)
class Scale:
    """The size of the experiment, equal for every optimizer."""

    batches: tuple[int, ...]
    examples: int  # of every run
    micro_size: int
    rates: int  # of the coarse grid
    budget: int  # learning rates that are tried at each batch size
    seeds: tuple[int, ...]  # the first one is that of the search
    noise_batch: int  # the batch size at which the noise scale is measured
    model: Model
    sequence_length: int
    optimizers: tuple[str, ...]

    def steps(self, batch: int) -> int:
        """Returns the steps of a run, so that the number of examples is fixed."""
        return self.examples // batch


NAMES = tuple(optimizer.name for optimizer in OPTIMIZERS)
FULL = Scale((32, 128, 512, 2048), 32_768, 32, 5, 7, (0, 1, 2), 512, Model(), 32, NAMES)
QUICK = Scale((2, 8), 32, 2, 3, 3, (0, 1), 8, Model(0, 4, 1, 4), 4, ("adamw", "lamb"))


def scaled(rate: float, batch: int, smallest: int) -> float:
    """Returns a rate of the smallest batch scaled by the square root of the batch size."""
    return float(f"{rate * math.sqrt(batch / smallest):.4g}")


@dataclasses.dataclass(frozen=True)
class Result:
    """All runs of one optimizer."""

    optimizer: Optimizer
    tuned: Mapping[int, Tuned]  # by batch size
    untuned: Mapping[int, Sequence[Row]]  # by batch size: one row for each seed

    def untuned_losses(self, batch: int) -> np.ndarray:
        """Returns the loss of each seed at the rate that the square-root rule gives."""
        return losses(self.untuned[batch])

    def exponent(self) -> float | None:
        """Returns p of the least-squares line ``best rate ~ batch^p``, of interior best rates."""
        points = [(b, t.best) for b, t in self.tuned.items() if t.interior and t.best]
        if len(points) < 2:
            return None
        batches, rates = np.log(np.array(points)).T
        return float(np.polyfit(batches, rates, 1)[0])

    def interior_rows(self) -> Mapping[int, Sequence[Row]]:
        """Returns the runs at the best rate, by batch size, where that is interior."""
        return {
            batch: each.rows[each.best]
            for batch, each in self.tuned.items()
            if each.interior and each.best and np.isfinite(each.best_losses).all()
        }


@dataclasses.dataclass(frozen=True)
class Noise:
    """The gradient noise scale during runs of AdamW, in examples."""

    batch: int
    rate: float
    values: np.ndarray  # (seeds, steps); infinite where it is not measurable

    def during(self) -> np.ndarray:
        """Returns the values at the fractions of the run in `NOISE_AT`, (seeds, fractions)."""
        steps = self.values.shape[1]
        return self.values[:, [max(0, round(f * steps) - 1) for f in NOISE_AT]]

    def at(self, target: "Target") -> np.ndarray:
        """Returns the value of each seed at the step where the run reaches a target, (seeds,).

        It is empty where not all runs of this batch size reach it.
        """
        steps = target.steps.get(self.batch, [])
        if len(steps) != len(self.values):
            return np.empty(0)
        return np.array(
            [row[round(step) - 1] for row, step in zip(self.values, steps, strict=True)]
        )


def measure(scale: Scale, log: RunLog, say: Say) -> tuple[list[Result], Noise]:
    """Trains everything, or reads it from the log."""
    problem = _problem(scale)
    results = []
    for optimizer in OPTIMIZERS:
        if optimizer.name in scale.optimizers:
            results.append(_result(optimizer, scale, problem, log, say))
    (adamw,) = (each for each in results if each.optimizer.name == "adamw")
    return results, _noise(adamw, scale, problem, log)


@functools.lru_cache(maxsize=1)
def _problem(scale: Scale) -> training.Problem:
    return byte_problem.problem(
        scale.model, scale.sequence_length, scale.examples, scale.micro_size
    )


def _result(
    optimizer: Optimizer, scale: Scale, problem: training.Problem, log: RunLog, say: Say
) -> Result:
    smallest = scale.batches[0]
    tuned: dict[int, Tuned] = {}
    untuned: dict[int, Sequence[Row]] = {}
    for batch in scale.batches:
        train = _train(optimizer, batch, problem, log)
        middle = scaled(MIDDLES[optimizer.name], batch, smallest)
        tuned[batch] = tune(
            train,
            grid(middle, scale.rates),
            scale.budget,
            search_seeds=scale.seeds[:1],
            seeds=scale.seeds,
        )
        base = tuned[smallest].best
        if base is not None:
            rate = scaled(base, batch, smallest)
            untuned[batch] = [train(rate, seed) for seed in scale.seeds]
        say(
            f"{optimizer.title}, batch {batch:,}: loss {tuned[batch].best_losses.mean():.3f} at "
            f"rate {tuned[batch].best}"
        )
    return Result(optimizer, tuned, untuned)


def _train(optimizer: Optimizer, batch: int, problem: training.Problem, log: RunLog) -> Train:
    run = training.program(problem, lambda rate: optimizer.make(rate, byte_problem.EXCLUDED), batch)

    def train(rate: float, seed: int) -> Row:
        keys = {
            "optimizer": optimizer.name,
            "batch_size": batch,
            "learning_rate": rate,
            "seed": seed,
        }
        return log.row(keys, lambda: columns(run(rate, seed)))

    return train


def _noise(adamw: Result, scale: Scale, problem: training.Problem, log: RunLog) -> Noise:
    batch = scale.noise_batch
    rate = adamw.tuned[batch].best or MIDDLES["adamw"]

    def make(schedule: Any) -> Any:
        return adamw.optimizer.make(schedule, byte_problem.EXCLUDED)

    def measured(seed: int) -> Mapping[str, Any]:
        values = training.noise_scales(problem, make, batch, rate, seed, NOISE_DECAY)
        return {"noise_scale": [float(x) for x in values]}

    rows = []
    for seed in scale.seeds:
        keys = {"measured": "noise_scale", "batch_size": batch, "learning_rate": rate, "seed": seed}
        rows.append(log.row(keys, functools.partial(measured, seed))["noise_scale"])
    values = np.array(
        [[np.inf if value is None else value for value in row] for row in rows], np.float64
    )
    return Noise(batch, rate, values)


@dataclasses.dataclass(frozen=True)
class Target:
    """The steps of one optimizer to a loss."""

    optimizer: Optimizer
    loss: float | None  # None if no best rate is interior
    steps: Mapping[int, list[float]]  # by batch size: one number for each seed
    fit: fits.Fit | str


def targets(results: Sequence[Result], scale: Scale, batches: Sequence[int]) -> list[Target]:
    """Returns the steps to the loss that every tuned run of an optimizer reaches.

    The loss is the training loss, of examples that are new to the model, rounded up to 0.01. Of
    every batch size the learning rate is that with the lowest held-out loss after the last step;
    batch sizes where that is not interior are left out.

    Args:
      results: the runs of every optimizer.
      scale: the size of the experiment.
      batches: the batch sizes at which the loss must be reached.
    """
    found = []
    for result in results:
        rows = {b: each for b, each in result.interior_rows().items() if b in batches}
        lowest = [min(row["curve"]) for each in rows.values() for row in each]
        loss = math.ceil(100 * max(lowest)) / 100 if lowest else None
        steps: dict[int, list[float]] = {}
        for batch, each in rows.items():
            at = training.curve_steps(scale.steps(batch)) + 1
            crossings = [fits.crossing(at, np.array(row["curve"]), loss or 0.0) for row in each]
            steps[batch] = [crossing for crossing in crossings if crossing is not None]
        found.append(Target(result.optimizer, loss, steps, fits.fit(steps)))
    return found
