"""The direction of Adam, with and without bias correction (Kingma and Ba, arXiv 1412.6980)."""

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

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made; stays at 2^31 - 1
    mu: Tree  # like the parameters, in float32 or wider: moving average of g
    nu: Tree  # like the parameters, in float32 or wider: moving average of g^2


class ScaleByLazyAdamState(NamedTuple):
    """State of `scale_by_lazy_adam`."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made; stays at 2^31 - 1
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
    """Turns gradients into Adam's direction.

    ::

        mu <- b1 mu + (1 - b1) g
        nu <- b2 nu + (1 - b2) g^2
        u   = (mu / c1) / (sqrt(nu / c2 + eps_root) + eps)
        c1  = 1 - b1^t,  c2 = 1 - b2^t,  t = 1, 2, ...

    With ``bias_correction=False``, c1 = c2 = 1: this is BERT's Adam, and LAMB in version 3 of its
    paper. The source is arXiv 1412.6980.

    ``optax.scale_by_adam`` computes the same direction. Ours differs where low precision does harm.
    The moments are in float32 or wider whatever the dtypes of parameters and gradients are, so that
    a state keeps its dtypes and a second moment cannot stall. c1 and c2 are computed by expm1,
    because 1 - 0.999^t in float32 is off by 3e-5 at t = 1.

    Args:
      b1: The decay rate of mu, in [0, 1).
      b2: The decay rate of nu, in [0, 1).
      eps: A finite number >= 0, added to the root.
      bias_correction: Whether mu and nu are divided by c1 and c2. If False, c1 = c2 = 1.
      eps_root: A finite number >= 0, added under the root. At the default 0, the derivative of a
        root of 0 is taken as 0, so that gradients through the update stay finite.
      nesterov: Whether the momentum is Nesterov's: the piece is then `scale_by_nadam`. Needs
        ``bias_correction=True``.

    Returns:
      A piece that returns the direction u. Its state is `ScaleByAdamState`, or
      `ScaleByUncorrectedAdamState` without bias correction.

    Raises:
      ArgumentValueError: An argument is out of its range; in ``update``, a gradient has another
        shape than its parameter.
      ArgumentTypeError: An argument has the wrong type, or a decay rate has fewer bits than
        float32; in ``init``, a parameter is not a real floating-point array.

    Example:
      ```python
      tx = optax.chain(optim_zoo.scale_by_adam(b2=0.98), optim_zoo.scale_by_learning_rate(1e-3))
      ```
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
    """Turns gradients into Adam's direction, on only those rows that have a gradient.

    ::

        for each row i of a gradient that is SparseRows, where rows with the same id are summed:
            mu_i <- b1 mu_i + (1 - b1) g_i
            nu_i <- b2 nu_i + (1 - b2) g_i^2
            u_i   = (mu_i / c1) / (sqrt(nu_i / c2) + eps),   c1 = 1 - b1^t, c2 = 1 - b2^t

    The moments of the other rows stay unchanged, where those of Adam decay. t counts all steps, so
    that the bias correction does not depend on how often a row has a gradient. A row with a zero
    gradient counts as one that has a gradient. A dense gradient is treated as by `scale_by_adam`.

    Args:
      b1: The decay rate of mu, in [0, 1).
      b2: The decay rate of nu, in [0, 1).
      eps: A finite number >= 0, added to the root.

    Returns:
      A piece that returns the direction u, as `SparseRows` where the gradient is; its state is
      `ScaleByLazyAdamState`.

    Raises:
      ArgumentValueError: An argument is out of its range; in ``update``, a gradient has another
        shape than its parameter, or rows do not fit their table.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optax.chain(optim_zoo.scale_by_lazy_adam(), optim_zoo.scale_by_learning_rate(1e-3))
      ```
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
    """Returns the formula of `scale_by_adam`, for one array."""

    def direction(g: jax.Array, mu: jax.Array, nu: jax.Array, t: jax.Array) -> jax.Array:
        c1 = bias(b1, t) if bias_correction else 1.0
        c2 = bias(b2, t) if bias_correction else 1.0
        return (mu / c1) / (root_of_moment(nu / c2, eps_root) + eps)

    return direction
