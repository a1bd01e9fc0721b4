"""Float32 copies of low-precision parameters, kept in the state."""

from typing import Any, NamedTuple

import jax
import optax

from optim_zoo import ranges, rows
from optim_zoo.errors import parameters_missing
from optim_zoo.tree import Tree, check_floating, promoting
from optim_zoo.wrappers.precision.narrow import is_narrow, reaching, widened


class MasterWeightsState(NamedTuple):
    """State of `master_weights`."""

    # Like the parameters: float32 where the parameter is narrower, otherwise `optax.MaskedNode`.
    master: Tree
    inner: optax.OptState


def master_weights(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Steps on a float32 copy of low-precision parameters, which are its rounding.

    ::

        master <- master + inner(g, master)
        update  = round(master) - x            in float32

    ``optax.apply_updates`` adds the update in float32 and rounds. The result is exactly
    round(master) while abs(new) >= 2^-16 abs(old) (float16: 2^-13); otherwise it is within
    2^-24 abs(old) of it, which the next step corrects. Parameters of float32 or wider have no
    second copy.

    Put it outside every transformation that changes updates, and `lookahead` inside: a piece
    outside that scaled the updates would break the equality.

    ``init`` accepts ``jax.ShapeDtypeStruct``: the masters in the state are then such structs too.

    Args:
      inner: Any optimizer. It receives float32 parameters and the gradients unchanged, and its
        state is made for float32 parameters.

    Returns:
      A transformation whose state is a ``MasterWeightsState``: the masters, and the state of
      ``inner``. Its updates of low-precision parameters are float32.

    Raises:
      ArgumentValueError: In ``update``, the parameters are missing, or a gradient has another shape
        than its parameter.
      ArgumentTypeError: ``inner`` is not a transformation; in ``init``, a parameter is not
        floating-point.

    Example:
      ```python
      tx = optim_zoo.precision.master_weights(optim_zoo.lamb(1e-3))
      ```
    """
    ranges.check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def init(params: Tree) -> MasterWeightsState:
        check_floating(params)
        master = jax.tree.map(lambda x: widened(x) if is_narrow(x) else optax.MaskedNode(), params)
        return MasterWeightsState(master, inner.init(_masters(params, master)))

    @promoting
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
    """Returns the float32 parameters: the master where there is one, else the parameter."""
    return jax.tree.map(lambda x, m: m if is_narrow(x) else x, params, master)
