"""What is saved with the arrays of a checkpoint, and how it shows that the checkpoint is damaged.

The record has the info of the run, a description of the arrays (`saved_state.describe`), the
checksum of each array, and its own SHA-256 digest.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from optim_zoo import saved_state
from optim_zoo.errors import UserError
from optim_zoo.train import foreign_errors
from optim_zoo.train.checksums import checksums
from optim_zoo.tree import Tree


class Damaged(Exception):
    """Raised where a checkpoint cannot be read, or differs from what was saved."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Turns errors of reading a file into `Damaged`.

    Raises:
      Damaged: the block has raised any error but that of a device.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError:  # a device error, such as too little memory
        raise
    except Exception as error:  # Orbax and TensorStore raise many types for a damaged file.
        raise Damaged(foreign_errors.why_not_written_or_read(error)) from error


def make(arrays: Tree, info: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record to save with ``arrays``, in JSON values.

    Args:
      arrays: the tree that is saved.
      info: what else to record, as JSON values.
    """
    record = {
        "info": dict(info),
        "description": saved_state.describe(arrays),
        "checksums": checksums(arrays),
    }
    return {**record, "sha256": _digest(record)}


def checked(record: Any, path: Path) -> Mapping[str, Any]:
    """Returns a record that was read, with ``info``, ``description`` and ``checksums``.

    Args:
      record: what was read.
      path: the folder of the checkpoint, for messages.

    Raises:
      Damaged: it has changed since it was saved.
      UserError: a version of the package without such records has saved it.
    """
    with reading():
        record = dict(record)
    if not record.keys() & {"description", "sha256"}:
        raise UserError(
            f"the checkpoint {path} was saved by an earlier version of optim_zoo: continue with "
            f"that version, or choose another folder with run.dir"
        )
    if record.pop("sha256", None) != _digest(record):
        raise Damaged("its description has changed since it was saved")
    return record


def check_arrays(record: Mapping[str, Any], arrays: Tree) -> None:
    """Raises `Damaged` if the checksum of an array differs from the one in the record.

    The record may be of more arrays than ``arrays`` has.
    """
    changed = [
        path for path, value in checksums(arrays).items() if record["checksums"][path] != value
    ]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise Damaged(f"the values of {changed[0]}{more} have changed since they were saved")


def _digest(record: Mapping[str, Any]) -> str:
    as_read = json.loads(json.dumps(record))  # JSON turns keys into strings
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()
