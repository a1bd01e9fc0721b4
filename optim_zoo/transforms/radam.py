"""Rectified Adam's direction (Liu et al., arXiv 1908.03265)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optim_zoo import ranges
from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms.leafwise import Leafwise
from optim_zoo.transforms.moments import bias, log, root_of_moment, scale_by_moments
from optim_zoo.tree import Tree


class ScaleByRadamState(NamedTuple):
    """State of `scale_by_radam`."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made, saturating
    mu: Tree  # like the parameters, in float32 or wider: moving average of g
    nu: Tree  # like the parameters, in float32 or wider: moving average of g^2


@accepts_optax_arguments
def scale_by_radam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    threshold: jax.typing.ArrayLike = 5.0,
    *,
    eps_root: jax.typing.ArrayLike = 0.0,
) -> Leafwise:
    """Turns gradients g into RAdam's direction.

    ::

        mu <- b1 mu + (1 - b1) g
        nu <- b2 nu + (1 - b2) g^2
        u   = r_t (mu / c1) / (sqrt(nu / c2) + eps)   where rho_t >= threshold
        u   =      mu / c1                            before,   c1 = 1 - b1^t, c2 = 1 - b2^t

    with r_t and rho_t of `rectification`. As ``optax.radam``.

    Args:
      b1, b2, eps: see `scale_by_adam`.
      threshold: at least 4, below which r_t is not real; the paper has 4, the code in use 5.

    Raises:
      ValueError, TypeError: see `scale_by_adam`; ``threshold`` is under 4.
    """
    ranges.check("threshold", threshold, 4.0)

    def direction(g: jax.Array, mu: jax.Array, nu: jax.Array, t: jax.Array) -> jax.Array:
        rho, r = rectification(b2, t)
        mu_hat = mu / bias(b1, t)
        rectified = r * mu_hat / (root_of_moment(nu / bias(b2, t), eps_root) + eps)
        return jnp.where(rho >= threshold, rectified, mu_hat).astype(mu.dtype)

    return scale_by_moments(
        "scale_by_radam", direction, b1, b2, eps, eps_root=eps_root, state=ScaleByRadamState
    )


def rectification(
    b2: jax.typing.ArrayLike, t: jax.Array, *, behind: int = 0
) -> tuple[jax.Array, jax.Array]:
    """The length rho_t of the average that nu approximates, and RAdam's factor r_t.

    ::

        rho_t = rho_inf - 2 t b2^t / (1 - b2^t),   rho_inf = 2 / (1 - b2) - 1
        r_t   = sqrt((rho_t - 4) (rho_t - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho_t))

    In the first steps rho_t is a difference of two large numbers: at b2 = 0.999 float32 gives
    rho_6 = 6.0005 for 5.9942, enough to cross a threshold. With a = -log(b2) the same is

        rho_t = t - 2 / a (E(a t) - E(a)),   E(x) = x/2 coth(x/2) - 1 = x^2/12 - x^4/720 + ...

    where nothing cancels while a t is small; that form is used below a t = 1/2.

    Args:
      b2: decay rate of nu.
      t: (), the number of the step, from 1.
      behind: 1 for the mistake of counting the factor t, but not the power, from 0.

    Returns:
      (rho_t, r_t), of shape (); r_t is 0 where rho_t <= 4, and where rho_inf is.
    """
    a: Any = -log(b2)
    x = a * t
    # In place of 1 - b2, which is off by 5e-5 for b2 = 0.999 in float32.
    rho_inf = -2 / jnp.expm1(-a) - 1
    early = t - 2 / a * (_e(jnp.minimum(x, 0.5)) - _e(a))
    # 2.0, not 2: twice a whole t overflows from 2^30 on.
    rho = jnp.where(x < 0.5, early, rho_inf - 2.0 * t / jnp.expm1(x)) + 2 * behind / jnp.expm1(x)
    defined = (rho > 4) & (rho_inf > 4)
    safe, safe_inf = jnp.where(defined, rho, 5.0), jnp.where(defined, rho_inf, 5.0)
    squared = (safe - 4) * (safe - 2) * safe_inf / ((safe_inf - 4) * (safe_inf - 2) * safe)
    return rho, jnp.where(defined, jnp.sqrt(squared), 0.0)


def _e(x: Any) -> Any:
    """x/2 coth(x/2) - 1 by its Taylor series (Bernoulli numbers), to 1e-15 for x <= 1/2."""
    y = x * x
    series = y * (1 / 47900160 - y * (691 / 1307674368000))
    series = y * (1 / 30240 - y * (1 / 1209600) + y * series)
    return y * (1 / 12 - y * (1 / 720) + y * series)
