"""The direction of NAdam: Adam with Nesterov's momentum (Dozat, ICLR workshop 2016)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges
from optim_zoo.transforms.leafwise import Declaration, Leaf, Leafwise, leafwise, zero_count, zeros
from optim_zoo.transforms.moments import (
    bias,
    check_moments,
    log,
    moment,
    root_of_moment,
    scale_by_moments,
)
from optim_zoo.tree import Tree, root


class ScaleByNadamState(NamedTuple):
    """State of `scale_by_nadam`."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made; stays at 2^31 - 1
    mu: Tree  # like the parameters, in float32 or wider: moving average of g
    nu: Tree  # like the parameters, in float32 or wider: moving average of g^2


def scale_by_nadam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    eps_root: jax.typing.ArrayLike = 0.0,
) -> Leafwise:
    """Turns gradients into NAdam's direction, without a schedule of the momentum.

    ::

        mu <- b1 mu + (1 - b1) g
        nu <- b2 nu + (1 - b2) g^2
        m   = b1 mu / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t)
        u   = m / (sqrt(nu / (1 - b2^t) + eps_root) + eps)

    ``optax.nadam`` computes the same. In PyTorch and Keras the momentum follows a schedule: see
    `scale_by_scheduled_nadam`. The source is Dozat, ICLR workshop 2016.

    Args:
      b1: The decay rate of mu, in [0, 1).
      b2: The decay rate of nu, in [0, 1).
      eps: A finite number >= 0, added to the root.
      eps_root: A finite number >= 0, added under the root. At the default 0, the derivative of a
        root of 0 is taken as 0, so that gradients through the update stay finite.

    Returns:
      A piece that returns the direction u; its state is `ScaleByNadamState`.

    Raises:
      ArgumentValueError: An argument is out of its range; in ``update``, a gradient has another
        shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optax.chain(optim_zoo.scale_by_nadam(), optim_zoo.scale_by_learning_rate(2e-3))
      ```
    """

    def direction(g: jax.Array, mu: jax.Array, nu: jax.Array, t: jax.Array) -> jax.Array:
        next_t = optax.safe_increment(t)  # t + 1; stays at 2^31 - 1
        mu_hat = b1 * mu / bias(b1, next_t) + (1 - b1) * g / bias(b1, t)
        return jnp.asarray(mu_hat / (root_of_moment(nu / bias(b2, t), eps_root) + eps), mu.dtype)

    return scale_by_moments(
        "scale_by_nadam", direction, b1, b2, eps, eps_root=eps_root, state=ScaleByNadamState
    )


class ScaleByScheduledNadamState(NamedTuple):
    """State of `scale_by_scheduled_nadam`."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made; stays at 2^31 - 1
    product: jax.Array  # (), float32 (float64 under x64): p_1 p_2 ... p_t
    mu: Tree  # like the parameters, in float32 or wider: moving average of g
    nu: Tree  # like the parameters, in float32 or wider: moving average of g^2


def scale_by_scheduled_nadam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    momentum_decay: jax.typing.ArrayLike = 0.004,
) -> Leafwise:
    """Turns gradients into NAdam's direction, with Dozat's schedule of the momentum.

    ::

        p_t = b1 (1 - 0.96^(t momentum_decay) / 2),   P_t = p_1 p_2 ... p_t
        mu <- b1 mu + (1 - b1) g
        nu <- b2 nu + (1 - b2) g^2
        u   = (p_(t+1) mu / (1 - P_(t+1)) + (1 - p_t) g / (1 - P_t))
              / (sqrt(nu / (1 - b2^t)) + eps)

    This is the direction of ``torch.optim.NAdam``; Keras has a ``momentum_decay`` of 1. The source
    is Dozat, ICLR workshop 2016.

    Args:
      b1: The decay rate of mu, in [0, 1).
      b2: The decay rate of nu, in [0, 1).
      eps: A finite number >= 0, added to the root.
      momentum_decay: How fast the momentum approaches b1, a finite number >= 0; psi of the paper.

    Returns:
      A piece that returns the direction u; its state is `ScaleByScheduledNadamState`.

    Raises:
      ArgumentValueError: An argument is out of its range; in ``update``, a gradient has another
        shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optax.chain(optim_zoo.scale_by_scheduled_nadam(), optim_zoo.scale_by_learning_rate(2e-3))
      ```
    """
    check_moments(b1, b2, eps)
    ranges.check("momentum_decay", momentum_decay, 0.0, open_high=True)

    def momentum(t: jax.Array) -> jax.Array:
        return jnp.asarray(b1 * (1 - 0.5 * jnp.exp(t * momentum_decay * log(0.96))))

    def begin(state: ScaleByScheduledNadamState) -> tuple[ScaleByScheduledNadamState, Any]:
        t = optax.safe_increment(state.count)
        now, following = momentum(t), momentum(optax.safe_increment(t))
        product = (state.product * now).astype(state.product.dtype)
        return state._replace(count=t, product=product), (now, following, bias(b2, t))

    def update(
        g: jax.Array, state: ScaleByScheduledNadamState, leaf: Leaf
    ) -> tuple[jax.Array, ScaleByScheduledNadamState]:
        now, following, c2 = leaf.shared
        product = state.product
        g = g.astype(state.mu.dtype)
        mu, nu = moment(g, state.mu, b1), moment(jnp.square(g), state.nu, b2)
        mu_hat = following * mu / (1 - product * following) + (1 - now) * g / (1 - product)
        u = jnp.asarray(mu_hat / (root(nu / c2) + eps), mu.dtype)
        return u, state._replace(mu=mu, nu=nu)

    return leafwise(
        Declaration(
            name="scale_by_scheduled_nadam",
            update=update,
            state=ScaleByScheduledNadamState,
            like_params=("mu", "nu"),
            init=lambda path, x: {"mu": zeros(x), "nu": zeros(x)},
            init_shared=lambda: {**zero_count(), "product": jnp.ones((), float)},
            begin=begin,
        )
    )
