"""Stochastic rounding of parameters, and of arrays in general."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges, rows
from optim_zoo.errors import ArgumentTypeError, parameters_missing
from optim_zoo.tree import Tree, check_floating, promoting, wide
from optim_zoo.wrappers.precision.narrow import is_narrow, reaching, widened


class StochasticRoundingState(NamedTuple):
    """State of `stochastic_rounding`."""

    key: jax.Array  # uint32: the data of the next step's key, which Flax can serialize
    inner: optax.OptState


def stochastic_rounding(
    inner: optax.GradientTransformation, key: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """Rounds parameters up or down at random after a step, so that small steps arrive on average.

    ::

        new = x + inner(g, x)  in float32
        x <- up(new) with probability (new - down(new)) / (up(new) - down(new)), else down(new)

    where up(new) and down(new) are the nearest numbers of the parameter's dtype. The mean of the
    rounded parameter is the unrounded one. No copy of the parameters is needed; the price is the
    noise of one rounding in every step. The updates are float32, for ``optax.apply_updates``.
    Parameters of float32 or wider receive the updates of ``inner`` unchanged.

    Args:
      inner: Any optimizer. It receives the parameters converted to float32, and the gradients
        unchanged.
      key: One key, ``jax.random.key(seed)``, which every step splits. Two runs with the same key
        round alike.

    Returns:
      A transformation whose state is a ``StochasticRoundingState``: the data of the next key, and
      the state of ``inner``.

    Raises:
      ArgumentValueError: In ``update``, the parameters are missing, or a gradient has another shape
        than its parameter.
      ArgumentTypeError: ``inner`` is not a transformation, or ``key`` is not one key; in ``init``,
        a parameter is not floating-point.

    Example:
      ```python
      tx = optim_zoo.precision.stochastic_rounding(optim_zoo.adamw(1e-3), jax.random.key(0))
      ```
    """
    ranges.check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)
    is_array = isinstance(key, jax.Array)
    if not is_array or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.ndim:
        raise ArgumentTypeError("key", "be one key, such as jax.random.key(0)", key)

    def init(params: Tree) -> StochasticRoundingState:
        check_floating(params)
        return StochasticRoundingState(
            jnp.copy(jax.random.key_data(key)), inner.init(jax.tree.map(widened, params))
        )

    @promoting
    def update(
        updates: Tree, state: StochasticRoundingState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, StochasticRoundingState]:
        if params is None:
            raise parameters_missing("stochastic_rounding")
        rows.check_updates("stochastic_rounding", updates, params)
        master = jax.tree.map(wide, params)
        steps, inner_state = inner.update(updates, state.inner, master, **extra)
        state_key = jax.random.wrap_key_data(state.key, impl=jax.random.key_impl(key))
        next_key, now = jax.random.split(state_key)
        keys = keys_like(now, params)
        updates = jax.tree.map(
            lambda x, u, k: (
                reaching(round_stochastically(wide(x) + u, x.dtype, k), x) if is_narrow(x) else u
            ),
            params,
            steps,
            keys,
        )
        return updates, StochasticRoundingState(jax.random.key_data(next_key), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def keys_like(key: jax.Array, tree: Tree) -> Tree:
    """Returns a key for every leaf of ``tree``."""
    structure: Any = jax.tree.structure(tree)
    return structure.unflatten(list(jax.random.split(key, structure.num_leaves)))


def round_stochastically(x: jax.Array, dtype: Any, key: jax.Array) -> jax.Array:
    """Rounds ``x`` up or down at random, so that the mean over keys is ``x``.

    The mean is exact for bfloat16, and for float16 too, also below 6.1e-5, where its numbers are
    evenly spaced. A number that is not finite is unchanged, and one beyond the largest number of
    ``dtype`` is rounded as usual.

    Args:
      x: An array in float32, of any shape.
      dtype: Either bfloat16 or float16.
      key: One key.

    Returns:
      An array of the shape of ``x`` and of dtype ``dtype``.
    """
    narrow = x.astype(dtype)
    if jnp.dtype(dtype) == jnp.bfloat16 and x.dtype == jnp.float32:
        return _cut_at_random(x, narrow, key)
    below = jnp.where(wide(narrow) > x, jnp.nextafter(narrow, jnp.asarray(-jnp.inf, dtype)), narrow)
    above = jnp.nextafter(below, jnp.asarray(jnp.inf, dtype))
    share = (x - wide(below)) / (wide(above) - wide(below))
    up = jax.random.uniform(key, x.shape) < share
    rounded = jnp.where(up, above, below)
    return jnp.where(jnp.isfinite(wide(narrow)) & jnp.isfinite(wide(above)), rounded, narrow)


def _cut_at_random(x: jax.Array, narrow: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds to bfloat16, which is the first half of a float32.

    A random second half is added to the second half of ``x``, which is then cut off. With
    probability (second half) / 2^16 the first half becomes the next number, away from 0.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    raised = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((raised >> 16).astype(jnp.uint16), jnp.bfloat16)
    largest = jnp.uint32(0x7F7F)  # Infinity and NaN are above it.
    return jnp.where((bits >> 16) & 0x7FFF < largest, rounded, narrow)
