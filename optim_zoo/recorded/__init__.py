"""Recorded trajectories of reference optimizers; ``README.md`` describes the files.

A case feeds recorded gradients to one optimizer and holds the parameters after every step::

    for case in recorded.cases():
        trajectory = case.load()
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from importlib import resources
from types import MappingProxyType
from typing import Any

import numpy as np

from optim_zoo.errors import ArgumentValueError

Tree = dict[str, Any]  # nested dicts of arrays


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """The gradients that a reference optimizer received, and what it computed from them.

    All trees are nested dicts of arrays.
    """

    params0: Tree  # the parameters before the first step
    grads: tuple[Tree, ...]  # the gradients of each step
    params: tuple[Tree, ...]  # the parameters after each step
    extras: Mapping[str, Mapping[int, Tree]]  # name -> step from 0 -> state after it
    per_step: Mapping[str, np.ndarray]  # one number for each step, such as "lr"


@dataclasses.dataclass(frozen=True)
class Case:
    """One reference optimizer with its arguments, and how closely ours must agree with it."""

    id: str
    constructor: str  # its name in this package, such as "optim_zoo.lamb"
    arguments: Mapping[str, Any]  # "per_step/<name>": that series as a function of the step
    inner: Mapping[str, Any] | None  # constructor and arguments of the optimizer it wraps
    sparse_leaves: tuple[str, ...]  # paths of leaves whose gradients are `SparseRows`
    dtype: str  # "float64" needs jax_enable_x64
    steps: int
    rtol: float
    atol: float
    reference: str  # whose code, and which version of it
    origin: str  # "executed": that code was run; "transcribed": from a paper or a CUDA kernel
    notes: str
    extras: tuple[str, ...]  # names of the recorded state
    extra_steps: tuple[int, ...]  # the steps (from 0) after which it was recorded

    def load(self) -> Trajectory:
        """Reads the arrays of this case from its file."""
        with (_FOLDER / f"{self.id}.npz").open("rb") as file, np.load(file) as archive:
            arrays = dict(archive)

        def at_step(prefix: str, index: int) -> Tree:
            return _nested({k: x[index] for k, x in _below(prefix, arrays).items()})

        return Trajectory(
            params0=_nested(_below("params0/", arrays)),
            grads=tuple(at_step("grads/", i) for i in range(self.steps)),
            params=tuple(at_step("params/", i) for i in range(self.steps)),
            extras={
                name: {s: at_step(f"extra/{name}/", i) for i, s in enumerate(self.extra_steps)}
                for name in self.extras
            },
            per_step=_below("per_step/", arrays),
        )


def cases() -> list[Case]:
    """Returns every recorded case, ordered by id."""
    return list(_cases())


def get(case_id: str) -> Case:
    """Returns the case with the id ``case_id``.

    Raises:
      ArgumentValueError: There is no such case.
    """
    for case in _cases():
        if case.id == case_id:
            return case
    advice = f"there are {len(_cases())}, see cases()"
    raise ArgumentValueError(
        "case_id",
        "be the id of a recorded case",
        case_id,
        advice,
        sentence=f"no recorded case {case_id!r}; {advice}",
    )


_FOLDER = resources.files(__name__)


@functools.cache
def _cases() -> tuple[Case, ...]:
    manifest = json.loads((_FOLDER / "cases.json").read_text("utf-8"))
    made = [_case(entry, tuple(manifest["leaves"])) for entry in manifest["cases"]]
    return tuple(sorted(made, key=lambda case: case.id))


def _case(entry: dict[str, Any], leaves: tuple[str, ...]) -> Case:
    sparse = entry.get("sparse_leaves", ())
    read: dict[str, Any] = {
        **{field.name: entry.get(field.name) for field in dataclasses.fields(Case)},
        "arguments": MappingProxyType(entry["arguments"]),
        "sparse_leaves": leaves if sparse == "all" else tuple(sparse),
        "extras": tuple(entry["extras"]),
        "extra_steps": tuple(entry["extra_steps"]),
    }
    return Case(**read)


def _below(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): x for k, x in arrays.items() if k.startswith(prefix)}


def _nested(arrays: Mapping[str, np.ndarray]) -> Tree:
    """Returns ``{"a": {"b": x}}`` for ``{"a/b": x}``."""
    tree: Tree = {}
    for path, x in arrays.items():
        *outer, name = path.split("/")
        node = tree
        for key in outer:
            node = node.setdefault(key, {})
        node[name] = x
    return tree
