"""Stops a run on a signal, after the current step and with everything saved.

The signals are SIGTERM, Ctrl-C, SIGHUP (a closed terminal) and SIGUSR1 (Slurm's warning before the
time limit, ``sbatch --signal=USR1@60``). The training loop enters `Signals` (one process) or
`SharedSignals` (several processes) and asks it after each step whether a signal has arrived. If one
has, the loop saves a checkpoint and raises `Stopped`.
"""

import contextlib
import os
import signal
import socket
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from jax.experimental import multihost_utils

from optim_zoo.train.distributed import agreement

# A program or a shell often sends these twice; the second one must not interrupt the save.
_REPEATED = (signal.SIGHUP, signal.SIGUSR1)


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
    """A context manager that records a signal instead of ending the process.

    Only the first signal is recorded. A second Ctrl-C or SIGTERM has its usual effect, so that a
    run that is stuck can be interrupted. Process 0 answers Ctrl-C at once on standard error.
    Leaving the context restores the previous handlers.

    Args:
      last_step: the number of steps of the run, for the answer to Ctrl-C.
    """

    def __init__(self, last_step: int | None = None) -> None:
        self._received: int | None = None
        self._previous: dict[int, Any] = {}  # signal number -> handler before this context
        self._leaving = contextlib.ExitStack()
        self._last_step = last_step
        self._next_step: int | None = None  # the step that is saved if a signal arrives now
        self._terminals = [number for number in (1, 2) if os.isatty(number)]

    def __enter__(self) -> Self:
        self._catch(signal.SIGTERM, signal.SIGINT, *_REPEATED)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._leaving.close()

    def requested(self, step: int) -> int | None:
        """Returns the signal that asks the run to stop after this step, or None.

        Args:
          step: the number of steps made.
        """
        if self._received is None:
            self._next_step = step + 1
        elif self._received == signal.SIGHUP:
            self._leave_closed_terminals()
        return self._received

    def _catch(self, *numbers: int) -> None:
        # Python allows only the main thread to set handlers.
        if threading.current_thread() is not threading.main_thread():
            return
        for number in numbers:
            # `nohup` makes the process ignore SIGHUP, and it must continue to do so.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._record)
        self._leaving.enter_context(_watching(self._answer))

    def _record(self, number: int, frame: types.FrameType | None) -> None:
        if self._received is None:
            self._received = number
        if number == signal.SIGHUP:
            self._leave_closed_terminals()
        if number not in _REPEATED:
            signal.signal(number, self._previous[number])

    def _answer(self, number: int) -> bool:
        """Prints what Ctrl-C will do. Returns whether ``number`` is Ctrl-C, which needs one answer.

        This runs in its own thread, because the main thread may be compiling for a minute.
        """
        if number != signal.SIGINT or not agreement.is_first():
            return False
        clear = "\r\x1b[2K" if 2 in self._terminals else ""  # of the progress bar
        line = f"{clear}optim-zoo: {self._what_is_saved()}, then leaving; Ctrl-C again leaves now\n"
        with contextlib.suppress(OSError):
            os.write(2, line.encode())  # `print` is not reentrant
        return True

    def _what_is_saved(self) -> str:
        if self._next_step is None:
            return "saving the first step"
        return f"saving step {min(self._next_step, self._last_step or self._next_step)}"

    def _leave_closed_terminals(self) -> None:
        """Redirects output to the null device if its terminal is closed; writing would fail."""
        for number in self._terminals:
            if not os.isatty(number):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)


@contextlib.contextmanager
def _watching(answer: Callable[[int], bool]) -> Iterator[None]:
    """Calls ``answer`` with each signal that Python handles, at once and in another thread.

    The thread ends when ``answer`` returns true or when the block ends.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        while received := reader.recv(1):
            if answer(received[0]):
                return

    thread = threading.Thread(target=watch, daemon=True)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()
        thread.join()
        reader.close()


class SharedSignals(Signals):
    """Stops all processes of a run after the same step when one of them receives a signal.

    JAX catches SIGTERM in C++ and agrees with the other processes on a step that none of them has
    reached yet. `requested` asks JAX after every step whether this is the step. The other signals
    are turned into a SIGTERM to this process, so that they are handled in the same way.
    """

    def __enter__(self) -> Self:
        self._catch(signal.SIGINT, *_REPEATED)
        return self

    def requested(self, step: int) -> int | None:
        """See `Signals.requested`."""
        super().requested(step)
        if not multihost_utils.reached_preemption_sync_point(step):
            return None
        # JAX's handler would ignore a second SIGTERM.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return self._received or signal.SIGTERM

    def _record(self, number: int, frame: types.FrameType | None) -> None:
        super()._record(number, frame)
        os.kill(os.getpid(), signal.SIGTERM)

    def _what_is_saved(self) -> str:
        return "saving the next step that all processes reach"
