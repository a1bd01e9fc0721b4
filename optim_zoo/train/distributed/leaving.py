"""How a process leaves the run: its last line, its goodbye to the others, its exit code."""

import contextlib
import os
import sys
from typing import Any

import jax

from optim_zoo.train.distributed.abort_handler import AbortHandler
from optim_zoo.train.distributed.lost import LOST


class Processes:
    """The processes of a run, which `start` has brought together.

    It is a context manager: leaving the context restores what `start` has changed in this process
    (the handler of SIGABRT, standard output and standard error).

    Args:
      abort_handler: the handler that `start` has installed, if any.
      restore: undoes what `start` has changed, that handler included.
    """

    def __init__(
        self,
        abort_handler: AbortHandler | None = None,
        restore: contextlib.ExitStack | None = None,
    ) -> None:
        self._abort_handler = abort_handler
        self._restore = restore or contextlib.ExitStack()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: Any) -> None:
        self._restore.close()

    @property
    def joined(self) -> bool:
        """Whether this process has joined others, which JAX waits for when Python ends."""
        return jax.distributed.is_initialized()

    def leave(self, code: int, line: str = "") -> int:
        """Prints a last line to standard error and leaves the other processes.

        After a failure this function ends the process if it has joined others. Returning would let
        Python end by itself, and JAX and Orbax would wait for the other processes for minutes.

        Args:
          code: the exit code.
          line: may be empty, which prints nothing.

        Returns:
          The exit code.
        """
        if self._abort_handler is not None:
            self._abort_handler.say(code, line)
        elif line:
            print(line, file=sys.stderr, flush=True)
        if not self.joined:
            return code
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        if code != LOST:
            # `shutdown` waits for the other processes for a few seconds. Where all fail in the same
            # way, each prints its own line before the end of the first one ends the others.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                jax.distributed.shutdown()
        if code:
            os._exit(code)
        return code
