"""Runs of a sweep in one process, where those that differ in a few numbers are trained together.

A group holds the runs whose configs differ in the seed and the numbers of `TRACED` only. One
program trains all runs of a group (`optim_zoo.lab.together`); the groups follow one another. Such a
run writes ``metrics.jsonl`` but no checkpoints, so that a sweep that was stopped trains the groups
again that have not ended.
"""

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from optim_zoo import registry
from optim_zoo.errors import UserError
from optim_zoo.lab import folder, results, together
from optim_zoo.lab.processes import ERRORS, Interrupted, received
from optim_zoo.lab.results import USER_ERROR, Outcome
from optim_zoo.lab.sweep_file import RATE, SEED, Sweep
from optim_zoo.lab.trials import Trial, folder_of
from optim_zoo.train import optimization, saved_config
from optim_zoo.train.config import Config, Precision
from optim_zoo.train.files import replace_file
from optim_zoo.train.run_folder import saved_steps

# Decay rates of averages are left out: traced, 1 - 0.999 is rounded to float32 with an error of
# 3e-5, and the runs would differ from those in processes of their own.
TRACED = (RATE, "optimizer.weight_decay", "optimizer.trust_coefficient", "optimizer.eps")
"""The numbers that may differ within a group. A port traces the learning rate only."""


def check(sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Checks that the runs of a sweep can be trained in this process.

    Raises:
      UserError: there are several devices, or a run uses what only a process of its own has.
    """
    count = jax.device_count()
    if count > 1:
        raise UserError(
            f"{sweep.source}: in_process=true trains on one device, and this process has {count}: "
            "remove in_process, or make one device visible"
        )
    for trial in trials:
        refused = _refused(trial.config)
        if refused:
            raise UserError(
                f"{sweep.source}: in_process=true trains without {refused}, which {trial.id} has: "
                "remove it or in_process"
            )


def _refused(config: Config) -> str:
    """Returns the first key of a config that a run in a group cannot have, or ""."""
    keys = {
        "several [[stages]]": len(config.stages) > 1,
        "train.micro_batches": any(stage.micro_batches > 1 for stage in config.stages),
        "train.noise_scale": config.train.noise_scale,
        "accumulation.every": config.accumulation.every > 1,
        "averaging.decay": config.averaging.decay > 0,
        "[precision]": config.precision != Precision(),
        "output.keep_best": bool(config.output.keep_best),
        "output.sinks": bool(config.output.sinks),
        "parallel.mode": config.parallel.mode != "jit",
        "parallel.zero1": config.parallel.zero1,
        "[distributed]": config.distributed.processes > 1,
    }
    return next((key for key, used in keys.items() if used), "")


def groups(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Returns the runs that are trained together, in the order of their first runs."""
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        found.setdefault(_key(trial.config), []).append(trial)
    return list(found.values())


def with_whole_groups(trials: Sequence[Trial], left: Sequence[Trial]) -> list[Trial]:
    """Returns the runs of every group that has one in ``left``.

    A group is trained as a whole, as the rounding of a program may depend on how many runs it has.
    """
    ids = {trial.id for trial in left}
    return [each for group in groups(trials) if ids & {t.id for t in group} for each in group]


def _key(config: Config) -> str:
    """Returns a text that is equal for runs of one group."""
    tree = saved_config.sections(config)
    for key in (SEED, *values(config)):
        section, _, name = key.partition(".")
        tree[section][name] = "traced"
    return repr(tree)


def values(config: Config) -> Mapping[str, float]:
    """Returns the numbers of a config that may differ within a group, by key."""
    name = optimization.short_name(config.optimizer.name)
    tree = saved_config.sections(config)
    found = {}
    for key in TRACED if name in registry.OPTIMIZERS else (RATE,):
        section, _, argument = key.partition(".")
        value: Any = tree[section].get(argument)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[key] = float(value)
    return found


class InProcess:
    """Trains the runs in this process, one group after another: a `optim_zoo.lab.sweep.Runner`."""

    def __init__(self, sweep_folder: Path) -> None:
        self._folder = sweep_folder

    def __call__(
        self, trials: Sequence[Trial], ended: Callable[[Trial, Outcome | None], Any]
    ) -> None:
        """Runs all groups of the trials.

        Raises:
          UserError: a run has a checkpoint of a process of its own.
          Interrupted: a signal arrived.
        """
        for trial in trials:
            run_folder = folder_of(self._folder, trial)
            if saved_steps(run_folder) and results.load(run_folder) is None:
                raise UserError(
                    f"{run_folder} has a checkpoint, from which in_process=true cannot resume: "
                    "continue the sweep without in_process, or remove the folder"
                )
        with received() as signals:

            def check_signals() -> None:
                if signals:
                    raise Interrupted(signals[0])

            for group in groups(trials):
                try:
                    self._train(group, ended, check_signals)
                except Interrupted:
                    for trial in group:
                        ended(trial, None)
                    raise

    def _train(
        self,
        group: Sequence[Trial],
        ended: Callable[[Trial, Outcome | None], Any],
        check_signals: Callable[[], None],
    ) -> None:
        began = time.monotonic()
        folders = [folder_of(self._folder, trial) for trial in group]
        for run_folder, trial in zip(folders, group, strict=True):
            run_folder.mkdir(parents=True, exist_ok=True)
            # In a group that is trained again some runs may have ended.
            for name in (folder.OUTCOME, "metrics.jsonl"):
                (run_folder / name).unlink(missing_ok=True)
            text = saved_config.of_run(trial.config, run_folder)
            replace_file(run_folder / "trial.toml", text.encode())
        configs = [trial.config for trial in group]
        failures: Sequence[Exception | None]
        try:
            failures = together.train(configs, folders, [values(c) for c in configs], check_signals)
        except Interrupted:
            raise
        except Exception as error:  # the others continue, as after the crash of a process
            failures = [error] * len(group)
        seconds = (time.monotonic() - began) / len(group)
        for run_folder, trial, failure in zip(folders, group, failures, strict=True):
            code = _write_errors(run_folder, failure)
            ended(trial, results.of_process(run_folder, code, seconds))


def _write_errors(run_folder: Path, failure: Exception | None) -> int:
    """Writes what a process of its own would have printed, and returns its exit code."""
    with open(run_folder / ERRORS, "w", encoding="utf-8") as errors:
        if failure is None:
            return 0
        if isinstance(failure, UserError):
            print(failure, file=errors)
            return USER_ERROR
        traceback.print_exception(failure, file=errors)
        return 1
