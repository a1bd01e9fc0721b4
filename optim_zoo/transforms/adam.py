"""Adam's direction, with and without bias correction (Kingma and Ba, arXiv 1412.6980)."""

from typing import Any, NamedTuple

import jax

from optim_zoo.errors import ArgumentValueError
from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms.leafwise import Leafwise
from optim_zoo.transforms.moments import (
    Direction,
    ScaleByAdamState,
    bias,
    root_of_moment,
    scale_by_moments,
)
from optim_zoo.transforms.nadam import scale_by_nadam
from optim_zoo.tree import Tree


class ScaleByUncorrectedAdamState(NamedTuple):
    """State of `scale_by_adam` with ``bias_correction=False``."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made, saturating
    mu: Tree  # like the parameters, in float32 or wider: moving average of g
    nu: Tree  # like the parameters, in float32 or wider: moving average of g^2


class ScaleByLazyAdamState(NamedTuple):
    """State of `scale_by_lazy_adam`."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made, saturating
    mu: Tree  # like the parameters, in float32 or wider: moving average of g
    nu: Tree  # like the parameters, in float32 or wider: moving average of g^2


@accepts_optax_arguments
def scale_by_adam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    bias_correction: bool = True,
    eps_root: jax.typing.ArrayLike = 0.0,
    nesterov: bool = False,
) -> Leafwise:
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
      ValueError: a rate or eps is out of its range; in ``update``, a gradient has another shape
        than its parameter.
      TypeError: a rate has fewer bits than float32, or a parameter is not floating-point.
    """
    if nesterov and not bias_correction:
        raise ArgumentValueError(
            "nesterov", "be False without bias_correction", nesterov, related=["bias_correction"]
        )
    if nesterov:
        return scale_by_nadam(b1, b2, eps, eps_root=eps_root)
    direction = adam_direction(b1, b2, eps, bias_correction=bias_correction, eps_root=eps_root)
    state = adam_state(bias_correction=bias_correction)
    return scale_by_moments("scale_by_adam", direction, b1, b2, eps, eps_root=eps_root, state=state)


def scale_by_lazy_adam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
) -> Leafwise:
    """`scale_by_adam` that takes `SparseRows` gradients and touches those rows alone.

    The moments of a row that is not there stay as they are, where Adam's would decay; the bias
    correction counts all steps. A row that is there with a zero gradient counts as touched.

    Raises:
      ValueError, TypeError: see `scale_by_adam`.
    """
    direction = adam_direction(b1, b2, eps)
    return scale_by_moments(
        "scale_by_lazy_adam", direction, b1, b2, eps, state=ScaleByLazyAdamState, lazy=True
    )


def adam_state(*, bias_correction: bool) -> type[Any]:
    """Returns the type of the state of `scale_by_adam`."""
    return ScaleByAdamState if bias_correction else ScaleByUncorrectedAdamState


def adam_direction(
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    *,
    bias_correction: bool = True,
    eps_root: jax.typing.ArrayLike = 0.0,
) -> Direction:
    """The formula of `scale_by_adam`, for one array."""

    def direction(g: jax.Array, mu: jax.Array, nu: jax.Array, t: jax.Array) -> jax.Array:
        c1 = bias(b1, t) if bias_correction else 1.0
        c2 = bias(b2, t) if bias_correction else 1.0
        return (mu / c1) / (root_of_moment(nu / c2, eps_root) + eps)

    return direction
