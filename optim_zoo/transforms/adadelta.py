"""The direction of AdaDelta (Zeiler, arXiv 1212.5701)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optim_zoo import ranges
from optim_zoo.transforms.leafwise import Declaration, Leaf, Leafwise, leafwise, zeros
from optim_zoo.transforms.moments import moment
from optim_zoo.tree import Tree


class ScaleByAdadeltaState(NamedTuple):
    """State of `scale_by_adadelta`; both averages are like the parameters, in float32 or wider."""

    e_g: Tree  # moving average of g^2
    e_x: Tree  # moving average of u^2


def scale_by_adadelta(
    rho: jax.typing.ArrayLike = 0.9, eps: jax.typing.ArrayLike = 1e-6
) -> Leafwise:
    """Gives gradients the units of the parameters.

    ::

        e_g <- rho e_g + (1 - rho) g^2
        u    = sqrt(e_x + eps) / sqrt(e_g + eps) g
        e_x <- rho e_x + (1 - rho) u^2

    The source is arXiv 1212.5701. ``optax.scale_by_adadelta`` computes the same; here the averages
    are in float32 or wider whatever the parameters are.

    Args:
      rho: The decay rate of both averages, in [0, 1).
      eps: A finite number > 0. The first steps are proportional to its root.

    Returns:
      A piece that returns the direction u; its state is `ScaleByAdadeltaState`.

    Raises:
      ArgumentValueError: An argument is out of its range; in ``update``, a gradient has another
        shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optax.chain(optim_zoo.scale_by_adadelta(0.95), optim_zoo.scale_by_learning_rate(1.0))
      ```
    """
    ranges.check_decay("rho", rho)
    ranges.check("eps", eps, 0.0, open_low=True, open_high=True)

    def update(
        g: jax.Array, state: ScaleByAdadeltaState, leaf: Leaf
    ) -> tuple[jax.Array, ScaleByAdadeltaState]:
        del leaf
        g = g.astype(state.e_g.dtype)
        e_g = moment(jnp.square(g), state.e_g, rho)
        u = jnp.asarray(jnp.sqrt(state.e_x + eps) / jnp.sqrt(e_g + eps) * g, e_g.dtype)
        return u, state._replace(e_g=e_g, e_x=moment(jnp.square(u), state.e_x, rho))

    return leafwise(
        Declaration(
            name="scale_by_adadelta",
            update=update,
            state=ScaleByAdadeltaState,
            like_params=("e_g", "e_x"),
            init=lambda path, x: {"e_g": zeros(x), "e_x": zeros(x)},
        )
    )
