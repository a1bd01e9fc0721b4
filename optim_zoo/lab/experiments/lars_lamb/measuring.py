"""Trains attention and an MLP with every optimizer and learning rate."""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from optim_zoo.lab.experiments import Say, byte_problem, training
from optim_zoo.lab.experiments.optimizers import OPTIMIZERS, Optimizer, grid
from optim_zoo.lab.experiments.tuning import Row, RunLog, Train, Tuned, columns, tune
from optim_zoo.train.tasks import digits
from optim_zoo.train.tasks.base import Setup
from optim_zoo.train.tasks.byte_language.sections import Model


@dataclasses.dataclass(frozen=True)
class Scale:
    """The size of the experiment, equal for both tasks and every optimizer."""

    batch: int
    examples: int
    micro_size: int
    rates: int  # of the coarse grid
    budget: int  # learning rates that are tried
    seeds: tuple[int, ...]  # of every rate
    model: Model
    sequence_length: int
    mlp: digits.Model
    optimizers: tuple[str, ...]


NAMES = tuple(optimizer.name for optimizer in OPTIMIZERS)
FULL = Scale(128, 16_384, 32, 5, 8, (0, 1, 2), Model(), 32, digits.Model(2, 64), NAMES)
QUICK = Scale(4, 16, 2, 3, 3, (0, 1), Model(0, 4, 1, 4), 4, digits.Model(0, 4), ("lamb", "lars"))


@dataclasses.dataclass(frozen=True)
class Kind:
    """A task, and the middle of the coarse grid of each optimizer."""

    name: str
    title: str
    excluded: Sequence[str]  # patterns of what is neither decayed nor given a trust ratio
    middles: Mapping[str, float]


KINDS = (
    Kind(
        "byte_language",
        "attention (bytes)",
        byte_problem.EXCLUDED,
        MappingProxyType({"momentum": 0.5, "adamw": 6e-3, "lamb": 2e-2, "lars": 0.2}),
    ),
    Kind(
        "digits",
        "images (MLP on digits)",
        ("bias",),
        MappingProxyType({"momentum": 0.2, "adamw": 1e-2, "lamb": 3e-2, "lars": 0.5}),
    ),
)


@dataclasses.dataclass(frozen=True)
class Result:
    """The search of one optimizer on one task."""

    kind: Kind
    optimizer: Optimizer
    tuned: Tuned


def measure(scale: Scale, log: RunLog, say: Say) -> list[Result]:
    """Trains everything, or reads it from the log."""
    results = []
    for kind in KINDS:
        problem = _problem(kind, scale)
        for optimizer in (each for each in OPTIMIZERS if each.name in scale.optimizers):
            tuned = tune(
                _train(kind, optimizer, scale, problem, log),
                grid(kind.middles[optimizer.name], scale.rates),
                scale.budget,
                search_seeds=scale.seeds,
                seeds=scale.seeds,
            )
            results.append(Result(kind, optimizer, tuned))
            say(
                f"{kind.title}, {optimizer.title}: loss {tuned.best_losses.mean():.3f} at rate "
                f"{tuned.best}"
            )
    return results


def _problem(kind: Kind, scale: Scale) -> training.Problem:
    if kind.name == "byte_language":
        return byte_problem.problem(
            scale.model, scale.sequence_length, scale.examples, scale.micro_size
        )
    stages = [byte_problem.stage(scale.batch)]
    setup = Setup({"model": scale.mlp}, stages, 0, 1, Path(tempfile.gettempdir()))
    return training.Problem(digits.Digits(setup), scale.examples, scale.micro_size)


def _train(
    kind: Kind, optimizer: Optimizer, scale: Scale, problem: training.Problem, log: RunLog
) -> Train:
    run = training.program(problem, lambda rate: optimizer.make(rate, kind.excluded), scale.batch)

    def train(rate: float, seed: int) -> Row:
        keys = {
            "task": kind.name,
            "optimizer": optimizer.name,
            "learning_rate": rate,
            "seed": seed,
        }
        return log.row(keys, lambda: columns(run(rate, seed)))

    return train
