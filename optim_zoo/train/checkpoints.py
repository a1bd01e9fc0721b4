"""Checkpoints of a run: saved asynchronously by Orbax, which keeps the last few.

Each checkpoint also has a description of its arrays (`saved_state.describe`) and a checksum of each
array, because the format itself does not detect a changed bit. A checkpoint that cannot be read, or
whose checksums differ, is damaged: the run resumes from the one before it.

If a run has several processes, all of them save, restore and wait together.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from optim_zoo import saved_state
from optim_zoo.errors import ArgumentValueError, UserError
from optim_zoo.train import foreign_errors
from optim_zoo.train.checkpoint_records import Damaged, check_arrays, checked, make, reading
from optim_zoo.train.distributed import Stopped
from optim_zoo.train.run_folder import CHECKPOINTS, saved_steps
from optim_zoo.tree import Tree


class Restored(NamedTuple):
    """What `Checkpoints.restore` has read."""

    step: int  # the number of steps made
    params: Tree
    state: Tree
    info: Mapping[str, Any]  # as it was passed to `Checkpoints.save`
    notes: list[str]  # a sentence about each damaged checkpoint that was moved away


class Checkpoints:
    """The folder ``checkpoints`` of a run; a context manager that waits for the last save.

    Args:
      folder: the run folder.
      keep: the number of checkpoints to keep.

    Raises:
      UserError: the folder cannot be made.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder.absolute() / CHECKPOINTS
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep,
                    cleanup_tmp_directories=True,  # left by a killed save
                    async_options=ocp.AsyncOptions(
                        # Otherwise Orbax waits twenty minutes for a folder that it cannot make.
                        create_directories_asynchronously=False,
                        # Effectively no limit: Orbax measures it with the wall clock, which may
                        # be set forward during a save, and a slow disk must not end the run.
                        timeout_secs=100 * 365 * 86400,
                    ),
                ),
                item_names=("training", "info"),
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and jax.process_count() > 1 and not isinstance(error, Stopped):
            return  # Closing would wait for the other processes, which may still be training.
        with writing(self.folder) if error is None else contextlib.suppress(Exception):
            self._manager.close()

    @property
    def last_step(self) -> int | None:
        """The step of the last complete checkpoint, or None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, params: Tree, state: Tree, info: Mapping[str, Any]) -> None:
        """Starts to save what a run needs to resume after ``step`` steps.

        Does nothing if this step is saved already.

        Args:
          step: the number of steps made.
          params: the parameters.
          state: the optimizer state.
          info: what else to record, as JSON values.

        Raises:
          UserError: this or an earlier save could not be written.
        """
        if step == self.last_step:
            return
        training = {"params": params, "state": state}
        with writing(self.folder):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    training=ocp.args.StandardSave(training),
                    info=ocp.args.JsonSave(make(training, info)),
                ),
            )

    def wait(self) -> None:
        """Returns once everything is on disk.

        Raises:
          UserError: a save could not be written.
        """
        with writing(self.folder):
            self._manager.wait_until_finished()

    def restore(
        self,
        params: Tree,
        state: Tree,
        *,
        changes: Sequence[str] = (),
        check: Callable[[int, Mapping[str, Any]], None] = lambda step, info: None,
    ) -> Restored:
        """Returns the last checkpoint that is not damaged.

        Damaged ones after it are moved to the folder ``damaged``. There must be a `last_step`. The
        arrays have the shapes, dtypes and shardings of ``params`` and ``state``. With several
        processes a damaged checkpoint is an error, because they might restore different steps.

        Args:
          params: parameters of the resumed run; their values are not used.
          state: its optimizer state; its values are not used.
          changes: how the config has changed since, for the message about another optimizer.
          check: called with the step and the info of a checkpoint before its arrays are read. It
            may raise a `UserError`.

        Raises:
          UserError: all checkpoints are damaged, the last undamaged one is of another model or
            optimizer, or ``check`` raised the error, with nothing moved in these cases; or a
            damaged checkpoint cannot be moved.
        """
        damaged: dict[int, str] = {}  # step -> what is wrong
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                info, training = self._read(
                    step, {"params": params, "state": state}, changes, check
                )
            except Damaged as error:
                if jax.process_count() > 1:
                    raise self._damaged(step, error.reason) from error
                damaged[step] = error.reason
            else:
                notes = [
                    f"the checkpoint of step {bad} is damaged ({reason}) and was moved to "
                    f"{self._move_away(bad, step)}; resuming from step {step}"
                    for bad, reason in damaged.items()
                ]
                return Restored(step, training["params"], training["state"], info, notes)
        tried = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
        raise UserError(
            f"no checkpoint in {self.folder} can be read ({tried}); none was moved. Move "
            f"that folder away and run the same command to start anew, or choose another folder "
            f"with run.dir"
        )

    def _read(
        self,
        step: int,
        training: Tree,
        changes: Sequence[str],
        check: Callable[[int, Mapping[str, Any]], None],
    ) -> tuple[Mapping[str, Any], Tree]:
        """Returns info and arrays of a checkpoint; raises `Damaged` or `UserError`."""
        path = self.folder / str(step)
        with reading():
            read = self._manager.restore(step, args=ocp.args.Composite(info=ocp.args.JsonRestore()))
        record = checked(read["info"], path)
        check(step, record["info"])
        try:
            saved_state.check(record["description"], training)
        except ArgumentValueError as error:
            since = f"{'; '.join(changes)}; " if changes else ""
            raise UserError(
                f"the checkpoint {path} is of another model or optimizer: "
                f"{since}{error}, or choose another folder with run.dir"
            ) from None
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, training)
        with reading():
            restore = ocp.args.Composite(training=ocp.args.StandardRestore(like))
            restored = self._manager.restore(step, args=restore)["training"]
            # A random key that has lost its metadata is read as an array of its words.
            saved_state.check(record["description"], restored)
        check_arrays(record, restored)
        return record["info"], restored

    def _move_away(self, step: int, instead: int) -> Path:
        """Moves a damaged checkpoint away, because its step will be saved again."""
        path, folder = self.folder / str(step), self.folder.parent / "damaged"
        names = itertools.chain([f"{step}"], (f"{step}.{i}" for i in itertools.count(1)))
        try:
            folder.mkdir(exist_ok=True)
            target = next(folder / name for name in names if not (folder / name).exists())
            os.replace(path, target)
        except OSError as error:
            raise UserError(
                f"the checkpoint {path} is damaged and cannot be moved to {folder}: "
                f"{error.strerror}; remove it to resume from step {instead}"
            ) from error
        self._manager.reload()
        return target

    def _damaged(self, step: int, reason: str) -> UserError:
        before = [s for s in self._manager.all_steps() if s < step]
        instead = f"resume from step {max(before)}" if before else "start anew"
        return UserError(
            f"cannot read the checkpoint {self.folder / str(step)}, it is damaged ({reason}): "
            f"remove it to {instead}"
        )


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns errors of saving into ``folder``, which is in a run folder, into a `UserError`.

    Raises:
      UserError: the block has raised an error. The message names the last complete checkpoint.
    """
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise many types here.
        # Read from the disk, because Orbax lists a step before it is written.
        whole = saved_steps(folder.parent)
        saved = f"the last complete one is of step {whole[-1]}" if whole else "none is saved yet"
        raise UserError(
            f"cannot write a checkpoint to {folder}: "
            f"{foreign_errors.why_not_written_or_read(error)}; {saved}: make room, or make "
            f"the folder writable, and start again"
        ) from error
