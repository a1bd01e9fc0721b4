"""Checkpoints of a run: orbax, asynchronous, the last few kept.

Where a run has several processes all of them save, restore and wait together.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from optim_zoo.train.errors import UserError
from optim_zoo.train.signals import Stopped
from optim_zoo.tree import Tree


class Checkpoints:
    """The folder ``checkpoints`` of a run; a context manager that waits for the last save."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder.absolute() / "checkpoints"
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep,
                    cleanup_tmp_directories=True,  # what a killed save has left
                    # Else a folder that cannot be made is waited for, for twenty minutes.
                    async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                ),
                item_names=("training", "info"),
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and jax.process_count() > 1 and not isinstance(error, Stopped):
            return  # Closing waits for the other processes, and they may not have failed.
        with self._writing() if error is None else contextlib.suppress(Exception):
            self._manager.close()

    @property
    def last_step(self) -> int | None:
        """Steps made by the last whole checkpoint; None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, params: Tree, state: Tree, info: Mapping[str, Any]) -> None:
        """Starts saving what a run needs to go on after ``step`` steps; a step is saved once.

        Raises:
          UserError: this or an earlier save could not be written.
        """
        if step == self.last_step:
            return
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    training=ocp.args.StandardSave({"params": params, "state": state}),
                    info=ocp.args.JsonSave(dict(info)),
                ),
            )

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          UserError: a save could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def info(self) -> Mapping[str, Any]:
        """What the last `save` was given as ``info``.

        Raises:
          UserError: it cannot be read.
        """
        restore = ocp.args.Composite(info=ocp.args.JsonRestore())
        with self._reading():
            return dict(self._manager.restore(self.last_step, args=restore)["info"])

    def restore(self, params: Tree, state: Tree) -> tuple[int, Tree, Tree]:
        """Steps made, parameters and optimizer state of the last checkpoint.

        The arrays have the shapes, dtypes and shardings of ``params`` and ``state``.

        Raises:
          UserError: it cannot be read, or does not fit.
        """
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"params": params, "state": state})
        restore = ocp.args.Composite(training=ocp.args.StandardRestore(like))
        with self._reading():
            training = self._manager.restore(self.last_step, args=restore)["training"]
        assert self.last_step is not None
        return self.last_step, training["params"], training["state"]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise many kinds for a failed write
            # From the disk: orbax's own list runs ahead of what is written.
            whole = saved_steps(self.folder.parent)
            saved = f"the last whole one is of step {whole[-1]}" if whole else "none is saved yet"
            raise UserError(
                f"cannot write a checkpoint to {self.folder}: {_first_line(error)}; {saved}: make "
                f"room, or make the folder writable, and start again"
            ) from error

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # as above, for a damaged one
            step = self.last_step
            before = [s for s in self._manager.all_steps() if s != step]
            instead = f"go on from step {max(before)}" if before else "start anew"
            raise UserError(
                f"cannot read the checkpoint {self.folder / str(step)}, it is damaged or of "
                f"another model or optimizer ({_first_line(error)}): remove it to {instead}"
            ) from error


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a run folder."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    # Tensorstore names the failed file at length before it says what the system said.
    number = re.search(r"os_error_code='(\d+)'", text)
    return os.strerror(int(number[1])) if number else text.splitlines()[0][:200]
