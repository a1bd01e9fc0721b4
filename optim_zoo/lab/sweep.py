"""Runs a sweep: every combination of a grid, or a search for the learning rate of each optimizer.

The sweep is a function of its file and of the run folders: runs that have ended are not repeated,
runs that were stopped resume from their checkpoints, and the table is written anew after each run.
"""

import collections
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from optim_zoo.errors import UserError
from optim_zoo.lab import folder, in_process, processes, results, search
from optim_zoo.lab.processes import Command
from optim_zoo.lab.results import Outcome
from optim_zoo.lab.sweep_file import RATE, SEED, Sweep, coarse_grid
from optim_zoo.lab.trials import Point, Trial, folder_of, grid, points, trial, unique
from optim_zoo.train import saved_config
from optim_zoo.train.files import replace_file

Rows = list[dict[str, Any]]


class Runner(Protocol):
    """Runs trials, and calls ``ended`` for each, with None if the run was stopped."""

    def __call__(
        self, trials: Sequence[Trial], ended: Callable[[Trial, Outcome | None], Any]
    ) -> None:
        """Returns when all trials have ended."""


def run(sweep: Sweep, say: Callable[[str], Any] = print, runner: Runner | None = None) -> Rows:
    """Runs what is left of a sweep, and returns the rows of its table.

    Args:
      sweep: the sweep.
      say: receives a line about each run that has ended.
      runner: runs the trials; by default each in a process of its own, or in this one if the
        sweep says so.

    Raises:
      UserError: a config of the sweep is not allowed, or its folder belongs to something else.
      processes.Interrupted: a signal has stopped the sweep.
    """
    first = _first(sweep)  # finds every mistake in the configs before anything runs
    if sweep.in_process:
        in_process.check(sweep, first)
    with folder.alone_in(sweep.folder):
        folder.check(sweep)
        state = _State(sweep, say, runner or _runner(sweep))
        say(_budget(sweep, first))
        if sweep.search is None:
            state.run(first)
        else:
            _search(sweep, state)
        return state.table()


def _runner(sweep: Sweep) -> Runner:
    if sweep.in_process:
        return in_process.InProcess(sweep.folder)
    return Processes(sweep.folder, sweep.jobs)


