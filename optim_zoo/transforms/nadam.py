"""NAdam's direction: Adam with Nesterov's momentum (Dozat, ICLR workshop 2016)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges, rows
from optim_zoo.transforms.moments import (
    bias,
    check_moments,
    log,
    moment,
    scale_by_moments,
    zero_moment,
)
from optim_zoo.tree import Tree, map_to_several


def scale_by_nadam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
) -> optax.GradientTransformation:
    """Turns gradients g into NAdam's direction, without a schedule of the momentum.

    ::

        mu <- b1 mu + (1 - b1) g
        nu <- b2 nu + (1 - b2) g^2
        u   = (b1 mu / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t)) / (sqrt(nu / (1 - b2^t)) + eps)

    as ``optax.nadam``. The momentum of torch's and Keras's NAdam follows a schedule of its own:
    `scale_by_scheduled_nadam`.

    Raises:
      ValueError, TypeError: see `scale_by_adam`.
    """

    def direction(g: jax.Array, mu: jax.Array, nu: jax.Array, t: jax.Array) -> jax.Array:
        next_t = optax.safe_increment(t)  # t + 1, or t where the count is full
        mu_hat = b1 * mu / bias(b1, next_t) + (1 - b1) * g / bias(b1, t)
        return jnp.asarray(mu_hat / (jnp.sqrt(nu / bias(b2, t)) + eps), mu.dtype)

    return scale_by_moments("scale_by_nadam", direction, b1, b2, eps)


class ScaleByScheduledNadamState(NamedTuple):
    """State of `scale_by_scheduled_nadam`."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made, saturating
    product: jax.Array  # (), float32 (float64 under x64): p_1 p_2 ... p_t
    mu: Tree  # like the parameters, in float32 or wider: moving average of g
    nu: Tree  # like the parameters, in float32 or wider: moving average of g^2


def scale_by_scheduled_nadam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    momentum_decay: jax.typing.ArrayLike = 0.004,
) -> optax.GradientTransformation:
    """Turns gradients g into NAdam's direction with Dozat's schedule of the momentum.

    ::

        p_t = b1 (1 - 0.96^(t momentum_decay) / 2),   P_t = p_1 p_2 ... p_t
        mu <- b1 mu + (1 - b1) g
        nu <- b2 nu + (1 - b2) g^2
        u   = (p_(t+1) mu / (1 - P_(t+1)) + (1 - p_t) g / (1 - P_t))
              / (sqrt(nu / (1 - b2^t)) + eps)

    as ``torch.optim.NAdam``; Keras has momentum_decay 1.

    Args:
      momentum_decay: psi of the paper, >= 0.

    Raises:
      ValueError, TypeError: see `scale_by_adam`.
    """
    check_moments(b1, b2, eps)
    ranges.check("momentum_decay", momentum_decay, 0.0, open_high=True)

    def momentum(t: jax.Array) -> jax.Array:
        return jnp.asarray(b1 * (1 - 0.5 * jnp.exp(t * momentum_decay * log(0.96))))

    def init(params: Tree) -> ScaleByScheduledNadamState:
        one = jnp.ones((), float)
        zeros = (zero_moment(params) for _ in range(2))
        return ScaleByScheduledNadamState(jnp.zeros((), jnp.int32), one, *zeros)

    def update(
        updates: Tree, state: ScaleByScheduledNadamState, params: Tree | None = None
    ) -> tuple[Tree, ScaleByScheduledNadamState]:
        del params
        rows.check_updates("scale_by_scheduled_nadam", updates, state.mu)
        t = optax.safe_increment(state.count)
        now, next_ = momentum(t), momentum(optax.safe_increment(t))
        product = (state.product * now).astype(state.product.dtype)
        c2 = bias(b2, t)

        def step(g: jax.Array, mu: jax.Array, nu: jax.Array) -> tuple[jax.Array, ...]:
            g = g.astype(mu.dtype)
            mu, nu = moment(g, mu, b1), moment(jnp.square(g), nu, b2)
            mu_hat = next_ * mu / (1 - product * next_) + (1 - now) * g / (1 - product)
            return jnp.asarray(mu_hat / (jnp.sqrt(nu / c2) + eps), mu.dtype), mu, nu

        directions, mu, nu = map_to_several(step, 3, updates, state.mu, state.nu)
        return directions, ScaleByScheduledNadamState(t, product, mu, nu)

    return optax.GradientTransformation(init, update)
