"""How the processes of a run wait for each other, order their work, and compare what they hold.

Each function here is a collective operation: every process must call it, in the same order. Where
the run has one process only, the functions return without communication.
"""

import contextlib
import hashlib
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from optim_zoo.errors import UserError

# Written by process 0 for as long as `check_shared` runs. It is a file of its own because the lock
# file must never be replaced or removed.
_MARK = ".shared"


def several() -> bool:
    """Returns whether this run has more than one process."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Returns whether this is process 0, which writes the run folder and prints."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has made this call.

    Args:
      name: the same in every process. It identifies the call in JAX's error messages.
    """
    if several():
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def first_process_first(name: str) -> Iterator[None]:
    """Process 0 runs the block first; the others then read what it wrote.

    Args:
      name: as for `wait_for_all`.
    """
    if not is_first():
        wait_for_all(name)
    yield
    if is_first():
        wait_for_all(name)


def broadcast_from_first(value: bool) -> bool:
    """Returns the value that process 0 has passed."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(value))) if several() else value


def check_same(values: Mapping[str, str]) -> None:
    """Checks that all processes pass the same values under the same names.

    Raises:
      UserError: in every process, if a value differs.
    """
    names = _different(values)
    if names:
        raise UserError(
            f"the {' and '.join(names)} must be the same in every process, but differs: start all "
            f"processes with the same files and the same overrides, except for distributed.index"
        )


def check_shared(folder: Path) -> None:
    """Checks that all processes see the same run folder.

    Process 0 writes a random word to a file in the folder, and each process reads that file. The
    file is removed when all have read it.

    Raises:
      UserError: in every process, if one sees another folder; in process 0, if it cannot write.
    """
    if not several():
        return
    mark = folder / _MARK
    try:
        if is_first():
            _write(mark, uuid.uuid4().hex)
        wait_for_all("the run folder is marked")
        if _different({"mark": _read(mark)}):
            raise UserError(
                f"the run folder {folder} must be one that all processes share, but they see "
                f"different ones: choose a folder on a shared file system with run.dir"
            )
    finally:
        if is_first():
            with contextlib.suppress(OSError):  # The next run overwrites a mark that is left.
                mark.unlink()


def _different(values: Mapping[str, str]) -> list[str]:
    """Returns the names whose values are not the same in every process."""
    if not several():
        return []
    digests = [hashlib.sha256(value.encode()).digest()[:16] for value in values.values()]
    mine = np.frombuffer(b"".join(digests), np.uint32).reshape(len(values), -1)
    of_all = np.asarray(multihost_utils.process_allgather(mine))
    different = (of_all != of_all[:1]).any(axis=(0, 2))
    return [name for name, differs in zip(values, different, strict=True) if differs]


def _write(mark: Path, text: str) -> None:
    try:
        mark.write_text(text)
    except OSError as error:
        raise UserError(
            f"cannot write to the run folder {mark.parent}: {error.strerror}; make it writable, or "
            f"choose another folder with run.dir"
        ) from error


def _read(mark: Path) -> str:
    try:
        return mark.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return ""
