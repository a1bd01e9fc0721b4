"""What a run has left in its folder, and the parts of a fault's record that describe it."""

import json
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jobs import SHORT, Ended, Site

Record = dict[str, Any]

UNBROKEN = "an unbroken run"
RESUMED = "resuming from the checkpoint of step "  # what the command prints when it resumes


# Reading a run folder


def lines(folder: Path, *, rates: bool = False) -> list[Record]:
    """Returns the complete lines of the metrics.

    Args:
      folder: the run folder.
      rates: whether to keep tokens per second, which differ between equal runs.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    if not rates:
        for record in records:
            record.pop("tokens_per_second", None)
    return records


def trained(folder: Path) -> list[Record]:
    """Returns the lines of training steps."""
    return [line for line in lines(folder) if line["kind"] == "train"]


def made(folder: Path) -> int:
    """Returns the last step in the metrics, or 0."""
    path = folder / "metrics.jsonl"
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for line in reversed(whole):
        record = json.loads(line)
        if record["kind"] == "train":
            return record["step"]
    return 0


def skipped_steps(folder: Path) -> list[int]:
    """Returns the steps at which the number of skipped steps increased."""
    counts = [(line["step"], line.get("skipped_steps", 0)) for line in trained(folder)]
    before = [0, *(count for _, count in counts)]
    return [step for (step, count), last in zip(counts, before, strict=False) if count > last]


def saved_steps(folder: Path) -> list[int]:
    """Returns the steps with a complete checkpoint, and step 0, where every run begins."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return [0, *sorted(int(name) for name in names if name.isdecimal())]


def saving(folder: Path) -> bool:
    """Returns whether a save has begun and not ended."""
    return any((folder / "checkpoints").glob("*tmp*"))


_ORBAX = threading.Lock()


def arrays(folder: Path, step: int) -> dict[str, np.ndarray]:
    """Returns the arrays of a checkpoint by path, read by Orbax alone.

    Raises:
      FileNotFoundError: there is no such checkpoint.
    """
    path = folder / "checkpoints" / str(step) / "training"
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint of step {step}")
    with _ORBAX, ocp.PyTreeCheckpointer() as reader:
        kinds = reader.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), kinds)
        tree = reader.restore(path, ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree.leaves_with_path(tree)
    }


def compared(folder: Path, other: Path, fewer: int | None = None) -> dict[str, bool]:
    """Whether two runs end with the same metrics, parameters and optimizer state, bit for bit.

    Args:
      folder: the run folder.
      other: the run folder to compare it with.
      fewer: None, or how many steps fewer the other run makes to reach the same end, because it is
        never given some of the batches. Then step counts, evaluations, the lines of skipped steps,
        and missing losses are not compared.
    """
    ours, theirs = lines(folder), lines(other)
    uncounted: set[str] = set()
    if fewer is not None:
        uncounted = {"skipped_steps", "skipped_micro_batches"}
        skipped = skipped_steps(folder)
        ours = [line for line in trained(folder) if line["step"] not in skipped]
        theirs = trained(other)[: len(ours)]
        for line, like in zip(ours, theirs, strict=False):
            left_out = ["step", "tokens", "skipped_steps", "skipped_micro_batches"]
            for name in left_out + ["loss"] * (line["loss"] is None):
                line.pop(name, None)
                like.pop(name, None)
    end = saved_steps(folder)[-1]
    here, there = arrays(folder, end), arrays(other, end - (fewer or 0))
    different = [
        path
        for path in here.keys() | there.keys()
        if _bits(here.get(path)) != _bits(there.get(path)) and not uncounted & {*path.split("/")}
    ]
    return {
        "metrics": ours == theirs,
        "parameters": not any(path.startswith("params/") for path in different),
        "optimizer state": not any(path.startswith("state/") for path in different),
    }


def _bits(x: np.ndarray | None) -> Any:
    return None if x is None else (x.dtype, x.shape, x.tobytes())


def _finite(folder: Path) -> bool:
    """Returns whether the last checkpoint has parameters, all of them finite."""
    last = arrays(folder, saved_steps(folder)[-1])
    parameters = [x for path, x in last.items() if path.startswith("params/")]
    return bool(parameters) and all(np.isfinite(x).all() for x in parameters)


# Parts of a record


def stopped(ended: Ended, folder: Path) -> Record:
    """Returns how a run ended, and the last steps that it made and saved."""
    return {
        "exit_code": ended.code,
        "said": ended.sentence(folder),
        "made": made(folder),
        "saved": saved_steps(folder)[-1],
    }


def resumed(ended: Ended, folder: Path) -> Record:
    """What the next start printed, and the step that it resumed from."""
    notes, begun, rest = ended.out.partition(RESUMED)
    return {
        "next_exit_code": ended.code,
        "next_said": ended.sentence(folder),
        "next_notes": notes.replace(str(folder), "run").splitlines() if begun else [],
        "resumed_from": int(rest.split()[0]) if begun else 0,
    }


def end(folder: Path, other: Path, like: str, fewer: int | None = None) -> Record:
    """Returns how a run compares with another at its end.

    Args:
      folder: the run folder.
      other: the run folder to compare it with.
      like: what the table calls the other run.
      fewer: as in `compared`.
    """
    try:
        same = compared(folder, other, fewer)
        return {"like": like, "same": same, "finite": _finite(folder)}
    except (OSError, ValueError) as error:  # there is nothing to compare
        return {"like": like, "same": {}, "finite": None, "not_compared": str(error)[:200]}


def restarted(site: Site, folder: Path, ended: Ended) -> Record:
    """Returns the record of a run of `SHORT` that was stopped, after starting it once more."""
    before = stopped(ended, folder)
    after = resumed(site.run(folder, SHORT), folder)
    lost = before["made"] - after["resumed_from"]
    return {**before, **after, "lost": lost, **end(folder, site.finished(), UNBROKEN)}
