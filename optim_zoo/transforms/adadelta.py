"""AdaDelta's direction (Zeiler, arXiv 1212.5701)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges, rows
from optim_zoo.transforms.moments import moment, zero_moment
from optim_zoo.tree import Tree, map_to_several


class ScaleByAdadeltaState(NamedTuple):
    """State of `scale_by_adadelta`; averages are like the parameters, in float32 or wider."""

    e_g: Tree  # moving average of g^2
    e_x: Tree  # moving average of u^2


def scale_by_adadelta(
    rho: jax.typing.ArrayLike = 0.9, eps: jax.typing.ArrayLike = 1e-6
) -> optax.GradientTransformation:
    """Gives gradients g the units of the parameters.

    ::

        e_g <- rho e_g + (1 - rho) g^2
        u    = sqrt(e_x + eps) / sqrt(e_g + eps) g
        e_x <- rho e_x + (1 - rho) u^2

    ``optax.scale_by_adadelta`` computes the same; here the averages are float32 or wider.

    Args:
      rho: decay rate in [0, 1).
      eps: > 0, for the first step is in proportion to its root.

    Raises:
      ValueError: a number is out of its range.
      TypeError: a parameter is not floating-point.
    """
    ranges.check_decay("rho", rho)
    ranges.check("eps", eps, 0.0, open_low=True, open_high=True)

    def init(params: Tree) -> ScaleByAdadeltaState:
        return ScaleByAdadeltaState(zero_moment(params), zero_moment(params))

    def update(
        updates: Tree, state: ScaleByAdadeltaState, params: Tree | None = None
    ) -> tuple[Tree, ScaleByAdadeltaState]:
        del params
        rows.check_updates("scale_by_adadelta", updates, state.e_g)

        def step(
            g: jax.Array, e_g: jax.Array, e_x: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            g = g.astype(e_g.dtype)
            e_g = moment(jnp.square(g), e_g, rho)
            u = jnp.asarray(jnp.sqrt(e_x + eps) / jnp.sqrt(e_g + eps) * g, e_g.dtype)
            return u, e_g, moment(jnp.square(u), e_x, rho)

        directions, e_g, e_x = map_to_several(step, 3, updates, state.e_g, state.e_x)
        return directions, ScaleByAdadeltaState(e_g, e_x)

    return optax.GradientTransformation(init, update)
