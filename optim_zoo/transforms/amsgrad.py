"""AMSGrad's direction (Reddi, Kale and Kumar, arXiv 1904.09237, Algorithm 2)."""

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
    """State of `scale_by_amsgrad`; averages are like the parameters, in float32 or wider."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made, saturating
    mu: Tree  # moving average of g
    nu: Tree  # moving average of g^2
    nu_max: Tree  # the largest nu so far


class ScaleByUncorrectedAmsgradState(NamedTuple):
    """State of `scale_by_amsgrad` with ``bias_correction=False``; see `ScaleByAmsgradState`."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made, saturating
    mu: Tree  # moving average of g
    nu: Tree  # moving average of g^2
    nu_max: Tree  # the largest nu so far


@accepts_optax_arguments
def scale_by_amsgrad(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    bias_correction: bool = True,
    eps_root: jax.typing.ArrayLike = 0.0,
) -> Leafwise:
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
    """`scale_by_moments` where the direction is given nu_max, the largest nu so far."""
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
