"""Finds a range of learning rates: the loss while the rate rises exponentially (arXiv 1506.01186).

The loss is smoothed by an exponential average without bias. The run stops where the smoothed loss
is not finite, or has risen above its smallest value by more than its largest fall. The range begins
where a tenth of the fall is made, and ends at the smallest smoothed loss. The suggestion is a third
of the rate at the smallest loss, but not below the range.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from optim_zoo import ranges, schedules
from optim_zoo.errors import UserError
from optim_zoo.train import config_file
from optim_zoo.train.config import Choice, Config
from optim_zoo.train.config_values import user_errors
from optim_zoo.train.files import replace_file
from optim_zoo.train.job import check_batches, prepare

SMOOTHING = 0.9  # of the loss


class Found(NamedTuple):
    """The losses of the steps that were made, and what follows from them."""

    rates: Sequence[float]
    losses: Sequence[float]
    smoothed: Sequence[float]
    low: float | None  # the range; None if the loss has not fallen
    high: float | None
    suggestion: float | None


def run(
    path: Path,
    overrides: Sequence[str],
    folder: Path,
    *,
    low: float = 1e-6,
    high: float = 10.0,
    steps: int = 100,
    say: Callable[[str], Any] = print,
) -> Found:
    """Trains with a rising learning rate, and writes ``lr_find.jsonl`` and ``lr_find.png``.

    Args:
      path: the config. Only its first stage is used.
      overrides: ``section.key=value`` for keys of the config.
      folder: where to write; it must not hold a run.
      low: the learning rate of the first step.
      high: the learning rate of the last step, above ``low``.
      steps: the number of steps, at least 10.
      say: receives a line about the progress.

    Raises:
      UserError: an argument is out of its range, or the folder holds a run.
    """
    with user_errors("command line"):
        ranges.check("low", low, 0.0, open_low=True, open_high=True)
        ranges.check("high", high, low, open_low=True, open_high=True)
        ranges.check_count("steps", steps, 10)
    if (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists():
        raise UserError(f"{folder} holds a run: name another folder with run.dir=")
    config = _rising(config_file.load(path, overrides), low, high, steps)
    job = _prepared(config, folder)
    schedule = schedules.exponential(low, high, steps)
    params, state = job.init()
    rates: list[float] = []
    losses: list[float] = []
    for step in range(steps):
        params, state, loss = job.step(step, params, state)
        rates.append(float(schedule(step)))
        losses.append(float(loss))
        if diverged(smooth(losses)):
            say(f"stopped at step {step + 1}, learning rate {rates[-1]:.3g}: the loss diverges")
            break
    found = judge(rates, losses)
    lines = [
        json.dumps({"step": i + 1, "learning_rate": r, "loss": x if math.isfinite(x) else None})
        for i, (r, x) in enumerate(zip(rates, losses, strict=True))
    ]
    replace_file(folder / "lr_find.jsonl", "".join(f"{line}\n" for line in lines).encode())
    from optim_zoo.lab import lr_find_plot  # imported lazily: matplotlib takes a second

    lr_find_plot.draw(found, job.task.loss_unit, folder / "lr_find.png")
    return found


def _rising(config: Config, low: float, high: float, steps: int) -> Config:
    """Returns the config with the schedule of the test and its first stage alone."""
    arguments = {"learning_rate": low, "end_learning_rate": high}
    stage = dataclasses.replace(config.stages[0], steps=steps, schedule=arguments, table={})
    return dataclasses.replace(
        config, schedule=Choice("exponential", arguments), stages=(stage,),
        train=dataclasses.replace(config.train, steps=steps),
    )  # fmt: skip


def _prepared(config: Config, folder: Path) -> Any:
    import jax

    check_batches(config, jax.device_count())
    folder.mkdir(parents=True, exist_ok=True)
    return prepare(config, folder)


def smooth(losses: Sequence[float]) -> list[float]:
    """Returns the exponential average of the losses, divided by the sum of its weights."""
    average, smoothed = 0.0, []
    for index, loss in enumerate(losses):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed.append(average / (1 - SMOOTHING ** (index + 1)))
    return smoothed


def diverged(smoothed: Sequence[float]) -> bool:
    """Returns whether the last smoothed loss is not finite, or far above the smallest one."""
    last, least = smoothed[-1], min(smoothed)
    if not math.isfinite(last):
        return True
    fall = smoothed[0] - least
    return len(smoothed) > 10 and last - least > max(fall, 0.1 * abs(smoothed[0]))


def judge(rates: Sequence[float], losses: Sequence[float]) -> Found:
    """Returns the range and the suggestion by the rule of this module."""
    smoothed = smooth(losses)
    finite = np.array([x if math.isfinite(x) else np.inf for x in smoothed])
    at = int(np.argmin(finite))
    fall = finite[0] - finite[at]
    if not fall > 0.01 * abs(finite[0]):
        return Found(rates, losses, smoothed, None, None, None)
    begin = int(np.flatnonzero(finite <= finite[0] - 0.1 * fall)[0])
    low, high = rates[begin], rates[at]
    return Found(rates, losses, smoothed, low, high, max(high / 3, low))
