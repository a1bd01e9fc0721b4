"""How the runs of a sweep ended: a file in each run folder, and the table of all of them.

``results.jsonl`` has one flat object per run, so that ``pandas.read_json("results.jsonl",
lines=True)`` reads it:

- ``run``, ``status`` (``finished``, ``diverged`` or ``failed``), ``optimizer``, ``learning_rate``,
  ``batch_size``, ``seed``, and every key that the sweep sets, such as ``optimizer.weight_decay``;
- each held-out metric of the task after the last step (``loss``, ``accuracy``), the best one of all
  evaluations (``best_loss``), and the last logged ``train_loss``;
- ``steps``, ``examples``, ``seconds`` (of the process), ``exit_code``, and ``message``, the last
  line that a run without success printed.

The table is made from the run folders alone, so that a sweep that was killed and started again ends
with the same one, but for the seconds.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optim_zoo.errors import UserError
from optim_zoo.lab import folder
from optim_zoo.lab.processes import ERRORS
from optim_zoo.lab.sweep_file import higher_is_better
from optim_zoo.lab.trials import Trial, folder_of
from optim_zoo.train import records
from optim_zoo.train.files import replace_file

FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"
USER_ERROR = 2  # the exit code of a run that ends with a sentence
STOPPED = (75, 129, 130, 138, 143, -1, -2, -10, -15)
"""Exit codes of a run that was stopped and resumes: a lost process, or a signal."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: str  # "finished", "diverged" or "failed"
    exit_code: int
    message: str  # "" for a finished run
    seconds: float


def of_process(run_folder: Path, exit_code: int, seconds: float) -> Outcome | None:
    """Returns how a process ended, or None if it was stopped and resumes.

    A run that ends with a sentence after it has logged steps has diverged: its loss, gradient or
    parameters were no longer finite, or too many steps in a row were skipped.
    """
    if exit_code in STOPPED:
        return None
    if exit_code == 0:
        return Outcome(FINISHED, 0, "", seconds)
    began = exit_code == USER_ERROR and _has_steps(run_folder)
    return Outcome(
        DIVERGED if began else FAILED, exit_code, _message(run_folder, exit_code), seconds
    )


def save(run_folder: Path, outcome: Outcome) -> None:
    """Records in its folder how a run ended."""
    text = json.dumps(dataclasses.asdict(outcome), ensure_ascii=False)
    replace_file(run_folder / folder.OUTCOME, text.encode() + b"\n")


def load(run_folder: Path) -> Outcome | None:
    """Returns how a run ended, or None if it has not ended."""
    path = run_folder / folder.OUTCOME
    return Outcome(**folder.read_json(path)) if path.exists() else None


def write_table(sweep_folder: Path, trials: Iterable[Trial]) -> list[dict[str, Any]]:
    """Writes ``results.jsonl`` from the runs that have ended, and returns its rows.

    A run whose folder cannot be read is left out of the table by raising.

    Raises:
      UserError: a file of a run folder is damaged, or the table cannot be written.
    """
    every = list(trials)
    keys = list(dict.fromkeys(key for trial in every for key in trial.keys))
    rows = [row for trial in every if (row := _row(sweep_folder, trial, keys)) is not None]
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    replace_file(sweep_folder / folder.RESULTS, text.encode())
    return rows


def read_table(sweep_folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of ``results.jsonl``; none if it does not exist yet.

    Raises:
      UserError: it cannot be read.
    """
    path = sweep_folder / folder.RESULTS
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path}: remove it, and start the sweep again to write a new one"
        ) from error


def score(row: Mapping[str, Any] | None, metric: str, larger: bool) -> float:
    """Returns the metric of a run, negated if a larger value is better.

    It is infinite for a run that has not finished, or whose metric is not finite.

    Args:
      row: the row of the table.
      metric: such as ``loss``.
      larger: whether a larger value of the metric is better.
    """
    value = row.get(metric) if row is not None and row["status"] == FINISHED else None
    return math.inf if value is None else (-value if larger else value)


def _row(sweep_folder: Path, trial: Trial, keys: Sequence[str]) -> dict[str, Any] | None:
    """Returns the row of a run, or None if it has not ended."""
    run_folder = folder_of(sweep_folder, trial)
    outcome = load(run_folder)
    if outcome is None:
        return None
    row: dict[str, Any] = {
        "run": trial.id,
        "status": outcome.status,
        "optimizer": trial.optimizer,
        "learning_rate": trial.rate,
        "batch_size": trial.batch_size,
        "seed": trial.seed,
    }
    row |= {key: trial.keys.get(key) for key in keys}
    steps, held_out, train_loss = _figures(run_folder)
    for name, values in held_out.items():
        finite = [value for value in values if math.isfinite(value)]
        best = (max if higher_is_better(name) else min)(finite, default=math.nan)
        row |= {name: values[-1], f"best_{name}": best}
    row |= {
        "train_loss": train_loss,
        "steps": steps,
        "examples": examples(trial, steps),
        "seconds": round(outcome.seconds, 2),
        "exit_code": outcome.exit_code,
        "message": outcome.message,
    }
    return {key: _plain(value) for key, value in row.items()}


def _plain(value: Any) -> Any:
    """Returns a value for JSON, which has no NaN; lists become their text, to keep rows flat."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return json.dumps(value) if isinstance(value, list | dict) else value


def examples(trial: Trial, steps: int) -> int:
    """Returns the number of examples that a run has used after some steps."""
    used = zip(trial.config.batches_after(steps), trial.config.stages, strict=True)
    return sum(batches * stage.batch_size for batches, stage in used)


def _figures(run_folder: Path) -> tuple[int, Mapping[str, Sequence[float]], float]:
    """Returns the last logged step, the held-out metrics, and the last training loss of a run."""
    path = run_folder / "metrics.jsonl"
    if not path.exists():
        return 0, {}, math.nan
    seen = records.read(path)
    losses = seen.train["loss"][1] if "loss" in seen.train else np.empty(0)
    held_out = {name: [float(x) for x in values] for name, (_, values) in seen.held_out.items()}
    last = int(max(seen.steps, default=0))
    return last, held_out, float(losses[-1]) if len(losses) else math.nan


def _has_steps(run_folder: Path) -> bool:
    """Returns whether a run has logged a step."""
    path = run_folder / "metrics.jsonl"
    return path.exists() and records.read(path).steps.size > 0


def _message(run_folder: Path, exit_code: int) -> str:
    """Returns the last line that a failed run has printed."""
    path = run_folder / ERRORS
    lines = path.read_text("utf-8", errors="replace").split("\n") if path.exists() else []
    text = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if exit_code < 0 and not text:
        return f"ended by signal {-exit_code}"
    return text.removeprefix("optim-zoo: ")
