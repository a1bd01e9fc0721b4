"""Adam's direction, with and without bias correction (Kingma and Ba, arXiv 1412.6980)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges
from optim_zoo.tree import Tree, map_to_several, wide_dtype


class ScaleByAdamState(NamedTuple):
    """State of `scale_by_adam`."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made, saturating
    mu: Tree  # like the parameters, in float32 or wider: moving average of g
    nu: Tree  # like the parameters, in float32 or wider: moving average of g^2


def scale_by_adam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    bias_correction: bool = True,
) -> optax.GradientTransformation:
    """Turns gradients g into Adam's direction.

    ::

        mu <- b1 mu + (1 - b1) g
        nu <- b2 nu + (1 - b2) g^2
        u   = (mu / c1) / (sqrt(nu / c2) + eps),   c1 = 1 - b1^t, c2 = 1 - b2^t,  t = 1, 2, ...

    With ``bias_correction=False``, c1 = c2 = 1: BERT's Adam, and LAMB in version 3 of its paper.

    ``optax.scale_by_adam`` computes the same direction. Ours differs where low precision hurts:
    the moments are float32 or wider whatever the parameters and gradients are, so that a state
    keeps its dtypes and a second moment cannot stall; and c1, c2 come from expm1, because
    1 - 0.999^t in float32 is off by 3e-5 at t = 1.

    Args:
      b1, b2: decay rates in [0, 1).
      eps: added to the root, >= 0.

    Raises:
      ValueError: a rate or eps is out of its range.
      TypeError: a rate has fewer bits than float32, or a parameter is complex.
    """
    ranges.check_decay("b1", b1)
    ranges.check_decay("b2", b2)
    ranges.check("eps", eps, 0.0)

    def init(params: Tree) -> ScaleByAdamState:
        return ScaleByAdamState(jnp.zeros((), jnp.int32), zero_moment(params), zero_moment(params))

    def update(
        updates: Tree, state: ScaleByAdamState, params: Tree | None = None
    ) -> tuple[Tree, ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        c1 = bias(b1, count) if bias_correction else 1.0
        c2 = bias(b2, count) if bias_correction else 1.0

        def direction(
            g: jax.Array, mu: jax.Array, nu: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            mu, nu = moment(g, mu, b1), moment(jnp.square(g.astype(nu.dtype)), nu, b2)
            return (mu / c1) / (jnp.sqrt(nu / c2) + eps), mu, nu

        directions, mu, nu = map_to_several(direction, 3, updates, state.mu, state.nu)
        return directions, ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def zero_moment(params: Tree) -> Tree:
    """Zeros like ``params``, in float32 or wider."""
    return jax.tree.map(lambda x: jnp.zeros_like(x, dtype=wide_dtype(x)), params)


def moment(x: jax.Array, average: jax.Array, decay: jax.typing.ArrayLike) -> jax.Array:
    """The exponential moving average after ``x``, in the dtype it had."""
    x = x.astype(average.dtype)
    return jnp.asarray(decay * average + (1 - decay) * x, average.dtype)


def bias(decay: jax.typing.ArrayLike, count: jax.Array) -> jax.Array:
    """1 - decay^count to full precision: the weight that ``count`` values have in an average."""
    if isinstance(decay, (int, float)):
        return -jnp.expm1(count * (math.log(decay) if decay > 0 else -math.inf))
    return -jnp.expm1(count * jnp.log(decay))
