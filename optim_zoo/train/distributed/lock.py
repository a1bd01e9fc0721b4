"""The lock of a run folder: one run at a time.

A run holds an exclusive ``flock`` on the file ``.lock`` in its folder. The operating system
releases the lock when the process ends, however it ends, so that a killed run leaves nothing to
clean up. The file is empty and serves no other purpose. It is never removed: otherwise one run
could hold a lock on the removed file while another locks a new file of the same name.
"""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from optim_zoo.errors import UserError
from optim_zoo.train.distributed import agreement

LOCK_FILE = ".lock"


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Creates the run folder and keeps other runs out of it for the duration of the block.

    Process 0 takes the lock for all processes of the run.

    Raises:
      UserError: another run holds the lock, the folder cannot be created or written, or its file
        system has no locks.
    """
    if not agreement.is_first():
        yield
        return
    with _open(folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process trains in {folder}: wait until it ends, or choose another folder "
                f"with run.dir"
            ) from None
        except OSError as error:
            raise UserError(
                f"cannot lock the run folder {folder}: {error.strerror}; its file system must "
                f"support flock (on Lustre, the mount option flock): choose a folder on another "
                f"file system with run.dir"
            ) from error
        yield


def _open(folder: Path) -> TextIO:
    """Returns the open lock file; creates it, and the folder, where they do not exist."""
    action = "create"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        action = "write to"
        return (folder / LOCK_FILE).open("a")  # NFS locks only files that are open for writing.
    except OSError as error:
        raise UserError(
            f"cannot {action} the run folder {folder}: {error.strerror}; make it writable, or "
            f"choose another folder with run.dir"
        ) from error
