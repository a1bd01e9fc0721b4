"""Storage of parts of the state in low precision between steps."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges
from optim_zoo.errors import ArgumentTypeError
from optim_zoo.tree import Tree, promoting, wide
from optim_zoo.wrappers.precision.narrow import NARROW
from optim_zoo.wrappers.precision.rounding import keys_like, round_stochastically


class StoreStateState(NamedTuple):
    """State of `store_state`."""

    # (), int32: steps made, wrapping; the key of the random rounding
    count: jax.Array  # type: ignore[assignment]
    inner: optax.OptState  # the chosen fields in low precision


# Averages of gradients forget fast enough for rounding to the nearest number to do no harm.
_FIRST_MOMENTS = ("mu", "momentum")


def store_state(
    inner: optax.GradientTransformation, dtypes: Mapping[str, str], *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Stores fields of the state in low precision between steps; arithmetic is done in float32.

    ::

        store_state(adamw(1e-3), {"mu": "bfloat16", "nu": "bfloat16"})

    ``mu`` and ``momentum`` are rounded to the nearest number: with a decay rate of 0.9 such an
    average stops within 2 % of the average of its inputs. Other fields are rounded up or down at
    random with the right mean (`round_stochastically`). Rounded to the nearest number, a second
    moment with a decay rate of 0.999 would stall in bfloat16, because a thousandth of it is less
    than half of its last digit. Second moments cannot be float16, in which squares of gradients
    vanish.

    Args:
      inner: Any transformation whose state has these fields in a NamedTuple, at any depth.
      dtypes: A mapping from the name of a field to ``"bfloat16"`` or, for ``mu`` and ``momentum``
        only, ``"float16"``. Arrays in the field that are not floating-point, such as a count, are
        unchanged.
      seed: The seed of the random rounding, which also depends on the number of the step; at least
        0.

    Returns:
      A transformation whose state is a ``StoreStateState``: a count of steps, and the state of
      ``inner`` with the chosen fields in low precision.

    Raises:
      ArgumentValueError: A dtype is not allowed for its field, or ``seed`` is negative; in
        ``init``, the state has no such field, or the field holds nothing floating-point.
      ArgumentTypeError: ``inner`` is not a transformation, or ``dtypes`` is not a mapping.

    Example:
      ```python
      tx = optim_zoo.precision.store_state(optim_zoo.adamw(1e-3), {"nu": "bfloat16"})
      ```
    """
    ranges.check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)
    given: Any = dtypes
    if not isinstance(given, Mapping):
        expected = "be a mapping from fields of the state to dtypes"
        raise ArgumentTypeError("dtypes", expected, given)
    for name, dtype in dtypes.items():
        allowed = NARROW if name in _FIRST_MOMENTS else ("bfloat16",)
        ranges.check_choice(f"dtype for {name}", dtype, allowed, argument="dtypes")
    ranges.check_count("seed", seed)

    def init(params: Tree) -> StoreStateState:
        state = inner.init(params)
        leaves = jax.tree.leaves_with_path(state)
        fields = {_field(path) for path, x in leaves if _is_floating(x)}
        if jax.tree.leaves(params):
            for name in dtypes:
                known = sorted(filter(None, fields))
                ranges.check_choice("field of the state", name, known, argument="dtypes")
        count = jnp.zeros((), jnp.int32)
        return StoreStateState(count, narrowed(state, count))

    @promoting
    def update(
        updates: Tree, state: StoreStateState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, StoreStateState]:
        widened = jax.tree.map_with_path(
            lambda path, x: wide(x) if _field(path) in dtypes and _is_floating(x) else x,
            state.inner,
        )
        updates, after = inner.update(updates, widened, params, **extra)
        count = state.count + 1  # It wraps: a saturating count would repeat its key.
        return updates, StoreStateState(count, narrowed(after, count))

    def narrowed(state: Tree, count: jax.Array) -> Tree:
        keys = keys_like(jax.random.fold_in(jax.random.key(seed), count), state)

        def narrow(path: Any, x: jax.Array, key: jax.Array) -> jax.Array:
            name = _field(path)
            if name is None or name not in dtypes or not _is_floating(x):
                return x
            if isinstance(x, jax.ShapeDtypeStruct):  # `init` on shapes
                return x.update(dtype=jnp.dtype(dtypes[name]))
            if name in _FIRST_MOMENTS:
                return x.astype(dtypes[name])
            return round_stochastically(wide(x), jnp.dtype(dtypes[name]), key)

        return jax.tree.map_with_path(narrow, state, keys)

    def _is_floating(x: jax.Array) -> bool:
        return jnp.issubdtype(x.dtype, jnp.floating)

    def _field(path: Any) -> str | None:
        """Returns the field of a leaf: the first that is in ``dtypes``, otherwise the last."""
        names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
        named = [name for name in names if name in dtypes]
        return (named or names[::-1] or [None])[0]

    return optax.GradientTransformationExtraArgs(init, update)
