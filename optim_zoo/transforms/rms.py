"""The direction of RMSprop (Tieleman and Hinton, Coursera lecture 6.5, 2012)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optim_zoo import ranges
from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms.leafwise import Declaration, Leaf, Leafwise, leafwise, zeros
from optim_zoo.transforms.moments import moment
from optim_zoo.tree import Tree, root


class ScaleByRmsState(NamedTuple):
    """State of `scale_by_rms`; averages are like the parameters, in float32 or wider."""

    nu: Tree  # moving average of g^2
    mu: Tree | None  # moving average of g, where the second moment is centered


@accepts_optax_arguments
def scale_by_rms(
    decay: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    eps_in_sqrt: bool = True,
    initial_scale: jax.typing.ArrayLike = 0.0,
    centered: bool = False,
) -> Leafwise:
    """Divides each gradient by the root of its mean square.

    ::

        nu <- decay nu + (1 - decay) g^2,    nu_0 = initial_scale
        mu <- decay mu + (1 - decay) g       if centered
        v   = nu                             if centered  max(nu - mu^2, 0)
        u   = g / sqrt(v + eps)              with eps_in_sqrt=False  g / (sqrt(v) + eps)

    ``optax.scale_by_rms`` and ``optax.scale_by_stddev`` compute the same. Here the averages are in
    float32 or wider whatever the parameters are, and a variance v that rounding makes negative is
    taken as 0, where the root of a negative number would be NaN. The source is Tieleman and Hinton,
    Coursera lecture 6.5, 2012.

    Args:
      decay: The decay rate of nu and mu, in [0, 1).
      eps: A finite number >= 0. Where the root and eps are both 0, u is 0.
      eps_in_sqrt: Whether eps is added under the root, as in optax, Keras and TensorFlow, or to the
        root, as in PyTorch.
      initial_scale: The value of nu before the first step, a finite number >= 0; 1 in
        TensorFlow 1.
      centered: Whether the variance takes the place of the mean square.

    Returns:
      A piece that returns the direction u; its state is `ScaleByRmsState`.

    Raises:
      ArgumentValueError: An argument is out of its range; in ``update``, a gradient has another
        shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optax.chain(optim_zoo.scale_by_rms(0.99), optim_zoo.scale_by_learning_rate(1e-3))
      ```
    """
    ranges.check_decay("decay", decay)
    ranges.check("eps", eps, 0.0, open_high=True)
    ranges.check("initial_scale", initial_scale, 0.0, open_high=True)

    def init(path: str, x: jax.Array) -> dict[str, jax.Array]:
        nu = jnp.full_like(zeros(x), initial_scale)
        return {"nu": nu, "mu": zeros(x)} if centered else {"nu": nu}

    def update(
        g: jax.Array, state: ScaleByRmsState, leaf: Leaf
    ) -> tuple[jax.Array, ScaleByRmsState]:
        del leaf
        g = g.astype(state.nu.dtype)
        nu = moment(jnp.square(g), state.nu, decay)
        if not centered:
            return divide_by_root(g, nu, eps, eps_in_sqrt=eps_in_sqrt), state._replace(nu=nu)
        mu = moment(g, jnp.asarray(state.mu), decay)
        variance = jnp.maximum(nu - jnp.square(mu), 0)
        u = divide_by_root(g, variance, eps, eps_in_sqrt=eps_in_sqrt)
        return u, state._replace(nu=nu, mu=mu)

    return leafwise(
        Declaration(
            name="scale_by_rms",
            update=update,
            state=ScaleByRmsState,
            like_params=("nu", "mu") if centered else ("nu",),
            init=init,
            init_shared=lambda: {} if centered else {"mu": None},
        )
    )


def divide_by_root(
    g: jax.Array, square: jax.Array, eps: jax.typing.ArrayLike, *, eps_in_sqrt: bool
) -> jax.Array:
    """Returns g / sqrt(square + eps) or g / (sqrt(square) + eps); 0 where that divides by 0."""
    denominator = root(square + eps) if eps_in_sqrt else root(square) + eps
    positive = denominator > 0
    quotient = jnp.where(positive, g / jnp.where(positive, denominator, 1), 0)
    return jnp.asarray(quotient, g.dtype)
