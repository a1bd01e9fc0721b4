"""Float32 copies of low-precision parameters, kept in the state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges, rows
from optim_zoo.errors import parameters_missing
from optim_zoo.tree import Tree, check_floating
from optim_zoo.wrappers.precision.narrow import is_narrow, reaching


class MasterWeightsState(NamedTuple):
    """State of `master_weights`."""

    master: Tree  # like the parameters: float32 where they are narrower, else `optax.MaskedNode`
    inner: optax.OptState


def master_weights(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Steps on a float32 copy of low-precision parameters, which are its rounding.

    ::

        master <- master + inner(g, master)
        update  = round(master) - x            in float32

    Stock ``optax.apply_updates`` adds in float32 and rounds, and lands exactly on round(master)
    while |new| >= 2^-16 |old| (float16: 2^-13), else within 2^-24 |old|, which the next step puts
    right. So this stands outermost among what changes updates: a piece outside that scaled them
    would break the equality. Lookahead goes inside. Parameters of float32 or wider have no second
    copy.

    Args:
      inner: any optimizer; it sees float32 parameters and the gradients as they come, and its
        state is made for float32 parameters.

    Raises:
      TypeError: a parameter is not floating-point.
      ValueError: in ``update``, the parameters are missing, or a gradient has another shape than
        its parameter.
    """
    ranges.check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def init(params: Tree) -> MasterWeightsState:
        check_floating(params)
        master = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float32) if is_narrow(x) else optax.MaskedNode(), params
        )
        return MasterWeightsState(master, inner.init(_masters(params, master)))

    def update(
        updates: Tree, state: MasterWeightsState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, MasterWeightsState]:
        if params is None:
            raise parameters_missing("master_weights")
        rows.check_updates("master_weights", updates, params)
        master = _masters(params, state.master)
        steps, inner_state = inner.update(updates, state.inner, master, **extra)
        moved = optax.apply_updates(master, steps)
        updates = jax.tree.map(
            lambda x, u, new: reaching(new.astype(x.dtype), x) if is_narrow(x) else u,
            params,
            steps,
            moved,
        )
        kept = jax.tree.map(
            lambda x, new: new if is_narrow(x) else optax.MaskedNode(), params, moved
        )
        return updates, MasterWeightsState(kept, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _masters(params: Tree, master: Tree) -> Tree:
    """Float32 parameters: the master where there is one, else the parameter itself."""
    return jax.tree.map(lambda x, m: m if is_narrow(x) else x, params, master)
