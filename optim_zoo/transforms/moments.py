"""Moving averages of the gradient and its square, which Adam and its siblings are made from."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges, rows
from optim_zoo.tree import Tree, check_floating, map_to_several, wide_dtype

# (g, mu, nu, t) -> u: the gradient in the dtype of the moments, the moments after it, and the
# number of the step, () int32, the first being 1.
Direction = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


class ScaleByAdamState(NamedTuple):
    """State of `scale_by_adam` and its siblings."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made, saturating
    mu: Tree  # like the parameters, in float32 or wider: moving average of g
    nu: Tree  # like the parameters, in float32 or wider: moving average of g^2


def scale_by_moments(
    piece: str,
    direction: Direction,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    *,
    grad_averaging: bool = True,
    lazy: bool = False,
) -> optax.GradientTransformation:
    """Turns gradients g into a direction made of their two moments.

    ::

        mu <- b1 mu + (1 - b1) g
        nu <- b2 nu + (1 - b2) g^2
        u   = direction(g, mu, nu, t),   t = 1, 2, ...

    Args:
      piece: its name, for messages.
      direction: the formula, for one array.
      b1, b2: decay rates in [0, 1).
      eps: of the formula, >= 0; only checked here.
      grad_averaging: False: mu <- b1 mu + g.
      lazy: takes `SparseRows` gradients, and moves only their rows of the moments.

    Raises:
      ValueError: a rate or eps is out of its range; in ``update``, a gradient has another shape
        than its parameter.
      TypeError: a rate has fewer bits than float32, or a parameter is not floating-point.
    """
    check_moments(b1, b2, eps)
    gain = None if grad_averaging else 1.0

    def init(params: Tree) -> ScaleByAdamState:
        return ScaleByAdamState(jnp.zeros((), jnp.int32), zero_moment(params), zero_moment(params))

    def update(
        updates: Tree, state: ScaleByAdamState, params: Tree | None = None
    ) -> tuple[Tree, ScaleByAdamState]:
        del params
        rows.check_updates(piece, updates, state.mu, sparse=lazy)
        count = optax.safe_increment(state.count)

        def step(
            g: jax.Array, mu: jax.Array, nu: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            g = g.astype(mu.dtype)
            mu, nu = moment(g, mu, b1, gain), moment(jnp.square(g), nu, b2)
            return direction(g, mu, nu, count), mu, nu

        def lazy_step(g: Any, mu: jax.Array, nu: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
            if not rows.is_sparse(g):
                return step(g, mu, nu)
            g = g.merged()
            u, *moved = step(g.rows, *(m.at[g.ids].get(mode="clip") for m in (mu, nu)))
            mu, nu = (
                m.at[g.ids].set(x, mode="drop", indices_are_sorted=True)
                for m, x in zip((mu, nu), moved, strict=True)
            )
            return g.with_rows(u), mu, nu

        directions, mu, nu = map_to_several(
            lazy_step, 3, updates, state.mu, state.nu, is_leaf=rows.is_sparse
        )
        return directions, ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def check_moments(
    b1: jax.typing.ArrayLike, b2: jax.typing.ArrayLike, eps: jax.typing.ArrayLike
) -> None:
    """Raises unless these are two decay rates in [0, 1) and a finite number >= 0."""
    ranges.check_decay("b1", b1)
    ranges.check_decay("b2", b2)
    ranges.check("eps", eps, 0.0, open_high=True)


def zero_moment(params: Tree) -> Tree:
    """Zeros like ``params``, in float32 or wider.

    Raises:
      TypeError: a parameter is not a real floating-point array.
    """
    check_floating(params)
    return jax.tree.map(lambda x: jnp.zeros_like(x, dtype=wide_dtype(x)), params)


def moment(
    x: jax.Array,
    average: jax.Array,
    decay: jax.typing.ArrayLike,
    gain: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Decay average + gain x, in the dtype of ``average``; gain is 1 - decay unless told."""
    gain = 1 - decay if gain is None else gain
    return jnp.asarray(decay * average + gain * x.astype(average.dtype), average.dtype)


def bias(decay: jax.typing.ArrayLike, count: jax.Array) -> jax.Array:
    """1 - decay^count to full precision: the weight that ``count`` values have in an average."""
    return -jnp.expm1(count * log(decay))


def log(decay: jax.typing.ArrayLike) -> Any:
    """The logarithm of a decay rate, of a number in float64 whatever JAX computes in."""
    if isinstance(decay, (int, float)):
        return math.log(decay) if decay > 0 else -math.inf
    return jnp.log(decay)
