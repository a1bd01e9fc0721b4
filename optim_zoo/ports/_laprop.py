"""The direction of `ports.timm.LaProp`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo.ports._arguments import Rate
from optim_zoo.ports._pieces import at
from optim_zoo.transforms.leafwise import Declaration, Leaf, Leafwise, leafwise, zero_count, zeros
from optim_zoo.transforms.moments import bias, moment
from optim_zoo.tree import Tree


class LaPropState(NamedTuple):
    """State of `LaProp`."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made
    average_rate: jax.Array  # (), float32 (float64 under x64): average of lr, from 0
    exp_avg: Tree  # like the parameters, in float32 or wider
    exp_avg_sq: Tree  # like the parameters, in float32 or wider


def scale_by_laprop(lr: Rate, b1: float, b2: float, eps: float) -> Leafwise:
    """Returns the step of LaProp, with its learning rate and without weight decay."""

    def begin(state: LaPropState) -> tuple[LaPropState, Any]:
        count = optax.safe_increment(state.count)
        rate = jnp.asarray(at(lr, state.count), float)
        average_rate = moment(rate, state.average_rate, b1)
        scale = jnp.where(average_rate > 0, rate / average_rate, 0)
        return state._replace(count=count, average_rate=average_rate), (
            rate,
            scale,
            bias(b2, count),
        )

    def update(g: jax.Array, state: LaPropState, leaf: Leaf) -> tuple[jax.Array, LaPropState]:
        rate, scale, c2 = leaf.shared
        g = g.astype(state.exp_avg_sq.dtype)
        nu = moment(jnp.square(g), state.exp_avg_sq, b2)
        normalised = rate * g / (jnp.sqrt(nu / c2) + eps)
        m = moment(normalised, state.exp_avg, b1)
        return -scale * m, state._replace(exp_avg=m, exp_avg_sq=nu)

    return leafwise(
        Declaration(
            name="timm.LaProp",
            update=update,
            state=LaPropState,
            like_params=("exp_avg", "exp_avg_sq"),
            init=lambda path, x: {"exp_avg": zeros(x), "exp_avg_sq": zeros(x)},
            init_shared=lambda: {**zero_count(), "average_rate": jnp.zeros((), float)},
            begin=begin,
        )
    )
