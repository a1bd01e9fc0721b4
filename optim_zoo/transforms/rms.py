"""RMSprop's direction (Tieleman and Hinton, Coursera lecture 6.5, 2012)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges, rows
from optim_zoo.transforms.moments import moment, zero_moment
from optim_zoo.tree import Tree, map_to_several


class ScaleByRmsState(NamedTuple):
    """State of `scale_by_rms`; averages are like the parameters, in float32 or wider."""

    nu: Tree  # moving average of g^2
    mu: Tree | None  # moving average of g, where the second moment is centered


def scale_by_rms(
    decay: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    eps_in_sqrt: bool = True,
    initial_scale: jax.typing.ArrayLike = 0.0,
    centered: bool = False,
) -> optax.GradientTransformation:
    """Divides gradients g by the root of their mean square.

    ::

        nu <- decay nu + (1 - decay) g^2,    nu_0 = initial_scale
        mu <- decay mu + (1 - decay) g       where centered
        u   = g / sqrt(v + eps)              or, eps_in_sqrt=False,  g / (sqrt(v) + eps)
        v   = nu,  centered  max(nu - mu^2, 0)

    ``optax.scale_by_rms`` and ``scale_by_stddev`` compute the same. Here the averages are float32
    or wider, and a centered v that rounding makes negative is 0 and not the root of NaN.

    Args:
      decay: in [0, 1).
      eps: >= 0; where the root and eps are both 0, u is 0.
      eps_in_sqrt: where eps stands: inside in optax, Keras and TensorFlow, outside in torch.
      initial_scale: nu before the first step, >= 0; 1 in TensorFlow 1.

    Raises:
      ValueError: a number is out of its range.
      TypeError: a parameter is not floating-point.
    """
    ranges.check_decay("decay", decay)
    ranges.check("eps", eps, 0.0, open_high=True)
    ranges.check("initial_scale", initial_scale, 0.0, open_high=True)

    def init(params: Tree) -> ScaleByRmsState:
        nu = jax.tree.map(lambda zero: jnp.full_like(zero, initial_scale), zero_moment(params))
        return ScaleByRmsState(nu, zero_moment(params) if centered else None)

    def update(
        updates: Tree, state: ScaleByRmsState, params: Tree | None = None
    ) -> tuple[Tree, ScaleByRmsState]:
        del params
        rows.check_updates("scale_by_rms", updates, state.nu)

        def step(g: jax.Array, nu: jax.Array) -> tuple[jax.Array, jax.Array]:
            g = g.astype(nu.dtype)
            nu = moment(jnp.square(g), nu, decay)
            return divide_by_root(g, nu, eps, eps_in_sqrt=eps_in_sqrt), nu

        def centered_step(
            g: jax.Array, nu: jax.Array, mu: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            g = g.astype(nu.dtype)
            nu, mu = moment(jnp.square(g), nu, decay), moment(g, mu, decay)
            variance = jnp.maximum(nu - jnp.square(mu), 0)
            return divide_by_root(g, variance, eps, eps_in_sqrt=eps_in_sqrt), nu, mu

        if centered:
            directions, nu, mu = map_to_several(centered_step, 3, updates, state.nu, state.mu)
            return directions, ScaleByRmsState(nu, mu)
        directions, nu = map_to_several(step, 2, updates, state.nu)
        return directions, ScaleByRmsState(nu, None)

    return optax.GradientTransformation(init, update)


def divide_by_root(
    g: jax.Array, square: jax.Array, eps: jax.typing.ArrayLike, *, eps_in_sqrt: bool
) -> jax.Array:
    """G / sqrt(square + eps), or g / (sqrt(square) + eps); 0 where the denominator is 0."""
    root = jnp.sqrt(square + eps) if eps_in_sqrt else jnp.sqrt(square) + eps
    quotient = jnp.where(root > 0, g / jnp.where(root > 0, root, 1), 0)
    return jnp.asarray(quotient, g.dtype)
