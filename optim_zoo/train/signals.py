"""Leaving a run early, with everything saved, when a signal asks for it."""

import os
import signal
import threading
import types
from pathlib import Path
from typing import Any, Self

from jax.experimental import multihost_utils


class Stopped(Exception):
    """A run left early because a signal asked it to; everything is saved.

    Args:
      signal_number: the signal.
      step: the steps made, which are saved.
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
            f"{self.folder}, and the same command goes on from there"
        )


class Signals:
    """While entered, SIGTERM and Ctrl-C are noted instead of obeyed; a second one is obeyed."""

    def __init__(self) -> None:
        self._noted: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._catch(signal.SIGTERM, signal.SIGINT)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> int | None:
        """The signal for which to leave after this step, if any."""
        return self._noted

    def _catch(self, *numbers: int) -> None:
        if threading.current_thread() is threading.main_thread():  # others may set no handler
            for number in numbers:
                self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        self._noted = number
        signal.signal(number, self._before[number])


class SharedSignals(Signals):
    """The same for a run of several processes: what comes to one stops all after the same step.

    JAX catches SIGTERM itself, in C++, and agrees with the other processes on a step that none has
    come to yet. It is asked after every step. Ctrl-C is passed on to it.
    """

    def __enter__(self) -> Self:
        self._catch(signal.SIGINT)
        return self

    def requested(self, step: int) -> int | None:
        """See `Signals.requested`."""
        if not multihost_utils.reached_preemption_sync_point(step):
            return None
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX would swallow a second one too
        return self._noted or signal.SIGTERM

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        super()._note(number, frame)
        os.kill(os.getpid(), signal.SIGTERM)
