"""The direction of RAdam, rectified Adam (Liu et al., arXiv 1908.03265)."""

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

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made; stays at 2^31 - 1
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
    """Turns gradients into RAdam's direction.

    ::

        mu <- b1 mu + (1 - b1) g
        nu <- b2 nu + (1 - b2) g^2
        u   = r_t (mu / c1) / (sqrt(nu / c2 + eps_root) + eps)   where rho_t >= threshold
        u   = mu / c1                                            before that
        c1  = 1 - b1^t,  c2 = 1 - b2^t
        rho_t = rho_inf - 2 t b2^t / (1 - b2^t),   rho_inf = 2 / (1 - b2) - 1
        r_t   = sqrt((rho_t - 4) (rho_t - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho_t))

    ``optax.scale_by_radam`` computes the same. The source is arXiv 1908.03265.

    Args:
      b1: The decay rate of mu, in [0, 1).
      b2: The decay rate of nu, in [0, 1).
      eps: A finite number >= 0, added to the root.
      threshold: The length rho_t of the average from which steps are rectified, a number >= 4,
        because r_t is not real below. The paper has 4, the authors' code 5.
      eps_root: A finite number >= 0, added under the root. At the default 0, the derivative of a
        root of 0 is taken as 0, so that gradients through the update stay finite.

    Returns:
      A piece that returns the direction u; its state is `ScaleByRadamState`.

    Raises:
      ArgumentValueError: An argument is out of its range; in ``update``, a gradient has another
        shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optax.chain(optim_zoo.scale_by_radam(), optim_zoo.scale_by_learning_rate(1e-3))
      ```
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
    """Returns rho_t, the length of the average that nu approximates, and RAdam's factor r_t.

    ::

        rho_t = rho_inf - 2 t b2^t / (1 - b2^t),   rho_inf = 2 / (1 - b2) - 1
        r_t   = sqrt((rho_t - 4) (rho_t - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho_t))

    In the first steps rho_t is a small difference of two large numbers: at b2 = 0.999, float32
    gives rho_6 = 6.0005 instead of 5.9942, which is enough to cross a threshold. With a = -log(b2),
    the same number is

    ::

        rho_t = t - 2 / a (E(a t) - E(a)),   E(x) = x/2 coth(x/2) - 1 = x^2/12 - x^4/720 + ...

    where nothing cancels while a t is small. This form is used where a t is below 1/2.

    Args:
      b2: The decay rate of nu.
      t: The number of the step, (), where the first step is 1.
      behind: 1 for a known mistake of other code, which counts the factor t from 0 but the power
        from 1.

    Returns:
      (rho_t, r_t), each of shape (). r_t is 0 where rho_t or rho_inf is at most 4.
    """
    a: Any = -log(b2)
    x = a * t
    # Not 2 / (1 - b2) - 1: in float32, 1 - b2 is off by 5e-5 for b2 = 0.999.
    rho_inf = -2 / jnp.expm1(-a) - 1
    early = t - 2 / a * (_e(jnp.minimum(x, 0.5)) - _e(a))
    # 2.0, not 2: twice a whole t overflows from 2^30 on.
    rho = jnp.where(x < 0.5, early, rho_inf - 2.0 * t / jnp.expm1(x)) + 2 * behind / jnp.expm1(x)
    defined = (rho > 4) & (rho_inf > 4)
    safe, safe_inf = jnp.where(defined, rho, 5.0), jnp.where(defined, rho_inf, 5.0)
    squared = (safe - 4) * (safe - 2) * safe_inf / ((safe_inf - 4) * (safe_inf - 2) * safe)
    return rho, jnp.where(defined, jnp.sqrt(squared), 0.0)


def _e(x: Any) -> Any:
    """Returns x/2 coth(x/2) - 1 by its Taylor series, to 1e-15 for x <= 1/2."""
    y = x * x
    series = y * (1 / 47900160 - y * (691 / 1307674368000))
    series = y * (1 / 30240 - y * (1 / 1209600) + y * series)
    return y * (1 / 12 - y * (1 / 720) + y * series)
