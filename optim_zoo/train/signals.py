"""Leaving a run early, with everything saved, when a signal asks for it."""

import signal
import threading
import types
from pathlib import Path
from typing import Any, Self


class Stopped(Exception):
    """A run left early because a signal asked it to; everything is saved."""

    def __init__(self, signal_number: int, step: int, folder: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name}; step {step} is saved in {folder}, "
            f"and the same command goes on from there"
        )
        self.signal_number = signal_number


class Signals:
    """While entered, SIGTERM and Ctrl-C are noted instead of obeyed; a second one is obeyed."""

    def __init__(self) -> None:
        self.requested: int | None = None  # the signal that came
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # others may set no handler
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        self.requested = number
        signal.signal(number, self._before[number])
