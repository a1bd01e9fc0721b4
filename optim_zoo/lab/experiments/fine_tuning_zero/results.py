"""The figures of all runs, in ``results.jsonl``: a line as soon as a run has ended."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optim_zoo.lab.experiments.fine_tuning_zero.arms import ARMS, BASE, Arm
from optim_zoo.lab.experiments.fine_tuning_zero.settings import Scale
from optim_zoo.lab.experiments.fine_tuning_zero.training import Curve
from optim_zoo.train.files import replace_file

_DIGITS = 6  # significant digits of the lists


@dataclasses.dataclass(frozen=True)
class Row:
    """One run."""

    arm: str
    optimizer: str
    learning_rate: float
    seed: int
    steps: int
    batch_size: int
    status: str  # "finished", or "diverged" where the held-out loss is not finite
    f1: float
    loss: float | None  # in nats; None where it is not finite
    evaluated: Sequence[Sequence[float]]  # (step, F1 of a part of the held-out batches)
    norm: Sequence[float]  # see `Curve`
    distance: Sequence[float]
    seconds: float

    @classmethod
    def of(cls, arm: Arm, rate: float, seed: int, scale: Scale, curve: Curve) -> "Row":
        """Returns the row of a run that has ended."""
        finite = math.isfinite(curve.loss)
        return cls(
            arm=arm.name,
            optimizer=arm.optimizer,
            learning_rate=rate,
            seed=seed,
            steps=scale.steps,
            batch_size=scale.batch_size,
            status="finished" if finite else "diverged",
            f1=curve.f1,
            loss=curve.loss if finite else None,
            evaluated=[(step, float(f"{f1:.{_DIGITS}g}")) for step, f1 in curve.evaluated],
            norm=[float(f"{x:.{_DIGITS}g}") for x in curve.norm],
            distance=[float(f"{x:.{_DIGITS}g}") for x in curve.distance],
            seconds=round(curve.seconds, 1),
        )


class Results:
    """The runs that have ended."""

    def __init__(self, path: Path, scale: Scale, rate: float) -> None:
        """Reads the file of a run that was stopped, if there is one.

        Args:
          path: ``results.jsonl``.
          scale: rows of another size are dropped.
          rate: the learning rate of BERT's AdamW.
        """
        self.scale, self.rate, self._path = scale, rate, path
        self.rows: list[Row] = []
        for line in path.read_text().splitlines() if path.exists() else []:
            row = Row(**json.loads(line))
            if (row.steps, row.batch_size) == (scale.steps, scale.batch_size):
                self.rows.append(row)

    def add(self, row: Row) -> None:
        """Adds a run, and writes the file anew."""
        self.rows.append(row)
        lines = "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in self.rows)
        replace_file(self._path, lines.encode())

    def has(self, arm: Arm, rate: float, seed: int) -> bool:
        """Returns whether a run has ended."""
        return any(
            (row.arm, row.seed) == (arm.name, seed) and math.isclose(row.learning_rate, rate)
            for row in self.rows
        )

    def of(self, arm: str) -> list[Row]:
        """Returns the runs of an arm, by seed."""
        return sorted((row for row in self.rows if row.arm == arm), key=lambda row: row.seed)

    def arms(self) -> list[Arm]:
        """Returns the arms that have a run for every seed, in their order."""
        return [arm for arm in ARMS if len(self.of(arm.name)) == len(self.scale.seeds)]

    def values(self, arm: str, name: str) -> np.ndarray:
        """Returns a field of all runs of an arm, the seeds first."""
        found: Any = [getattr(row, name) for row in self.of(arm)]
        return np.array(found, np.float64)

    def movement(self, arm: str) -> float:
        """Returns how far an arm moves, divided by how far BERT's AdamW does: a mean over seeds."""
        ends = (self.values(name, "distance")[:, -1].mean() for name in (arm, BASE))
        distance, of_base = ends
        return float(distance / of_base)

    def rate_of(self, arm: Arm) -> float:
        """Returns the learning rate of an arm, whose predecessor has ended if it has one."""
        if not arm.raised_from:
            return self.rate
        return float(f"{self.rate / self.movement(arm.raised_from):.3g}")
