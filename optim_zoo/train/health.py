"""Checks that end a run with a sentence when it can no longer produce useful parameters."""

import math
from collections.abc import Mapping
from typing import Any

import optax

from optim_zoo import guards
from optim_zoo.errors import UserError
from optim_zoo.train.checkpoints import Checkpoints
from optim_zoo.train.job import Job
from optim_zoo.train.run_folder import saved_steps
from optim_zoo.tree import Tree


class Health:
    """The checks of one run. Every process applies them to the same numbers.

    Args:
      job: the job of the run.
      checkpoints: those of the run, or None if it saves none.
    """

    def __init__(self, job: Job, checkpoints: Checkpoints | None) -> None:
        self._job, self._checkpoints = job, checkpoints

    def check_figures(self, done: int, figures: Mapping[str, Any]) -> None:
        """Checks the loss and the gradient norm of step ``done``, unless a guard skips such steps.

        Raises:
          UserError: one is not finite.
        """
        if not self._job.config.guards.nonfinite:
            self.check_finite({name: figures[name] for name in ("loss", "gradient_norm")}, done)

    def check_skipped(self, done: int, state: Tree) -> None:
        """Checks how many steps in a row the guards have skipped.

        Args:
          done: the number of steps made.
          state: the optimizer state as returned by the step, with one copy per device in mode
            "pmap".

        Raises:
          UserError: more than ``guards.max_consecutive`` allows.
        """
        try:
            guards.check(state)
        except guards.TooManyRefusals as error:
            raise UserError(
                f"up to step {done}, {error.in_a_row} steps in a row were skipped, at most "
                f"{error.limit - 1} are allowed ({error.total} in all); {self._kept()}: lower "
                f"schedule.learning_rate, warm up for longer, or raise guards.max_consecutive"
            ) from error

    def check_evaluation(self, done: int, metrics: Mapping[str, float]) -> None:
        """Checks the held-out metrics.

        Raises:
          UserError: one is not finite.
        """
        self.check_finite({f"held-out {name}": value for name, value in metrics.items()}, done)

    def check_parameters(self, done: int, params: Tree) -> None:
        """Checks the parameters before they are saved.

        A finite loss and gradient can lead to parameters that are not finite, or to parameters so
        large that the norms of the next step overflow.

        Raises:
          UserError: their norm is not finite.
        """
        self.check_finite({"parameter norm": optax.tree.norm(params)}, done)

    def check_finite(self, numbers: Mapping[str, Any], done: int) -> None:
        """Raises `UserError` unless all numbers are finite."""
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise UserError(
                    f"the {name.replace('_', ' ')} is {value} at step {done} ({self._kept()}): "
                    f"lower schedule.learning_rate or warm up for longer"
                )

    def _kept(self) -> str:
        """Says which step is saved."""
        if self._checkpoints is not None:
            self._checkpoints.wait()  # for a save in progress
        saved = saved_steps(self._job.folder)
        return f"step {saved[-1]} is saved" if saved else "no checkpoint was saved"
