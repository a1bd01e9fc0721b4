"""Replaces files atomically."""

import contextlib
import os
from pathlib import Path

from optim_zoo.errors import UserError


def replace_file(path: Path, content: bytes) -> None:
    """Replaces the content of a file atomically.

    A reader finds either the old content or the new one, even if the process is killed.

    Raises:
      UserError: the file cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> UserError:
    """Returns the error about a file of the run folder that could not be written."""
    return UserError(
        f"expected to write {path}, got {error.strerror}; make room or choose another run folder,"
        " then start the same command again to resume"
    )
