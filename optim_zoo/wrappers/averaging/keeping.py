"""Averages that are computed in the step and kept in the state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optim_zoo import ranges, rows
from optim_zoo.errors import ArgumentTypeError, parameters_missing
from optim_zoo.tree import (
    Tree,
    by_path,
    check_floating,
    map_with_path,
    promoting,
    wide,
    wide_copy,
)
from optim_zoo.wrappers.accumulation import AccumulateState
from optim_zoo.wrappers.averaging.state import AverageParametersState, outermost
from optim_zoo.wrappers.decisions import materialized
from optim_zoo.wrappers.guards import SkipNonfiniteState, SkipSpikesState
from optim_zoo.wrappers.precision.masters import MasterWeightsState

# step t = 1, 2, ... -> whether the average becomes the parameters, whether it changes at all, and
# the weight w of the parameters in  average + w (x - average)
_Weight = Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.typing.ArrayLike]]


def average_parameters(
    inner: optax.GradientTransformation,
    decay: jax.typing.ArrayLike = 0.999,
    *,
    start: int = 0,
    debias: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Keeps an exponential moving average of the parameters after each step of ``inner``.

    ::

        average_t = x_t                                           for t <= start
        average_t = average_{t-1} + w (x_t - average_{t-1})       for t >  start
        w = 1 - decay,   or with debias  w = (1 - decay) / (1 - decay^(t - start))

    x_0 are the initial parameters and x_t those after step t. With ``start=0`` the average begins
    at x_0, which has the weight decay^t in it, and nothing is divided by 1 - decay^t: after 300
    steps with a decay of 0.999, x_0 still has a weight of 0.74. ``debias=True`` leaves x_start out:
    the average is then sum(decay^(t-i) x_i) / sum(decay^(t-i)) over i = start + 1, ..., t, which is
    nearly the mean of all steps while these are few.

    Averages of parameters are from Polyak and Juditsky (SIAM J. Control Optim. 30, 1992); this one
    is ``tf.train.ExponentialMovingAverage`` without ``num_updates``.

    Put it around everything that changes updates, such as `scale_by_rules`; what is outside must
    pass the updates on unchanged. Wrappers may be on either side of it: one step of the optimizer
    is one step of the average.

    - `accumulation.accumulate`, ``optax.MultiSteps``: a micro-batch that completes no step leaves
      the average unchanged.
    - `guards`: so does a skipped step.
    - `precision.master_weights`: the average is that of the float32 masters.
    - `precision.stochastic_rounding`: inside it, the average is that of the parameters before they
      are rounded; outside it, after.

    The average is sharded like other state that is like the parameters, also by ZeRO-1. It takes 4
    bytes for each parameter, and a step reads and writes it once. With `SparseRows` gradients this
    is a pass over the whole table in every step.

    Args:
      inner: Any optimizer, whose updates are passed on unchanged, as all extra arguments are.
      decay: The decay rate of the average, a number in [0, 1).
      start: The number of steps before the average begins, at least 0.
      debias: Whether to leave the parameters after step ``start`` out of the average.

    Returns:
      A transformation whose state is an `AverageParametersState`: the number of steps, the average
      (like the parameters, in float32 or wider) and the state of ``inner``. From
      ``jax.ShapeDtypeStruct``s, ``init`` makes an average that consists of shapes too.

    Raises:
      ArgumentValueError: ``decay`` or ``start`` is out of its range; in ``update``, the parameters
        are missing, or a gradient has another shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optim_zoo.averaging.average_parameters(optim_zoo.adamw(1e-3), decay=0.99)
      ```
    """
    ranges.check_decay("decay", decay)
    ranges.check_count("start", start)
    if not isinstance(debias, bool):
        raise ArgumentTypeError("debias", "be True or False", debias)
    # In float64 where the number is known: float32 rounds 1 - 0.99999 by half a percent.
    known = not isinstance(decay, jax.core.Tracer)
    keep: Any = 1.0 - (np.float64(np.asarray(decay)) if known else decay)

    def weight(t: jax.Array) -> tuple[jax.Array, jax.Array, jax.typing.ArrayLike]:
        follows = t <= start + debias
        if not debias:
            return follows, jnp.bool_(True), jnp.asarray(keep, float)
        steps = jnp.maximum(t - start, 1).astype(float)
        # The logarithm of the decay, or of 6e-8 where that is 0: its powers are lost next to 1.
        logarithm = jnp.log1p(-jnp.minimum(jnp.asarray(keep, float), 1 - 2.0**-24))
        return follows, jnp.bool_(True), keep / -jnp.expm1(steps * logarithm)

    return _averaging("average_parameters", inner, weight)


