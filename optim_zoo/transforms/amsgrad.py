"""The direction of AMSGrad (Reddi, Kale and Kumar, arXiv 1904.09237, Algorithm 2)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms.adam import adam_direction
from optim_zoo.transforms.leafwise import (
    Declaration,
    Leaf,
    Leafwise,
    count_step,
    leafwise,
    zero_count,
    zeros,
)
from optim_zoo.transforms.moments import Direction, check_moments, moment
from optim_zoo.tree import Tree


class ScaleByAmsgradState(NamedTuple):
    """State of `scale_by_amsgrad`; the trees are like the parameters, in float32 or wider."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made; stays at 2^31 - 1
    mu: Tree  # moving average of g
    nu: Tree  # moving average of g^2
    nu_max: Tree  # the largest nu of all steps


class ScaleByUncorrectedAmsgradState(NamedTuple):
    """State of `scale_by_amsgrad` with ``bias_correction=False``; see `ScaleByAmsgradState`."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made; stays at 2^31 - 1
    mu: Tree  # moving average of g
    nu: Tree  # moving average of g^2
    nu_max: Tree  # the largest nu of all steps


@accepts_optax_arguments
def scale_by_amsgrad(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    bias_correction: bool = True,
    eps_root: jax.typing.ArrayLike = 0.0,
) -> Leafwise:
    """Turns gradients into Adam's direction with a second moment that never decreases.

    ::

        mu     <- b1 mu + (1 - b1) g
        nu     <- b2 nu + (1 - b2) g^2
        nu_max <- max(nu_max, nu)
        u       = (mu / c1) / (sqrt(nu_max / c2 + eps_root) + eps),   c1 = 1 - b1^t, c2 = 1 - b2^t

    The maximum is taken of the uncorrected second moment, as in ``torch.optim.Adam``.
    ``optax.amsgrad`` takes the maximum of the corrected one. The paper (arXiv 1904.09237) has no
    bias correction: that is ``bias_correction=False``.

    Args:
      b1: The decay rate of mu, in [0, 1).
      b2: The decay rate of nu, in [0, 1).
      eps: A finite number >= 0, added to the root.
      bias_correction: Whether mu and nu are divided by c1 and c2. If False, c1 = c2 = 1.
      eps_root: A finite number >= 0, added under the root. At the default 0, the derivative of a
        root of 0 is taken as 0, so that gradients through the update stay finite.

    Returns:
      A piece that returns the direction u. Its state is `ScaleByAmsgradState`, or
      `ScaleByUncorrectedAmsgradState` without bias correction.

    Raises:
      ArgumentValueError: An argument is out of its range; in ``update``, a gradient has another
        shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optax.chain(optim_zoo.scale_by_amsgrad(), optim_zoo.scale_by_learning_rate(1e-3))
      ```
    """
    direction = adam_direction(b1, b2, eps, bias_correction=bias_correction, eps_root=eps_root)
    state = ScaleByAmsgradState if bias_correction else ScaleByUncorrectedAmsgradState
    return scale_by_largest_moments(
        "scale_by_amsgrad", direction, b1, b2, eps, eps_root=eps_root, state=state
    )


def scale_by_largest_moments(
    piece: str,
    direction: Direction,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    *,
    eps_root: jax.typing.ArrayLike = 0.0,
    state: Callable[..., Any] = ScaleByAmsgradState,
) -> Leafwise:
    """Does what `scale_by_moments` does, with the largest nu of all steps in place of nu."""
    check_moments(b1, b2, eps, eps_root)

    def update(
        g: jax.Array, state: ScaleByAmsgradState, leaf: Leaf
    ) -> tuple[jax.Array, ScaleByAmsgradState]:
        del leaf
        g = g.astype(state.mu.dtype)
        mu, nu = moment(g, state.mu, b1), moment(jnp.square(g), state.nu, b2)
        nu_max = jnp.maximum(state.nu_max, nu)
        u = direction(g, mu, nu_max, state.count)
        return u, state._replace(mu=mu, nu=nu, nu_max=nu_max)

    return leafwise(
        Declaration(
            name=piece,
            update=update,
            state=state,
            like_params=("mu", "nu", "nu_max"),
            init=lambda path, x: {"mu": zeros(x), "nu": zeros(x), "nu_max": zeros(x)},
            init_shared=zero_count,
            begin=count_step,
        )
    )
