"""How far a run is, and how fast: a bar on a terminal, plain lines in a pipe."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, Self

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter(Protocol):
    """What the training loop tells of itself; a context manager."""

    def __enter__(self) -> Self:
        """Starts."""
        ...

    def __exit__(self, *error: Any) -> None:
        """Leaves the screen in order."""
        ...

    def at(self, step: int, figures: str) -> None:
        """After ``step`` steps, with the figures of that step."""
        ...

    def say(self, sentence: str) -> None:
        """A line that stays."""
        ...


class Bar:
    """A rich progress bar, the last figures beside it."""

    def __init__(self, total: int, start: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        self._task = self._progress.add_task("training", total=total, completed=start, figures="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.stop()

    def at(self, step: int, figures: str) -> None:
        """Moves the bar."""
        self._progress.update(self._task, completed=step, figures=figures)

    def say(self, sentence: str) -> None:
        """Prints above the bar."""
        self._progress.console.print(sentence, markup=False, highlight=False)


class Lines:
    """A line each time; rich would print only its last into a pipe."""

    def __init__(self, total: int) -> None:
        self._total = total

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def at(self, step: int, figures: str) -> None:
        """Prints step and figures."""
        self.say(f"step {step}/{self._total}  {figures}")

    def say(self, sentence: str) -> None:
        """Prints the sentence."""
        print(sentence, flush=True)


class Silence:
    """Tells nothing: another process does."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def at(self, step: int, figures: str) -> None:
        """Nothing."""

    def say(self, sentence: str) -> None:
        """Nothing."""


def reporter(total: int, start: int, *, speaks: bool = True) -> Reporter:
    """A bar where the output is a terminal, else lines; silence for a process that is not asked."""
    if not speaks:
        return Silence()
    return Bar(total, start) if Console(file=sys.stdout).is_terminal else Lines(total)


class Rate:
    """Tokens per second of training alone: without compilation, evaluation and saving."""

    def __init__(self, tokens_after: Callable[[int], int]) -> None:
        self._tokens_after = tokens_after  # of a number of steps
        self._step = 0
        self._since = math.nan  # until the first step has compiled

    def begin(self, loss: jax.Array, done: int) -> None:
        """The first step, ``done``, is compiled; waits until it has run."""
        loss.block_until_ready()
        self._step, self._since = done, time.perf_counter()

    def after(self, done: int) -> float:
        """The rate since this was last called; NaN where no step was timed."""
        tokens = self._tokens_after(done) - self._tokens_after(self._step)
        now = time.perf_counter()
        seconds, self._step, self._since = now - self._since, done, now
        return tokens / seconds if tokens else math.nan

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began
