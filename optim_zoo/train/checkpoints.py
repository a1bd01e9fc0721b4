"""Checkpoints of a run: orbax, asynchronous, the last few kept.

Beside the arrays stand what they are (`saved_state.describe`) and a checksum of each, since the
format itself does not notice a bit of an array that has changed. A checkpoint that cannot be read,
or not with these checksums, is damaged: a run goes on from the one before it.

Where a run has several processes all of them save, restore and wait together.
"""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from optim_zoo import saved_state
from optim_zoo.errors import ArgumentValueError, UserError
from optim_zoo.train import foreign_errors
from optim_zoo.train.distributed import Stopped
from optim_zoo.train.run_folder import saved_steps
from optim_zoo.tree import Tree


class Restored(NamedTuple):
    """What `Checkpoints.restore` has read."""

    step: int  # steps made
    params: Tree
    state: Tree
    info: Mapping[str, Any]  # what `Checkpoints.save` was given
    notes: list[str]  # a sentence for the user about each damaged checkpoint that was moved away


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
                    async_options=ocp.AsyncOptions(
                        # Else a folder that cannot be made is waited for, for twenty minutes.
                        create_directories_asynchronously=False,
                        # Orbax goes by the wall clock: one that is put forward by more than this
                        # during a save would end the run, as would a slow disk.
                        timeout_secs=100 * 365 * 86400,
                    ),
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
        training = {"params": params, "state": state}
        told = {
            "info": dict(info),
            "description": saved_state.describe(training),
            "checksums": _checksums(training),
        }
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    training=ocp.args.StandardSave(training),
                    info=ocp.args.JsonSave({**told, "sha256": _digest(told)}),
                ),
            )

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          UserError: a save could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def restore(
        self,
        params: Tree,
        state: Tree,
        *,
        check: Callable[[int, Mapping[str, Any]], None] = lambda step, info: None,
    ) -> Restored:
        """The last checkpoint that is whole; damaged ones after it are moved to ``damaged``.

        There must be a `last_step`. The arrays have the shapes, dtypes and shardings of ``params``
        and ``state``. Several processes do not fall back: they might, to different steps.

        Args:
          params: as they are in the run that goes on; their numbers do not matter.
          state: the same.
          check: called with the step and the info of a checkpoint before its arrays are read; a
            `UserError` that it raises goes to the caller.

        Raises:
          UserError: no checkpoint is whole, the last whole one is of another model or optimizer,
            or ``check`` raised it: then nothing is moved. Or a damaged one could not be moved.
        """
        damaged: dict[int, str] = {}  # step -> what is wrong
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                info, training = self._read(step, {"params": params, "state": state}, check)
            except _Damaged as error:
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
            f"no checkpoint in {self.folder} can be read ({tried}), and all are left where they "
            f"are: move that folder away to start anew by the same command, or choose another "
            f"folder with run.dir"
        )

    def _read(
        self, step: int, training: Tree, check: Callable[[int, Mapping[str, Any]], None]
    ) -> tuple[Mapping[str, Any], Tree]:
        """Info and arrays of a checkpoint; raises `_Damaged` or `UserError`."""
        with _reading():
            read = self._manager.restore(step, args=ocp.args.Composite(info=ocp.args.JsonRestore()))
            told = dict(read["info"])
        if not told.keys() & {"description", "sha256"}:
            raise UserError(
                f"the checkpoint {self.folder / str(step)} was saved by an earlier version of "
                f"optim_zoo: go on with that version, or choose another folder with run.dir"
            )
        if told.pop("sha256", None) != _digest(told):
            raise _Damaged("what it says of itself has changed since it was saved")
        check(step, told["info"])
        try:
            saved_state.check(told["description"], training)
        except ArgumentValueError as error:
            raise UserError(
                f"the checkpoint {self.folder / str(step)} is of another model or optimizer: "
                f"{error}, or choose another folder with run.dir"
            ) from None
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, training)
        with _reading():
            restore = ocp.args.Composite(training=ocp.args.StandardRestore(like))
            restored = self._manager.restore(step, args=restore)["training"]
            # Of a key without its metadata orbax reads the words, as an array.
            saved_state.check(told["description"], restored)
        sums = _checksums(restored)
        changed = [path for path, value in told["checksums"].items() if sums[path] != value]
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise _Damaged(f"the numbers of {changed[0]}{more} are not those that were saved")
        return told["info"], restored

    def _move_away(self, step: int, instead: int) -> Path:
        """Moves a damaged checkpoint out of the way of a later save of its step."""
        path, folder = self.folder / str(step), self.folder.parent / "damaged"
        names = itertools.chain([f"{step}"], (f"{step}.{i}" for i in itertools.count(1)))
        try:
            folder.mkdir(exist_ok=True)
            target = next(folder / name for name in names if not (folder / name).exists())
            os.replace(path, target)
        except OSError as error:
            raise UserError(
                f"the checkpoint {path} is damaged and cannot be moved to {folder}: "
                f"{error.strerror}; remove it to go on from step {instead}"
            ) from error
        self._manager.reload()
        return target

    def _damaged(self, step: int, reason: str) -> UserError:
        before = [s for s in self._manager.all_steps() if s < step]
        instead = f"go on from step {max(before)}" if before else "start anew"
        return UserError(
            f"cannot read the checkpoint {self.folder / str(step)}, it is damaged ({reason}): "
            f"remove it to {instead}"
        )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise many kinds for a failed write
            # From the disk: orbax's own list runs ahead of what is written.
            whole = saved_steps(self.folder.parent)
            saved = f"the last whole one is of step {whole[-1]}" if whole else "none is saved yet"
            raise UserError(
                f"cannot write a checkpoint to {self.folder}: "
                f"{foreign_errors.why_not_written_or_read(error)}; {saved}: make room, or make "
                f"the folder writable, and start again"
            ) from error


class _Damaged(Exception):
    """A checkpoint cannot be read, or is not what was saved."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError:  # of the device, such as too little memory
        raise
    except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
        raise _Damaged(foreign_errors.why_not_written_or_read(error)) from error


def _digest(told: Mapping[str, Any]) -> str:
    as_read = json.loads(json.dumps(told))  # a key that was a number is text then, and sorted so
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def _checksums(tree: Tree) -> dict[str, int]:
    """Of every array by its path in `saved_state.describe`."""
    # Each is waited for: of many programs at once, whose devices wait for one another, some would
    # find no thread on a CPU of few cores, and all stand still.
    sums = [int(_checksum(x)) for x in jax.tree.leaves(tree)]
    return dict(zip(saved_state.describe(tree)["arrays"], sums, strict=True))


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """The sum over an array of its words, each mixed with its place, mod 2^32: (), uint32.

    The mixing has an inverse, so that any change of one word shows; of others one in 2^32 does
    not. A sum is the same however the array is sharded.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize > 4:
        unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        x = jax.lax.bitcast_convert_type(x, unsigned)
    words = x.astype(jnp.uint32)
    index = jnp.uint32(0)
    for axis, size in enumerate(words.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    words += index * jnp.uint32(0x9E3779B9)  # any odd number
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the last mixing of MurmurHash3
        words = (words ^ (words >> shift)) * jnp.uint32(factor)
    return jnp.sum(words ^ (words >> 16), dtype=jnp.uint32)