def average_uniformly(
    inner: optax.GradientTransformation, start: int = 1, *, every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Keeps the mean of the parameters after the steps start, start + every, start + 2 every, ...

    ::

        average_t = x_t                                                    for t <= start
        average_t = (x_start + x_(start + every) + ... ) / n               for t >  start

    where n is the number of terms with an index <= t. This is stochastic weight averaging (SWA,
    arXiv 1803.05407); with ``start=1`` and ``every=1`` it is Polyak's average over all steps. Until
    step ``start``, the average is the current parameters.

    How it composes with other wrappers and what it costs is described in `average_parameters`.

    Args:
      inner: Any optimizer, whose updates are passed on unchanged, as all extra arguments are.
      start: The first step whose parameters are averaged, at least 1.
      every: The number of steps from one term of the mean to the next, at least 1.

    Returns:
      A transformation whose state is an `AverageParametersState`; see `average_parameters`.

    Raises:
      ArgumentValueError: ``start`` or ``every`` is below 1; in ``update``, the parameters are
        missing, or a gradient has another shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optim_zoo.averaging.average_uniformly(optim_zoo.sgd(0.1), start=750)
      ```
    """
    ranges.check_count("start", start, 1)
    ranges.check_count("every", every, 1)

    def weight(t: jax.Array) -> tuple[jax.Array, jax.Array, jax.typing.ArrayLike]:
        since = jnp.maximum(t - start, 0)
        return since == 0, since % every == 0, 1 / (1 + since // every).astype(float)

    return _averaging("average_uniformly", inner, weight)


def _averaging(
    name: str, inner: optax.GradientTransformation, weight: _Weight
) -> optax.GradientTransformationExtraArgs:
    ranges.check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def init(params: Tree) -> AverageParametersState:
        check_floating(params)
        average = jax.tree.map(wide_copy, params)
        return AverageParametersState(jnp.zeros((), jnp.int32), average, inner.init(params))

    @promoting
    def update(
        updates: Tree, state: AverageParametersState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, AverageParametersState]:
        if params is None:
            raise parameters_missing(name)
        rows.check_updates(name, updates, params, sparse=True)
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        moved = _masters(rows.apply_updates(params, updates), inner_state)
        t = optax.safe_increment(state.count)
        follows, changes, w = weight(t)
        made = _made(inner_state)
        made = jnp.bool_(True) if made is None else materialized(made)
        count = jnp.where(made, t, state.count)
        changes &= made

        def averaged(average: jax.Array, x: jax.Array) -> jax.Array:
            x = wide(x)
            new = jnp.where(follows, x, average + w * (x - average)).astype(average.dtype)
            return jnp.where(changes, new, average)

        average = jax.tree.map(averaged, state.average, moved)
        return updates, AverageParametersState(count, average, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _masters(params: Tree, state: Tree) -> Tree:
    """Returns ``params`` with the float32 masters that ``state`` holds in place of their leaves.

    They are found by path, because a group of parameters has a smaller tree.
    """
    nodes = outermost((MasterWeightsState,), state)
    masters = {path: x for node in nodes for path, x in by_path(node.master).items()}
    return map_with_path(lambda path, x: masters.get(path, x), params)


_STEPPING = (
    AccumulateState,
    SkipNonfiniteState,
    SkipSpikesState,
    optax.MultiStepsState,
    optax.ApplyIfFiniteState,
)


def _made(state: Tree) -> jax.Array | None:
    """Returns whether the last update changed the parameters; None where every update does.

    Where several groups of parameters have guards of their own, it is whether any of them made a
    step.
    """
    made = None
    for node in outermost(_STEPPING, state):
        if isinstance(node, optax.ApplyIfFiniteState):
            inner, here = node.inner_state, node.last_finite
        elif isinstance(node, optax.MultiStepsState):
            inner = node.inner_opt_state
            here = (node.mini_step == 0) & (node.gradient_step > 0)
        else:
            inner, here = node.inner, node.skipped_steps.in_a_row == 0
            if isinstance(node, AccumulateState):
                here &= (node.micro_batches == 0) & (node.steps > 0)
        below = _made(inner)
        here = here if below is None else here & below
        made = here if made is None else made | here
    return made
