"""Recognizing that another process of the run has failed or is gone.

JAX lets the remaining processes know in one of two ways:

1. A collective operation raises a Python error, at once where a connection breaks. `watched` turns
   such an error into `Lost`.
2. Where no connection breaks, a collective waits indefinitely, and JAX's C++ aborts the process
   when the heartbeats of the lost one have not arrived for ``distributed.heartbeat_seconds``. No
   Python code is asked then; `abort_handler` deals with it.

Either way the user sees the sentence of `Lost`, and the exit code is `LOST`.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from optim_zoo.train import foreign_errors
from optim_zoo.train.distributed import agreement
from optim_zoo.train.run_folder import saved_steps

LOST = os.EX_TEMPFAIL  # 75: the failure is temporary, and the same command should be run again.


class Lost(Exception):
    """Another process of this run has failed or is gone.

    Args:
      folder: the run folder, which holds the checkpoints.
      reason: what is known about the cause; may be empty.
    """

    def __init__(self, folder: Path, reason: str = "") -> None:
        super().__init__(folder, reason)  # for `pickle` and `copy`
        self.folder = folder
        self.reason = reason
        steps = saved_steps(folder)
        restart = "start all processes again with the same commands"
        self.sentence = (
            f"another process of this run has failed or is gone{f' ({reason})' if reason else ''}; "
        ) + (
            f"step {steps[-1]} is saved in {folder}: {restart} to resume from there"
            if steps
            else f"no checkpoint was saved: {restart}"
        )

    def __str__(self) -> str:
        return self.sentence


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Turns an error of the block into `Lost` where a lost process has caused it.

    Args:
      folder: the run folder.

    Raises:
      Lost: another process has failed or is gone. Other errors pass unchanged.
    """
    try:
        yield
    except Exception as error:
        cause = _lost_process(error)
        if cause is None:
            raise
        raise Lost(folder, foreign_errors.first_line(cause)) from error


def _lost_process(error: BaseException | None) -> BaseException | None:
    """Returns JAX's error about a lost process from the chain of causes of an error, or None."""
    while error is not None and agreement.several():
        if foreign_errors.is_lost_process(error):
            return error
        error = error.__cause__ or error.__context__
    return None
