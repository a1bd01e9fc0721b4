"""Measures how many units of its task a run processes per second."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator

import jax


class Throughput:
    """The units per second of training, without the time of compiling, evaluating and saving.

    Args:
      units_after: the units (such as tokens) used after a number of steps.
    """

    def __init__(self, units_after: Callable[[int], int]) -> None:
        self._units_after = units_after
        self._step = 0
        self._since = math.nan  # until the first step has been compiled

    def start(self, done: int, loss: jax.Array) -> None:
        """Waits for the loss of the first step of this process, then starts the clock.

        Later calls do nothing.
        """
        if math.isnan(self._since):
            loss.block_until_ready()
            self._step, self._since = done, time.perf_counter()

    def since_last(self, done: int) -> float:
        """Returns the rate since the last call; NaN if no step was timed."""
        units = self._units_after(done) - self._units_after(self._step)
        now = time.perf_counter()
        seconds, self._step, self._since = now - self._since, done, now
        return units / seconds if units else math.nan

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent inside the block."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began
