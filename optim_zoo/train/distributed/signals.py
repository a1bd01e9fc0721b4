"""Stopping a run on SIGTERM or Ctrl-C, after the current step and with everything saved.

The training loop enters `Signals` (one process) or `SharedSignals` (several), asks after each step
whether a signal has arrived, saves, and raises `Stopped`.
"""

import os
import signal
import threading
import types
from pathlib import Path
from typing import Any, Self

from jax.experimental import multihost_utils


class Stopped(Exception):
    """A run has ended early because of a signal, and everything is saved.

    Args:
      signal_number: the signal.
      step: the number of steps made; the checkpoint of this step is saved.
      folder: the run folder.
    """

    def __init__(self, signal_number: int, step: int, folder: Path) -> None:
        super().__init__(signal_number, step, folder)  # for `pickle` and `copy`
        self.signal_number = signal_number
        self.step = step
        self.folder = folder

    def __str__(self) -> str:
        return (
            f"stopped by {signal.Signals(self.signal_number).name}; step {self.step} is saved in "
            f"{self.folder}, and the same command resumes from there"
        )


class Signals:
    """A context manager that records SIGTERM and Ctrl-C instead of ending the process.

    Only the first signal is recorded. The second one has its usual effect, so that a run that is
    stuck can be interrupted. Leaving the context restores the previous handlers.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, Any] = {}  # signal number -> handler before this context

    def __enter__(self) -> Self:
        self._catch(signal.SIGTERM, signal.SIGINT)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> int | None:
        """Returns the signal because of which to stop after this step, or None.

        Args:
          step: the number of steps made.
        """
        return self._received

    def _catch(self, *numbers: int) -> None:
        # Python allows only the main thread to set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                self._previous[number] = signal.signal(number, self._record)

    def _record(self, number: int, frame: types.FrameType | None) -> None:
        self._received = number
        signal.signal(number, self._previous[number])


class SharedSignals(Signals):
    """The same for several processes: a signal to one stops all of them after the same step.

    JAX catches SIGTERM in C++ and agrees with the other processes on a step that none of them has
    reached yet. `requested` asks JAX after every step whether this is the step. Ctrl-C is turned
    into a SIGTERM to this process, so that it takes the same way.
    """

    def __enter__(self) -> Self:
        self._catch(signal.SIGINT)
        return self

    def requested(self, step: int) -> int | None:
        """See `Signals.requested`."""
        if not multihost_utils.reached_preemption_sync_point(step):
            return None
        # JAX's handler would ignore a second SIGTERM.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return self._received or signal.SIGTERM

    def _record(self, number: int, frame: types.FrameType | None) -> None:
        super()._record(number, frame)
        os.kill(os.getpid(), signal.SIGTERM)
