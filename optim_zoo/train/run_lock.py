"""The lock of a run folder."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from optim_zoo.errors import UserError
from optim_zoo.train import processes


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Makes the run folder, and keeps other runs out of it until this one ends, however."""
    if not processes.is_first():  # which does it for all
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise UserError(
            f"cannot make the run folder {folder}: {error.strerror}; choose another with run.dir"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process trains in {folder}: wait for its end, or choose another folder "
                f"with run.dir"
            ) from None
        yield
