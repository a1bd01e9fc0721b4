"""AMSGrad's direction (Reddi, Kale and Kumar, arXiv 1904.09237, Algorithm 2)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import rows
from optim_zoo.transforms.adam import adam_direction
from optim_zoo.transforms.moments import Direction, check_moments, moment, zero_moment
from optim_zoo.tree import Tree, map_to_several


class ScaleByAmsgradState(NamedTuple):
    """State of `scale_by_amsgrad`; averages are like the parameters, in float32 or wider."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made, saturating
    mu: Tree  # moving average of g
    nu: Tree  # moving average of g^2
    nu_max: Tree  # the largest nu so far


def scale_by_amsgrad(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    bias_correction: bool = True,
) -> optax.GradientTransformation:
    """Turns gradients g into AMSGrad's direction: Adam's with a second moment that never falls.

    ::

        mu     <- b1 mu + (1 - b1) g
        nu     <- b2 nu + (1 - b2) g^2
        nu_max <- max(nu_max, nu)
        u       = (mu / c1) / (sqrt(nu_max / c2) + eps),   c1 = 1 - b1^t, c2 = 1 - b2^t

    The maximum is of the second moment before it is corrected, as in ``torch.optim.Adam``;
    ``optax.amsgrad`` takes it afterwards. The paper has no correction: ``bias_correction=False``.

    Raises:
      ValueError, TypeError: see `scale_by_adam`.
    """
    direction = adam_direction(b1, b2, eps, bias_correction=bias_correction)
    return scale_by_largest_moments("scale_by_amsgrad", direction, b1, b2, eps)


def scale_by_largest_moments(
    piece: str,
    direction: Direction,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
) -> optax.GradientTransformation:
    """`scale_by_moments` where the direction is given nu_max, the largest nu so far."""
    check_moments(b1, b2, eps)

    def init(params: Tree) -> ScaleByAmsgradState:
        zeros = (zero_moment(params) for _ in range(3))
        return ScaleByAmsgradState(jnp.zeros((), jnp.int32), *zeros)

    def update(
        updates: Tree, state: ScaleByAmsgradState, params: Tree | None = None
    ) -> tuple[Tree, ScaleByAmsgradState]:
        del params
        rows.check_updates(piece, updates, state.mu)
        count = optax.safe_increment(state.count)

        def step(
            g: jax.Array, mu: jax.Array, nu: jax.Array, nu_max: jax.Array
        ) -> tuple[jax.Array, ...]:
            g = g.astype(mu.dtype)
            mu, nu = moment(g, mu, b1), moment(jnp.square(g), nu, b2)
            nu_max = jnp.maximum(nu_max, nu)
            return direction(g, mu, nu_max, count), mu, nu, nu_max

        directions, *moments = map_to_several(step, 4, updates, state.mu, state.nu, state.nu_max)
        return directions, ScaleByAmsgradState(count, *moments)

    return optax.GradientTransformation(init, update)
