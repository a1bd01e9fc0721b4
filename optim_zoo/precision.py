"""Training in low precision without losing small steps.

A bfloat16 number has 8 significant bits, so a step below 1/256 of a parameter is rounded away.
`master_weights` keeps float32 parameters in the state, `stochastic_rounding` rounds so that small
steps arrive on average. `store_state` keeps parts of the state in fewer bits.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges, rows
from optim_zoo.errors import ArgumentTypeError, parameters_missing
from optim_zoo.tree import Tree, check_floating, wide

_NARROW = ("bfloat16", "float16")


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
            lambda x: jnp.asarray(x, jnp.float32) if _is_narrow(x) else optax.MaskedNode(), params
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
            lambda x, u, new: _reaching(new.astype(x.dtype), x) if _is_narrow(x) else u,
            params,
            steps,
            moved,
        )
        kept = jax.tree.map(
            lambda x, new: new if _is_narrow(x) else optax.MaskedNode(), params, moved
        )
        return updates, MasterWeightsState(kept, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _masters(params: Tree, master: Tree) -> Tree:
    """Float32 parameters: the master where there is one, else the parameter itself."""
    return jax.tree.map(lambda x, m: m if _is_narrow(x) else x, params, master)


def _is_narrow(x: Any) -> bool:
    return jnp.result_type(x).name in _NARROW


def _reaching(target: jax.Array, x: jax.Array) -> jax.Array:
    """The float32 update that takes ``x`` to ``target``, both of low precision.

    Where they are equal it is what changes nothing: -0.0 + 0.0 would be 0.0, and inf - inf is NaN.
    """
    return jnp.where(target == x, -0.0, wide(target) - wide(x))


class StochasticRoundingState(NamedTuple):
    """State of `stochastic_rounding`."""

    key: jax.Array  # a key: of the next step
    inner: optax.OptState


def stochastic_rounding(
    inner: optax.GradientTransformation, key: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """Rounds stepped parameters up or down at random, so that their mean is the unrounded step.

    ::

        new = x + inner(g, x)  in float32
        x <- up(new) with probability (new - down(new)) / (up(new) - down(new)), else down(new)

    up and down being the nearest numbers of the parameter's dtype. Needs no copy of the
    parameters; the noise is that of a rounding a step. Updates are float32, for stock
    ``optax.apply_updates``. Parameters of float32 or wider are stepped as ``inner`` says.

    Args:
      inner: any optimizer; it sees float32 parameters, rounded as they are.
      key: ``jax.random.key(seed)``; every step splits it. The same key in two runs rounds alike.

    Raises:
      TypeError: ``key`` is no key, or a parameter is not floating-point.
      ValueError: see `master_weights`.
    """
    ranges.check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)
    is_array = isinstance(key, jax.Array)
    if not is_array or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.ndim:
        raise ArgumentTypeError("key", "be one key, such as jax.random.key(0)", key)

    def init(params: Tree) -> StochasticRoundingState:
        check_floating(params)
        return StochasticRoundingState(jnp.copy(key), inner.init(jax.tree.map(wide, params)))

    def update(
        updates: Tree, state: StochasticRoundingState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, StochasticRoundingState]:
        if params is None:
            raise parameters_missing("stochastic_rounding")
        rows.check_updates("stochastic_rounding", updates, params)
        master = jax.tree.map(wide, params)
        steps, inner_state = inner.update(updates, state.inner, master, **extra)
        next_key, now = jax.random.split(state.key)
        keys = _keys(now, params)
        updates = jax.tree.map(
            lambda x, u, k: (
                _reaching(round_stochastically(wide(x) + u, x.dtype, k), x) if _is_narrow(x) else u
            ),
            params,
            steps,
            keys,
        )
        return updates, StochasticRoundingState(next_key, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _keys(key: jax.Array, tree: Tree) -> Tree:
    """A key for every leaf of ``tree``."""
    structure: Any = jax.tree.structure(tree)
    return structure.unflatten(list(jax.random.split(key, structure.num_leaves)))


def round_stochastically(x: jax.Array, dtype: Any, key: jax.Array) -> jax.Array:
    """Float32 ``x`` in ``dtype``, bfloat16 or float16, its mean over keys being ``x`` itself.

    Exact for float16 where |x| is at least 6.1e-5; below, where its numbers are evenly spaced, too.
    What is not finite stays so, and what is beyond the largest number is rounded as usual.
    """
    narrow = x.astype(dtype)
    if jnp.dtype(dtype) == jnp.bfloat16 and x.dtype == jnp.float32:
        return _cut_at_random(x, narrow, key)
    below = jnp.where(wide(narrow) > x, jnp.nextafter(narrow, jnp.asarray(-jnp.inf, dtype)), narrow)
    above = jnp.nextafter(below, jnp.asarray(jnp.inf, dtype))
    share = (x - wide(below)) / (wide(above) - wide(below))
    up = jax.random.uniform(key, x.shape) < share
    rounded = jnp.where(up, above, below)
    return jnp.where(jnp.isfinite(wide(narrow)) & jnp.isfinite(wide(above)), rounded, narrow)


def _cut_at_random(x: jax.Array, narrow: jax.Array, key: jax.Array) -> jax.Array:
    """`round_stochastically` to bfloat16, which is the first half of a float32.

    A random second half is added to its own, and what is left of it is cut off: with probability
    (second half) / 2^16 the first half has become the next number, away from 0.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    raised = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((raised >> 16).astype(jnp.uint16), jnp.bfloat16)
    largest = jnp.uint32(0x7F7F)  # beyond it are infinity and what is none
    return jnp.where((bits >> 16) & 0x7FFF < largest, rounded, narrow)


