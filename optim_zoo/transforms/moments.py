"""Moving averages of the gradient and of its square, from which Adam and its kin are made."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optim_zoo import ranges, rows
from optim_zoo.transforms.leafwise import (
    Declaration,
    Leaf,
    Leafwise,
    count_step,
    leafwise,
    zero_count,
    zeros,
)
from optim_zoo.tree import Tree, root

# (g, mu, nu, t) -> u: the gradient in the dtype of the moments, the moments after the gradient has
# entered them, and the number of the step, () int32, where the first step is 1.
Direction = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


class ScaleByAdamState(NamedTuple):
    """State of `scale_by_adam` with bias correction.

    The siblings of `scale_by_adam` have states with the same fields and another name, from which
    `saved_state` recognizes the state of another optimizer.
    """

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made; stays at 2^31 - 1
    mu: Tree  # like the parameters, in float32 or wider: moving average of g
    nu: Tree  # like the parameters, in float32 or wider: moving average of g^2


def scale_by_moments(
    piece: str,
    direction: Direction,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    *,
    eps_root: jax.typing.ArrayLike = 0.0,
    state: Callable[..., Any] = ScaleByAdamState,
    grad_averaging: bool = True,
    lazy: bool = False,
) -> Leafwise:
    """Turns gradients into a direction that is computed from their two moments.

    ::

        mu <- b1 mu + (1 - b1) g
        nu <- b2 nu + (1 - b2) g^2
        u   = direction(g, mu, nu, t),   t = 1, 2, ...

    Args:
      piece: The name of the piece, for messages.
      direction: The formula for one array; see `Direction`.
      b1: The decay rate of mu, in [0, 1).
      b2: The decay rate of nu, in [0, 1).
      eps: A finite number >= 0 of the formula; it is only checked here.
      eps_root: A finite number >= 0 of the formula; it is only checked here.
      state: The NamedTuple of the state, with the fields of `ScaleByAdamState`.
      grad_averaging: Whether the gradient enters mu with the factor 1 - b1; otherwise with the
        factor 1.
      lazy: Whether gradients may be `SparseRows`; then only their rows of the moments change.

    Returns:
      A piece that returns the direction u.

    Raises:
      ArgumentValueError: An argument is out of its range; in ``update``, a gradient has another
        shape than its parameter.
      ArgumentTypeError: An argument has the wrong type, or a decay rate has fewer bits than
        float32; in ``init``, a parameter is not a real floating-point array.
    """
    check_moments(b1, b2, eps, eps_root)
    gain = None if grad_averaging else 1.0

    def step(
        g: jax.Array, mu: jax.Array, nu: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        g = g.astype(mu.dtype)
        mu, nu = moment(g, mu, b1, gain), moment(jnp.square(g), nu, b2)
        return direction(g, mu, nu, count), mu, nu

    def update(g: Any, state: ScaleByAdamState, leaf: Leaf) -> tuple[Any, ScaleByAdamState]:
        del leaf
        if not rows.is_sparse(g):
            u, mu, nu = step(g, state.mu, state.nu, state.count)
            return u, state._replace(mu=mu, nu=nu)
        g = g.merged()

        def read(m: jax.Array) -> jax.Array:
            return m.at[g.ids].get(mode="clip")

        def write(m: jax.Array, moved: jax.Array) -> jax.Array:
            return m.at[g.ids].set(moved, mode="drop", indices_are_sorted=True)

        u, mu, nu = step(g.rows, read(state.mu), read(state.nu), state.count)
        mu, nu = write(state.mu, mu), write(state.nu, nu)
        return g.with_rows(u), state._replace(mu=mu, nu=nu)

    return leafwise(
        Declaration(
            name=piece,
            update=update,
            state=state,
            like_params=("mu", "nu"),
            init=lambda path, x: {"mu": zeros(x), "nu": zeros(x)},
            init_shared=zero_count,
            begin=count_step,
            takes_rows=lazy,
        )
    )


def check_moments(
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    eps_root: jax.typing.ArrayLike = 0.0,
) -> None:
    """Raises unless b1 and b2 are decay rates in [0, 1), and eps and eps_root finite and >= 0."""
    ranges.check_decay("b1", b1)
    ranges.check_decay("b2", b2)
    ranges.check("eps", eps, 0.0, open_high=True)
    ranges.check("eps_root", eps_root, 0.0, open_high=True)


def root_of_moment(nu: jax.Array, eps_root: jax.typing.ArrayLike) -> jax.Array:
    """Returns sqrt(nu + eps_root), whose derivative is 0 where that is 0."""
    if isinstance(eps_root, (int, float)) and eps_root == 0:
        return root(nu)
    return root(nu + eps_root)


def moment(
    x: jax.Array,
    average: jax.Array,
    decay: jax.typing.ArrayLike,
    gain: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Returns decay average + gain x in the dtype of ``average``; gain is 1 - decay by default."""
    gain = 1 - decay if gain is None else gain
    return jnp.asarray(decay * average + gain * x.astype(average.dtype), average.dtype)


def bias(decay: jax.typing.ArrayLike, count: jax.Array) -> jax.Array:
    """Returns 1 - decay^count to full precision: the weight of ``count`` values in an average."""
    return -jnp.expm1(count * log(decay))


def log(decay: jax.typing.ArrayLike) -> Any:
    """Returns the logarithm of a decay rate, of a Python number always in float64."""
    if isinstance(decay, (int, float)):
        return math.log(decay) if decay > 0 else -math.inf
    return jnp.log(decay)
