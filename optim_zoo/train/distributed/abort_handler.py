"""Ends a process with a sentence where JAX's C++ aborts it.

JAX's distributed runtime aborts the process from a C++ thread when the start fails, when the
coordinator cannot be reached, and when the heartbeats of another process do not arrive. It writes
the reason and a stack trace to standard error and calls C's ``abort``. The user should see one
sentence and get a meaningful exit code instead.

**Why the handler is installed in C.** ``abort`` raises SIGABRT and ends the process as soon as the
handler returns. A handler set by Python's `signal.signal` only makes a note, and its Python code
runs later in the main thread, which is too late. A handler set by C's ``signal`` is called by
``abort`` itself, in the aborting thread. This one is a `ctypes` callback: it acquires the
interpreter lock and runs Python code. It does not return but ends the process with `os._exit`.

**What is written where.** C++ writes its log to file descriptor 2. While the handler is installed,

- descriptor 2 is a temporary file, which the handler reads to find the reason;
- `sys.stderr` writes to a duplicate of the original descriptor, so that what Python prints reaches
  the terminal as before;
- what C++ has logged is passed on to the terminal when the process ends for another reason, or when
  `AbortHandler.pass_on_log` is called.

**What is restored.** `AbortHandler.close` restores descriptor 2, `sys.stderr` and the previous
handler of SIGABRT. An abort that has nothing to do with the other processes, such as one after a
heap corruption, passes the log on, restores the previous handler and aborts again.
"""

import ctypes
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

# How long an aborting thread waits for a sentence that another thread is printing.
_WAIT_SECONDS = 5
_LOG_BYTES = 1 << 20  # the longest log that is read


class AbortHandler:
    """Handles SIGABRT from its construction until `close`; also a context manager.

    Args:
      explain: called with what C++ has logged when the process is aborted. It returns the exit code
        and the line to print, or None where the abort has another cause.

    Attributes:
      explain: as above. It may be replaced, since an abort means something else after the start.
    """

    def __init__(self, explain: Callable[[str], tuple[int, str] | None]) -> None:
        self.explain = explain
        self._ending = threading.Lock()  # held while the last words are printed
        self._code: int | None = None  # the exit code, once the last words are printed
        # 1. Standard error of C++ goes to a file; that of Python stays where it was.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._passed_on = 0  # bytes of the log that are printed or discarded
        self._python_stderr = sys.stderr
        self._python_stderr.flush()
        self._terminal = os.dup(2)
        os.dup2(self._log.fileno(), 2)
        sys.stderr = os.fdopen(
            self._terminal, "w", buffering=1, errors="backslashreplace", closefd=False
        )
        # 2. The handler. The object must be kept for as long as C may call it.
        self._c_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: self._aborted())
        self._c_signal = ctypes.CDLL(None).signal
        self._c_signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
        self._c_signal.restype = ctypes.c_void_p
        self._previous = self._c_signal(
            signal.SIGABRT, ctypes.cast(self._c_handler, ctypes.c_void_p)
        )

    def __enter__(self) -> "AbortHandler":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Restores the previous handler and standard error; discards what is left of the log."""
        self._c_signal(signal.SIGABRT, self._previous)
        self.show_log()
        os.close(self._terminal)
        self._log.close()

    def show_log(self) -> None:
        """Lets C++ write to the terminal again, so that the handler learns no reason."""
        sys.stderr.flush()
        sys.stderr = self._python_stderr
        os.dup2(self._terminal, 2)

    def pass_on_log(self) -> None:
        """Prints what C++ has logged since the last call."""
        os.write(self._terminal, self._unread_log())

    def discard_log(self) -> None:
        """Forgets what C++ has logged up to now."""
        self._unread_log()

    def say(self, code: int, line: str) -> None:
        """Prints the log and a last line.

        The log is left out where `explain` explains it: C++ is then about to abort the process for
        the reason that the last line states.

        Args:
          code: the exit code of the process from now on, also if it is aborted.
          line: may be empty, which prints nothing.
        """
        with self._ending:
            log = self._unread_log()
            if self.explain(log.decode(errors="replace")) is None:
                os.write(self._terminal, log)
            if line:
                print(line, file=sys.stderr, flush=True)
            self._code = code

    def _unread_log(self) -> bytes:
        log = os.pread(self._log.fileno(), _LOG_BYTES, self._passed_on)
        self._passed_on += len(log)
        return log

    def _aborted(self) -> None:
        # Runs in any thread. Where the main thread is printing its own last words, they count. The
        # wait is limited because that thread may be stuck, or may be this one.
        self._ending.acquire(timeout=_WAIT_SECONDS)
        if self._code is not None:
            os._exit(self._code)
        log = self._unread_log()
        explanation = self.explain(log.decode(errors="replace"))
        if explanation is None:
            os.write(self._terminal, log)
            self._c_signal(signal.SIGABRT, self._previous)
            os.abort()
        code, line = explanation
        os.write(self._terminal, f"{line}\n".encode())
        os._exit(code)