class StoreStateState(NamedTuple):
    """State of `store_state`."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made, wrapping; the key of the rounding
    inner: optax.OptState  # with the fields that were named in fewer bits


# Averages of gradients: they forget fast enough for a rounding to do no harm.
_FIRST_MOMENTS = ("mu", "momentum")


def store_state(
    inner: optax.GradientTransformation, dtypes: Mapping[str, str], *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Keeps fields of the state in fewer bits between steps; arithmetic is done in float32.

    ::

        store_state(adamw(1e-3), {"mu": "bfloat16", "nu": "bfloat16"})

    ``mu`` and ``momentum`` are rounded to the nearest number: at a rate of 0.9 such an average
    stops within 2 % of what it averages. Other fields are rounded up or down
    at random with the right mean (`round_stochastically`): rounded to the nearest, a second moment
    whose rate is 0.999 stalls in bfloat16, because a thousandth of it is less than half its last
    digit. They cannot be float16, in which squares of gradients vanish.

    Args:
      inner: any transformation whose state holds such fields (NamedTuples), at any depth.
      dtypes: name of the field -> ``"bfloat16"`` or ``"float16"``. What is not floating-point
        in it, such as a count, stays as it is.
      seed: of the random rounding, with the number of the step.

    Raises:
      ArgumentValueError: a dtype is not allowed for its field; in ``init``, the state has no such
        field, or the field holds nothing floating-point.
    """
    ranges.check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)
    given: Any = dtypes
    if not isinstance(given, Mapping):
        expected = "be a mapping from fields of the state to dtypes"
        raise ArgumentTypeError("dtypes", expected, given)
    for name, dtype in dtypes.items():
        allowed = _NARROW if name in _FIRST_MOMENTS else ("bfloat16",)
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

    def update(
        updates: Tree, state: StoreStateState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, StoreStateState]:
        widened = jax.tree.map_with_path(
            lambda path, x: wide(x) if _field(path) in dtypes and _is_floating(x) else x,
            state.inner,
        )
        updates, after = inner.update(updates, widened, params, **extra)
        count = state.count + 1  # wraps, where a full count would repeat its key
        return updates, StoreStateState(count, narrowed(after, count))

    def narrowed(state: Tree, count: jax.Array) -> Tree:
        keys = _keys(jax.random.fold_in(jax.random.key(seed), count), state)

        def narrow(path: Any, x: jax.Array, key: jax.Array) -> jax.Array:
            name = _field(path)
            if name is None or name not in dtypes or not _is_floating(x):
                return x
            if name in _FIRST_MOMENTS:
                return x.astype(dtypes[name])
            return round_stochastically(wide(x), jnp.dtype(dtypes[name]), key)

        return jax.tree.map_with_path(narrow, state, keys)

    def _is_floating(x: jax.Array) -> bool:
        return jnp.issubdtype(x.dtype, jnp.floating)

    def _field(path: Any) -> str | None:
        """The field of a NamedTuple that a leaf belongs to: one that was named, else the last."""
        names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
        named = [name for name in names if name in dtypes]
        return (named or names[::-1] or [None])[0]

    return optax.GradientTransformationExtraArgs(init, update)
