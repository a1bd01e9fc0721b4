"""The numbers of the gallery: agreement with recordings, distances of sources, and memory.

Everything is computed from the current source of the package. The result is cached in a file until
the package or these programs change, because following all recordings takes about a
minute.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optim_zoo
from gallery_settings import SETTINGS, Setting, Source, sources
from optim_zoo import catalogue, recorded, registry
from optim_zoo.recorded.agreement import follow, steps

_ROOT = Path(__file__).parents[2]
_ENTRIES = 1024 * 1024  # of the array whose state and traffic are counted
_THREADS = 2

# Sources whose distance is at most this compute the same. Float64 sources of one formula are within
# 1e-8 of one another. Rounding to float32 after each step gives distances of up to 3e-4.
SAME_FLOAT64 = 1e-7
SAME_FLOAT32 = 1e-3


@dataclasses.dataclass(frozen=True)
class Followed:
    """How closely an optimizer follows one recorded case."""

    case: str
    difference: float  # the largest relative one of any parameter after any step


@dataclasses.dataclass(frozen=True)
class Group:
    """Sources that compute the same."""

    labels: tuple[str, ...]
    rerun: tuple[bool, ...]  # which of them were not recorded under these arguments


@dataclasses.dataclass(frozen=True)
class Distances:
    """How far the sources of a setting are from one another."""

    groups: tuple[Group, ...]
    largest: tuple[tuple[float, ...], ...]  # of group i from group j, over all leaves
    median: tuple[tuple[float, ...], ...]  # over the leaves


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes for one parameter, of an optimizer with its default arguments."""

    state: float
    least: float  # if every array were read once and written once
    moved: float  # what the compiled program of one step reads and writes


@dataclasses.dataclass(frozen=True)
class Numbers:
    """All numbers of one optimizer."""

    followed: tuple[Followed, ...]
    distances: tuple[Distances, ...]  # one for each setting
    memory: Mapping[str, Memory]  # by the dtype of the parameters


def numbers(names: Sequence[str], cache: Path | None = None) -> dict[str, Numbers]:
    """Returns the numbers of these optimizers, from the file ``cache`` where it is still valid."""
    key = _key()
    if cache is not None and cache.is_file():
        kept = json.loads(cache.read_text("utf-8"))
        if kept["key"] == key and set(names) <= set(kept["numbers"]):
            return {name: _read(kept["numbers"][name]) for name in names}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        made = dict(zip(names, pool.map(_numbers, names), strict=True))
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        kept = {"key": key, "numbers": {k: dataclasses.asdict(v) for k, v in made.items()}}
        cache.write_text(json.dumps(kept), "utf-8")
    return made


def _numbers(name: str) -> Numbers:
    return Numbers(
        followed=tuple(
            Followed(c.case.id, follow(c.case, c.constructor, c.arguments).difference)
            for c in catalogue.comparisons(name)
        ),
        distances=tuple(distances(setting) for setting in SETTINGS.get(name, ())),
        memory={dtype: memory(registry.get(name), dtype) for dtype in ("float32", "bfloat16")},
    )


def distances(setting: Setting) -> Distances:
    """Compares the sources of a setting with one another after the last step."""
    found = sources(setting)
    ends = [_end(source) for source in found]
    start = found[0].case.load().params0
    largest, median = np.zeros((2, len(found), len(found)))
    for i, j in itertools.combinations(range(len(found)), 2):
        by_leaf = distance(start, ends[i], ends[j])
        largest[i, j] = largest[j, i] = max(by_leaf)
        median[i, j] = median[j, i] = float(np.median(by_leaf))
    groups = _groups(found, largest)

    def between(apart: np.ndarray) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(float(apart[np.ix_(a, b)].max()) for b in groups) for a in groups)

    return Distances(
        tuple(
            Group(
                tuple(found[i].label for i in group),
                tuple(not found[i].from_recording for i in group),
            )
            for group in groups
        ),
        between(largest),
        between(median),
    )


def distance(start: recorded.Tree, a: recorded.Tree, b: recorded.Tree) -> list[float]:
    """Returns ``|a - b|`` of each leaf, compared with how far the leaf has moved.

    The norms are Euclidean, and the movement is the longer one of ``|a - start|`` and
    ``|b - start|``. The distance is 0 for equal parameters, 1 if only one of the two has moved, and
    2 if they have moved in opposite directions.
    """
    apart = []
    for x0, x, y in zip(*map(jax.tree.leaves, (start, a, b)), strict=True):
        moved = max(np.linalg.norm(x - x0), np.linalg.norm(y - x0))
        apart.append(float(np.linalg.norm(x - y) / moved) if moved else 0.0)
    return apart


def _end(source: Source) -> recorded.Tree:
    """Returns the parameters of a source after the last step, in float64."""
    trajectory = source.case.load()
    if source.from_recording:
        end = trajectory.params[-1]
    else:
        # A float32 case holds the same numbers as the float64 ones.
        in_float64 = dataclasses.replace(
            trajectory,
            params0=_float64(trajectory.params0),
            grads=tuple(map(_float64, trajectory.grads)),
        )
        *_, last = steps(source.case, in_float64)
        end = last.params
    return _float64(end)


def _float64(tree: recorded.Tree) -> recorded.Tree:
    made: recorded.Tree = jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    return made


def _groups(found: Sequence[Source], apart: np.ndarray) -> list[list[int]]:
    """Groups the indices of the sources that compute the same, in their order."""
    groups: list[list[int]] = []
    for i, source in enumerate(found):
        for group in groups:
            narrow = "float32" in {source.case.dtype, *(found[j].case.dtype for j in group)}
            if apart[i, group].max() <= (SAME_FLOAT32 if narrow else SAME_FLOAT64):
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def memory(entry: registry.Entry, dtype: str) -> Memory:
    """Counts the state of an optimizer and what one compiled step reads and writes.

    The step is compiled for the CPU with the old parameters and the old state donated, for one
    array of 1,048,576 parameters.
    """
    tx: optax.GradientTransformation = (
        eval(entry.example, {"optim_zoo": optim_zoo}) if entry.wraps else entry.constructor(0.1)
    )
    params = {"kernel": jax.ShapeDtypeStruct((1024, _ENTRIES // 1024), jnp.dtype(dtype))}
    state = jax.eval_shape(tx.init, params)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optim_zoo.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    held = _bytes(state)
    return Memory(
        state=round(held / _ENTRIES, 1),
        least=round((3 * _bytes(params) + 2 * held) / _ENTRIES, 1),
        moved=round((compiled.cost_analysis() or {})["bytes accessed"] / _ENTRIES, 1),
    )


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _key() -> str:
    """Returns a checksum of everything that the numbers depend on."""
    digest = hashlib.sha256(f"{jax.__version__} {optax.__version__}".encode())
    for path in _files():
        digest.update(path.relative_to(_ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _files() -> Iterable[Path]:
    package = (p for p in (_ROOT / "optim_zoo").rglob("*") if p.suffix in (".py", ".npz", ".json"))
    here = Path(__file__)
    return sorted([*package, here, here.with_name("gallery_settings.py")])


def _read(kept: Mapping[str, Any]) -> Numbers:
    return Numbers(
        followed=tuple(Followed(**x) for x in kept["followed"]),
        distances=tuple(
            Distances(
                tuple(Group(tuple(g["labels"]), tuple(g["rerun"])) for g in x["groups"]),
                tuple(map(tuple, x["largest"])),
                tuple(map(tuple, x["median"])),
            )
            for x in kept["distances"]
        ),
        memory={dtype: Memory(**x) for dtype, x in kept["memory"].items()},
    )
