"""Reads the parameters of a saved step, without the optimizer state and without changing anything.

`Checkpoints` restores a run for its next step: it needs the optimizer state, moves damaged
checkpoints away, and must be used under the lock of the run. This file is for everything else that
uses what a run has learned, also while the run is training.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from optim_zoo import saved_state
from optim_zoo.errors import ArgumentValueError, UserError
from optim_zoo.train.checkpoint_records import Damaged, check_arrays, checked, reading
from optim_zoo.train.run_folder import BEST, CHECKPOINTS, saved_steps
from optim_zoo.tree import Tree
from optim_zoo.wrappers.averaging.state import AverageParametersState


class SavedParams(NamedTuple):
    """What `read` has read."""

    step: int  # the number of steps made
    params: Tree
    info: Mapping[str, Any]  # as it was passed to `Checkpoints.save` or `Best.save`
    notes: list[str]  # a sentence about each damaged checkpoint that was passed over


def read(
    folder: Path,
    like: Tree,
    *,
    step: int | None = None,
    best: bool = False,
    averaged: bool | None = None,
) -> SavedParams:
    """Returns the parameters of a step of a run, after their checksums are compared.

    This takes no lock, writes nothing, and reads no optimizer state. It also works while another
    process trains the run, and on a folder that is read-only.

    Args:
      folder: the run folder.
      like: arrays or ``jax.ShapeDtypeStruct``s of the same structure, shapes and dtypes as the
        saved parameters; their values are not used. Without a sharding, an array is placed on the
        default device.
      step: the number of steps made; None for the last step that is not damaged.
      best: whether to read from the parameters that ``output.keep_best`` has kept, ``<run>/best``,
        instead of from the checkpoints. Their ``info`` has ``metric``, ``value`` and ``step``.
      averaged: whether to read the average that ``averaging.decay`` keeps, in the dtypes of
        ``like``, instead of the parameters. None reads the parameters, and the best ones as the
        run has evaluated them: as ``info["evaluated"]`` says, they may be the average.

    Returns:
      A `SavedParams` with the fields ``step``, ``params`` (with the containers, shapes, dtypes and
      shardings of ``like``), ``info`` (for a checkpoint ``machine``, ``identity`` and what else the
      run has recorded) and ``notes``.

    Raises:
      UserError: nothing is saved, the step is not, it is damaged, or all steps are; the
        parameters are of another model; there is no average; or an earlier version of the package
        has saved them.
    """
    name = BEST if best else CHECKPOINTS
    like = jax.tree.map(_placed, like)
    refused: dict[int, str] = {}  # step -> what is wrong
    # The steps are listed anew each time, because a run that is training removes old ones.
    while True:
        steps = saved_steps(folder, name)
        if not steps:
            raise UserError(_nothing_saved(folder, best))
        if step is not None and step not in steps:
            known = ", ".join(map(str, steps))
            raise UserError(f"{folder / name} has no step {step}: the steps saved are {known}")
        left = [each for each in steps if each not in refused] if step is None else [step]
        if not left:
            tried = "; ".join(f"step {each}: {reason}" for each, reason in refused.items())
            raise UserError(f"no step in {folder / name} can be read ({tried})")
        try:
            info, params = _read(folder / name / str(left[-1]), like, best, averaged)
        except Damaged as error:
            if step is not None:
                others = ", ".join(str(each) for each in steps if each != step) or "none"
                raise UserError(
                    f"cannot read {folder / name / str(step)}, it is damaged ({error.reason}): "
                    f"choose another step (saved: {others})"
                ) from error
            refused[left[-1]] = error.reason
        else:
            notes = [
                f"the checkpoint of step {bad} is damaged ({reason}); step {left[-1]} is read "
                f"instead"
                for bad, reason in refused.items()
                if bad in steps
            ]
            return SavedParams(left[-1], params, info, notes)


def info(path: Path) -> Mapping[str, Any]:
    """Returns what was recorded with the saved step in the folder ``path``.

    Raises:
      Damaged: it cannot be read, or has changed since it was saved.
      UserError: an earlier version of the package has saved it.
    """
    return _record(path)["info"]


def _record(path: Path) -> Mapping[str, Any]:
    with reading():
        record = json.loads((path / "info" / "metadata").read_text(encoding="utf-8"))
    return checked(record, path)


def _read(
    path: Path, like: Tree, best: bool, averaged: bool | None
) -> tuple[Mapping[str, Any], Tree]:
    """Returns info and parameters of a saved step; raises `Damaged` or `UserError`."""
    record, place = _record(path), ["params"]
    is_average = record["info"].get("evaluated") == "average"
    if best and averaged is not None and averaged != is_average:
        has = "the average, not the parameters" if is_average else "parameters, not their average"
        raise UserError(
            f"{path} has {has}, because the run evaluates the former: leave out the choice between "
            "them, or read a checkpoint instead of the best parameters"
        )
    if averaged and not best:
        place = _place_of_average(record["description"], path)
    wanted = jax.tree.map(_widened, like) if len(place) > 1 else like
    description = _at(place, record["description"])
    try:
        saved_state.check(description, {"params": wanted})
    except ArgumentValueError as error:
        lines = saved_state.differences(description, {"params": wanted})
        shown = "; ".join(lines[:5] + ([f"and {len(lines) - 5} more"] if len(lines) > 5 else []))
        raise UserError(f"the parameters saved in {path} are of another model: {shown}") from error
    saved = path.absolute() / "training"  # Orbax refuses relative paths
    with reading(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        item = {"params": wanted}
        if len(place) > 1:
            metadata = checkpointer.metadata(saved).item_metadata.tree
            item = jax.tree.map(lambda _: ocp.PLACEHOLDER, metadata)
            _node(item, place[:-1])[place[-1]] = wanted
        restore = ocp.args.PyTreeRestore(
            item=item,
            restore_args=ocp.checkpoint_utils.construct_restore_args(item),
            partial_restore=len(place) == 1,  # without the optimizer state
        )
        restored = _node(checkpointer.restore(saved, args=restore), place)
        saved_state.check(description, {"params": restored})
    check_arrays({"checksums": _below(place, record["checksums"])}, {"params": restored})
    return record["info"], jax.tree.map(lambda x, y: x.astype(y.dtype), restored, like)


def _place_of_average(description: Mapping[str, Any], path: Path) -> list[str]:
    """Returns the keys from the root of a checkpoint to the average of the parameters."""
    name = AverageParametersState.__name__
    places = [place for place, kind in description["containers"].items() if kind == name]
    if not places:
        raise UserError(f"{path} has no average of the parameters: the run has no averaging.decay")
    return [*places[0].split("/"), "average"]


def _node(tree: Any, place: Sequence[str]) -> Any:
    for key in place:
        tree = tree[int(key)] if isinstance(tree, list | tuple) else tree[key]
    return tree


def _at(place: Sequence[str], description: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a description of the tree at ``place``, as if its path were ``params``."""
    return {
        "version": description["version"],
        "arrays": _below(place, description["arrays"]),
        "containers": {"": "dict", **_below(place, description["containers"])},
    }


def _below(place: Sequence[str], entries: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries whose path is at or below ``place``, with ``params`` for it."""
    start = "/".join(place)
    return {
        "params" + path.removeprefix(start): value
        for path, value in entries.items()
        if path == start or path.startswith(start + "/")
    }


def _widened(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    dtype = jnp.promote_types(x.dtype, jnp.float32)  # as `averaging` keeps it
    return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)


def _placed(x: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _nothing_saved(folder: Path, best: bool) -> str:
    if best and saved_steps(folder):
        return (
            f"{folder} has no best parameters: they are kept where the run was started with "
            f"output.keep_best set to a held-out metric"
        )
    return f"{folder} has nothing saved yet: name a run folder with a checkpoint"
