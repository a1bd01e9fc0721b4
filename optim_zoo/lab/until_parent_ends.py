"""Runs a command that the operating system kills when the process that started it ends.

A program of its own, without imports from this package, because it is replaced by the command::

    python until_parent_ends.py PARENT COMMAND [ARGUMENT ...]

PARENT is the process that must still be alive. This works on Linux; elsewhere the command runs
without this protection, and the lock of its run folder keeps a second one out.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2)


def main(parent: int, command: list[str]) -> None:
    """Asks for the signal, then replaces this process by the command."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended before the request
            sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
