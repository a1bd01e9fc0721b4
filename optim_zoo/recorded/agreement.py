"""Compares optimizers with recorded trajectories, step by step."""

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optim_zoo.recorded import Case, Trajectory, Tree
from optim_zoo.rows import SparseRows, apply_updates
from optim_zoo.tree import map_with_path

# `Agreement.difference` of references from their own recordings when run again, keyed by case.
REFERENCE_NOISE: Mapping[str, float] = MappingProxyType(
    {
        # pytorch_optimizer rounds the global norm to float32 and sums in an order that is not
        # recorded: run again, it differs by 7.3e-7 from its recording; we differ by 2.4e-6.
        "po_lamb_prenorm": 3e-6,
    }
)


_apply = jax.jit(apply_updates)  # compiled once for all cases whose parameters have one structure


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The result of comparing an optimizer with one recorded trajectory."""

    case: Case
    optimizer: str  # its name here, such as "ports.torch.AdamW"
    difference: float  # the largest relative difference of any parameter after any step
    agrees: bool  # whether it is within the tolerance of the case

    @property
    def within_noise(self) -> bool:
        """Whether it differs by no more than the reference itself: see `REFERENCE_NOISE`."""
        return not self.agrees and self.difference <= REFERENCE_NOISE.get(self.case.id, 0.0)


@dataclasses.dataclass(frozen=True)
class Step:
    """Parameters and state of an optimizer here after one recorded step."""

    params: Tree
    state: Any


def follow(
    case: Case, constructor: str | None = None, arguments: Mapping[str, Any] | None = None
) -> Agreement:
    """Feeds the recorded gradients to an optimizer and compares the parameters after each step.

    The difference is the largest |ours - recorded| / (|recorded| + atol / rtol) of any parameter
    after any step, with the tolerances of the case. The optimizer agrees where it is at most rtol.
    Cases in float64 run in float64.

    Args:
      case: The recorded case.
      constructor: The dotted name of the optimizer. By default, the one that the case names.
      arguments: The arguments of the optimizer, in the form of `Case.arguments`. By default,
        those of the case.
    """
    name = case.constructor if constructor is None else constructor
    floor = case.atol / case.rtol
    largest = 0.0
    trajectory = case.load()
    for step, recorded in zip(
        steps(case, trajectory, name, arguments), trajectory.params, strict=True
    ):
        for ours, theirs in zip(
            jax.tree.leaves(step.params), jax.tree.leaves(recorded), strict=True
        ):
            differences = np.abs(np.asarray(ours) - theirs) / (np.abs(theirs) + floor)
            # Python's own max would drop NaN.
            largest = float(np.max([largest, np.max(differences, initial=0.0)]))
    return Agreement(case, name.removeprefix("optim_zoo."), largest, largest <= case.rtol)


def steps(
    case: Case,
    trajectory: Trajectory,
    constructor: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    *,
    jit: Callable[..., Any] = jax.jit,
) -> Iterator[Step]:
    """Yields parameters and state after each step of an optimizer on the recorded gradients.

    Args:
      case: The recorded case.
      trajectory: The arrays of the case.
      constructor: The dotted name of the optimizer. By default, the one that the case names.
      arguments: The arguments of the optimizer. By default, those of the case.
      jit: The function that compiles the update.
    """
    with jax.enable_x64(case.dtype == "float64"):
        tx = make(
            case.constructor if constructor is None else constructor,
            case.arguments if arguments is None else arguments,
            case.inner if arguments is None else None,
            trajectory,
        )
        params = jax.tree.map(jnp.asarray, trajectory.params0)
        state = tx.init(params)
        update = jit(tx.update)
        for grads in trajectory.grads:
            fed = map_with_path(lambda path, g: as_fed(case, path, g), grads)
            updates, state = update(fed, state, params)
            params = _apply(params, updates)
            yield Step(params, state)


def make(
    constructor: str,
    arguments: Mapping[str, Any],
    inner: Mapping[str, Any] | None,
    trajectory: Trajectory,
) -> optax.GradientTransformation:
    """Returns the optimizer with a dotted name, such as ``optim_zoo.ports.timm.Lamb``.

    Args:
      constructor: The dotted name.
      arguments: Its arguments. ``"per_step/<name>"`` becomes that series as a function of the step;
        ``{"constructor": ..., "arguments": ...}`` becomes the optimizer that it describes.
      inner: Constructor and arguments of the optimizer that it wraps, or None.
      trajectory: The arrays of the case, with the series.
    """
    module, name = constructor.rsplit(".", 1)
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)

    def value(given: Any) -> Any:
        if isinstance(given, str) and given.startswith("per_step/"):
            series = jnp.asarray(trajectory.per_step[given.removeprefix("per_step/")])
            return lambda step: series[step]
        if isinstance(given, Mapping):
            return make(given["constructor"], given["arguments"], None, trajectory)
        return given

    wrapped = [] if inner is None else [value(inner)]
    return function(*wrapped, **{key: value(given) for key, given in arguments.items()})


def as_fed(case: Case, path: str, g: np.ndarray) -> Any:
    """Returns the gradient as the reference received it: as `SparseRows` where it was sparse."""
    if path not in case.sparse_leaves:
        return jnp.asarray(g)
    # Rows that are zero become padding, so that every step has the same shapes.
    touched = np.any(g != 0, axis=tuple(range(1, g.ndim)))
    ids = np.where(touched, np.arange(len(g)), len(g)).astype(np.int32)
    return SparseRows(ids, g, len(g))
