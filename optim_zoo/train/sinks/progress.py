"""The sink that shows the progress of a run: a bar on a terminal, plain lines in a pipe."""

import math
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from optim_zoo.train.sinks.base import RunInfo, shown_name
from optim_zoo.train.summary import summarize


class Progress:
    """Shows the step, the loss, the learning rate and the speed on standard output."""

    def open(self, run: RunInfo) -> None:
        """Prints the notes about the start and a block about the run."""
        self._run = run
        terminal = Console(file=sys.stdout).is_terminal
        self._display = Bar(run.total_steps, run.start) if terminal else Lines(run.total_steps)
        for sentence in (*run.notes, *_block(run)):
            self._display.say(sentence)
        if run.start < run.total_steps:
            self._display.say("compiling")

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Shows the figures of a step."""
        unit = self._run.unit
        rate = figures.get(f"{unit}_per_second", math.nan)
        skipped = figures.get("skipped_steps", 0)
        text = f"loss {figures['loss']:.4f}"
        if self._display.shows_learning_rate:
            text += f"  learning rate {figures['learning_rate']:.2e}"
        if math.isfinite(rate):
            text += f"  {rate:,.0f} {unit.replace('_', ' ')}/s"
        if skipped:
            text += f"  {skipped} skipped"
        self._display.at(step, text)

    def evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Prints the held-out metrics."""
        unit = f" {self._run.loss_unit}" if self._run.loss_unit else ""
        values = (
            f"held-out {shown_name(name)} {value:.4f}{unit if name == 'loss' else ''}"
            for name, value in metrics.items()
            if "/" not in name
        )
        self._display.say(f"step {step}: {', '.join(values)}")

    def close(self, finished: bool) -> None:
        """Prints the headline figures of a finished run, and restores the terminal."""
        if finished:
            for name, value in summarize(self._run).items():
                self._display.say(f"{name}: {value}")
            report = self._run.folder / "report.html"
            if report.exists():
                self._display.say(f"report: {report}")
        self._display.stop()


def _block(run: RunInfo) -> list[str]:
    """Returns lines about the run that are shown before the first step."""
    left = f", {run.start:,} of them made" if run.start else ""
    facts = {
        "devices": run.machine.get("devices", ""),
        "parameters": f"{run.parameters:,}",
        **run.facts,
        run.unit.replace("_", " "): f"{run.total_units:,} in all steps",
        "steps": f"{run.total_steps:,}{left}",
        "run folder": str(run.folder),
    }
    return [f"{name}: {text}" for name, text in facts.items()]


class Bar:
    """A progress bar with the last figures next to it; it disappears at the end.

    It stays on one line of the terminal: what does not fit is cut off.
    """

    shows_learning_rate = False  # because a bar has to fit 80 columns

    def __init__(self, total: int, start: int) -> None:
        self._progress = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}"),
            console=Console(),  # Rich's own is shared, and remembers the width of another terminal.
            transient=True,
        )
        self._task = self._progress.add_task("compiling", total=total, completed=start, figures="")
        self._progress.start()

    def stop(self) -> None:
        """Removes the bar, and shows the cursor again."""
        self._progress.stop()

    def at(self, step: int, figures: str) -> None:
        """Moves the bar."""
        self._progress.update(self._task, completed=step, figures=figures, description="training")

    def say(self, sentence: str) -> None:
        """Prints above the bar."""
        self._progress.console.print(sentence, markup=False, highlight=False, soft_wrap=True)


class Lines:
    """Prints one line per log. In a pipe, Rich would print only the last state of a bar."""

    shows_learning_rate = True

    def __init__(self, total: int) -> None:
        self._total = total

    def stop(self) -> None:
        """Does nothing, because every line is complete."""

    def at(self, step: int, figures: str) -> None:
        """Prints the step and its figures."""
        self.say(f"step {step}/{self._total}  {figures}")

    def say(self, sentence: str) -> None:
        """Prints the sentence."""
        print(sentence, flush=True)
