"""How closely optimizers here follow recorded trajectories, step by step."""

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

# How far references stray from their own recordings, as `Agreement.difference`, by case.
REFERENCE_NOISE: Mapping[str, float] = MappingProxyType(
    {
        # pytorch_optimizer rounds the global gradient norm to float32, summing over the leaves in
        # an order that is not recorded. Run again it is 7.3e-7 from its recording; we are 2.4e-6.
        "po_lamb_prenorm": 3e-6,
    }
)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """An optimizer held against one recorded trajectory."""

    case: Case
    optimizer: str  # whose name it goes by here, such as "ports.torch.AdamW"
    difference: float  # the largest relative difference of any parameter after any step
    agrees: bool  # within the tolerance of the case, after every step

    @property
    def within_noise(self) -> bool:
        """It does not agree, but neither would the reference: see `REFERENCE_NOISE`."""
        return not self.agrees and self.difference <= REFERENCE_NOISE.get(self.case.id, 0.0)


@dataclasses.dataclass(frozen=True)
class Step:
    """What an optimizer here made of one recorded step."""

    params: Tree
    state: Any


def follow(
    case: Case, constructor: str | None = None, arguments: Mapping[str, Any] | None = None
) -> Agreement:
    """Feeds the recorded gradients to an optimizer and compares the parameters after each step.

    The difference is |ours - recorded| / (|recorded| + atol / rtol), with the tolerances of the
    case, which it agrees to where that is at most rtol. Float64 cases run in float64.

    Args:
      case: a recorded case.
      constructor, arguments: another optimizer than the case names, in the same form.
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
            apart = np.abs(np.asarray(ours) - theirs) / (np.abs(theirs) + floor)
            # max of Python's builtins drops NaN; this keeps it.
            largest = float(np.max([largest, np.max(apart, initial=0.0)]))
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
        apply = jax.jit(apply_updates)
        update = jit(tx.update)
        for grads in trajectory.grads:
            fed = map_with_path(lambda path, g: as_fed(case, path, g), grads)
            updates, state = update(fed, state, params)
            params = apply(params, updates)
            yield Step(params, state)


def make(
    constructor: str,
    arguments: Mapping[str, Any],
    inner: Mapping[str, Any] | None,
    trajectory: Trajectory,
) -> optax.GradientTransformation:
    """The optimizer of a dotted name, such as ``optim_zoo.ports.timm.Lamb``.

    An argument ``"per_step/<name>"`` is that series as a function of the step; one that is itself
    ``{"constructor": ..., "arguments": ...}`` is made first; ``inner`` is what it wraps.
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
    """A gradient as the reference saw it: its rows that are not zero, where it was sparse."""
    if path not in case.sparse_leaves:
        return jnp.asarray(g)
    # All rows, of which those that are zero are padding: each step then has the same shapes.
    touched = np.any(g != 0, axis=tuple(range(1, g.ndim)))
    ids = np.where(touched, np.arange(len(g)), len(g)).astype(np.int32)
    return SparseRows(ids, g, len(g))
