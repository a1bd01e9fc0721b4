"""Runs of a sweep as processes of their own, several at a time."""

import collections
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from optim_zoo.lab import until_parent_ends

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
OUTPUT, ERRORS = "output.txt", "errors.txt"  # what a run prints, in its folder
_PAUSE = 0.05  # seconds between two looks at the processes


class Interrupted(Exception):
    """A signal has ended the sweep, after every run had saved a checkpoint."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


@dataclasses.dataclass(frozen=True)
class Command:
    """A command to run."""

    arguments: Sequence[str]
    folder: Path  # where its output goes; it exists


@dataclasses.dataclass
class _Running:
    command: Command
    process: subprocess.Popen[bytes]
    began: float


Ended = Callable[[Command, int, float], Any]
"""Called when a command has ended, with its exit code (negative: a signal) and its seconds."""


def run(commands: Sequence[Command], jobs: int, ended: Ended) -> None:
    """Runs all commands, ``jobs`` at a time, in their order.

    A first signal asks the commands to stop with SIGTERM and waits for them; a second one kills
    them. If this process is killed, the operating system kills the commands (on Linux).

    Raises:
      Interrupted: a signal arrived. ``ended`` has been called for every command that was started.
    """
    waiting, running, answered = collections.deque(commands), list[_Running](), 0
    with received() as signals:
        try:
            while (waiting and not signals) or running:
                while waiting and len(running) < jobs and not signals:
                    running.append(_start(waiting.popleft()))
                time.sleep(_PAUSE)
                for each in [each for each in running if each.process.poll() is not None]:
                    running.remove(each)
                    seconds = time.monotonic() - each.began
                    ended(each.command, each.process.returncode, seconds)
                if len(signals) > answered:
                    _stop(running, signal.SIGKILL if answered else signal.SIGTERM)
                    answered += 1
        finally:
            _stop(running, signal.SIGKILL)
    if signals:
        raise Interrupted(signals[0])


def _start(command: Command) -> _Running:
    guard = [sys.executable, "-S", until_parent_ends.__file__, str(os.getpid())]
    with (
        (command.folder / OUTPUT).open("wb") as output,
        (command.folder / ERRORS).open("wb") as errors,
    ):
        process = subprocess.Popen(
            [*guard, *command.arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the runs
        )
    return _Running(command, process, time.monotonic())


def _stop(running: Sequence[_Running], number: int) -> None:
    for each in running:
        if each.process.poll() is None:
            each.process.send_signal(number)


@contextlib.contextmanager
def received() -> Iterator[list[int]]:
    """Collects the signals that arrive inside the block, instead of ending this process."""
    numbers: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        numbers.append(number)

    caught = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, note) for number in caught}
    try:
        yield numbers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