class _State:
    """The runs of a sweep that are known, and how those that have ended ended."""

    def __init__(self, sweep: Sweep, say: Callable[[str], Any], runner: Runner) -> None:
        self._sweep, self._say, self._runner = sweep, say, runner
        self._trials: dict[str, Trial] = {}

    def run(self, trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
        """Runs those of the trials that have not ended; returns the rows of the table by id."""
        self._trials |= {trial.id: trial for trial in trials}
        left = [trial for trial in trials if not self._is_done(trial)]
        if self._sweep.in_process:
            left = in_process.with_whole_groups(trials, left)
        if len(left) < len(trials):
            self._say(f"{len(trials) - len(left)} of {len(trials)} runs have ended before")
        self.table()
        if left:
            self._runner(left, self._ended)
        return {row["run"]: row for row in self.table()}

    def table(self) -> Rows:
        """Writes the table and returns its rows."""
        return results.write_table(self._sweep.folder, self._trials.values())

    def _is_done(self, trial: Trial) -> bool:
        outcome = results.load(folder_of(self._sweep.folder, trial))
        again = self._sweep.retry and outcome is not None and outcome.status == results.FAILED
        return outcome is not None and not again

    def _ended(self, trial: Trial, outcome: Outcome | None) -> None:
        if outcome is None:
            self._say(f"stopped: {trial}")
            return
        results.save(folder_of(self._sweep.folder, trial), outcome)
        row = next(row for row in self.table() if row["run"] == trial.id)
        self._say(f"{outcome.status}: {trial}: {_result(row, self._sweep.metric)}")


def _result(row: dict[str, Any], metric: str) -> str:
    """Returns what to print about a run that has ended."""
    if row["status"] != results.FINISHED:
        return str(row["message"])
    value = row.get(metric)
    if metric not in row:
        known = ", ".join(name.removeprefix("best_") for name in row if name.startswith("best_"))
        raise UserError(f"the task has no held-out metric {metric!r}; it has {known}: set metric")
    return f"{metric} {value if value is None else format(value, '.4f')}, {row['seconds']:.0f} s"


class Processes:
    """Runs each trial in a process of its own, which is ``optim-zoo train``."""

    def __init__(self, sweep_folder: Path, jobs: int) -> None:
        self._folder, self._jobs = sweep_folder, jobs

    def __call__(
        self, trials: Sequence[Trial], ended: Callable[[Trial, Outcome | None], Any]
    ) -> None:
        """See `Runner`."""
        by_folder = {folder_of(self._folder, trial): trial for trial in trials}

        def after(command: Command, exit_code: int, seconds: float) -> None:
            outcome = results.of_process(command.folder, exit_code, seconds)
            ended(by_folder[command.folder], outcome)

        commands = [_command(run_folder, trial) for run_folder, trial in by_folder.items()]
        processes.run(commands, self._jobs, after)


def _command(run_folder: Path, trial: Trial) -> Command:
    """Returns the command that trains in a run folder, and writes the config that it reads."""
    run_folder.mkdir(parents=True, exist_ok=True)
    file = run_folder / "trial.toml"
    replace_file(file, saved_config.of_run(trial.config, run_folder).encode())
    program = [sys.executable, "-m", "optim_zoo.cli", "train"]
    return Command([*program, str(file), f"run.dir={run_folder}"], run_folder)


# Search


def _first(sweep: Sweep) -> list[Trial]:
    """Returns all runs of a grid, or the first ones of a search."""
    if sweep.search is None:
        return grid(sweep)
    return unique(
        _trial(sweep, point, rate, _search_seed(sweep))
        for point in points(sweep)
        for rate in coarse_grid(sweep, point.variant)
    )


def _search_seed(sweep: Sweep) -> int | None:
    assert sweep.search is not None
    return sweep.search.seeds[0] if sweep.search.seeds else None


def _trial(sweep: Sweep, point: Point, rate: float, seed: int | None) -> Trial:
    keys = {**point.keys, RATE: rate}
    if seed is not None and SEED not in sweep.fixed:
        keys[SEED] = seed
    return trial(sweep, point.variant, keys)


def _search(sweep: Sweep, state: _State) -> None:
    """Searches for the learning rate of every point at the same time, then runs the other seeds."""
    assert sweep.search is not None
    seed = _search_seed(sweep)
    found = [(point, collections.OrderedDict[float, float]()) for point in points(sweep)]

    def round_of_trials() -> Iterator[tuple[dict[float, float], float, Trial]]:
        for point, scores in found:
            coarse = coarse_grid(sweep, point.variant)
            for rate in search.next_rates(scores, coarse, sweep.search.runs):  # type: ignore[union-attr]
                yield scores, rate, _trial(sweep, point, rate, seed)

    while due := list(round_of_trials()):
        rows = state.run(unique(trial for _, _, trial in due))
        for scores, rate, each in due:
            scores[rate] = results.score(rows.get(each.id), sweep.metric, sweep.higher_is_better)
    best = [(point, search.best_rate(scores)) for point, scores in found]
    interior = [(point, pair[0]) for point, pair in best if pair is not None and pair[1]]
    others = sweep.search.seeds[1:]
    if others and interior:
        state.run(unique(_trial(sweep, p, rate, s) for s in others for p, rate in interior))


def _budget(sweep: Sweep, first: Sequence[Trial]) -> str:
    """Returns the budget of the sweep in words."""
    steps = sorted({trial.config.total_steps for trial in first})
    length = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
    how = "in one process" if sweep.in_process else f"{sweep.jobs} at a time"
    if sweep.search is None:
        return f"{len(first)} runs of {length} steps in {sweep.folder}, {how}"
    count = len(list(points(sweep)))
    more = f", then the best with {len(sweep.search.seeds)} seeds" if sweep.search.seeds[1:] else ""
    return (
        f"{count} searches of {sweep.search.runs} learning rates each, runs of {length} steps"
        f"{more}; in {sweep.folder}, {how}"
    )
