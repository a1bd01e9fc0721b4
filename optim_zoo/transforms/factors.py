"""Factors of the updates by path and by layer: discriminative fine-tuning (arXiv 1801.06146)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optim_zoo import ranges, rows, rules
from optim_zoo.errors import ArgumentError, ArgumentTypeError, ArgumentValueError
from optim_zoo.layers.specs import LayerAxis, stacked
from optim_zoo.transforms.leafwise import Declaration, Leaf, Leafwise, leafwise
from optim_zoo.tree import Tree, leaves_with_path, wide


class ScaleByRulesState(NamedTuple):
    """State of `scale_by_rules`, which is empty and only names the piece."""


class _Factor(NamedTuple):
    """The factor of one rule."""

    values: Any  # a Python number, or an array of shape () or (layers,)
    along: LayerAxis  # the axis of the leaf that a vector belongs to


def scale_by_rules(factors: rules.Rules) -> Leafwise:
    """Scales the update of each leaf by the factor of the first rule that matches its path.

    ::

        u <- f u,   f = the factor of the first matching rule, or 1 where no rule matches

    This gives parts of a model their own learning rates, as in fine-tuning with layer-wise decay
    (arXiv 1801.06146), for which `layerwise_decay` makes the rules. A factor of 0 freezes a leaf:
    its update is -0.0 whatever the gradient is, so that the parameter stays unchanged to the bit.

    Put it behind the whole optimizer, because a trust ratio or the root of a second moment that
    comes later would cancel the factor. Put `precision.master_weights` and
    `precision.stochastic_rounding` around both.

    Args:
      factors: Pairs of a path pattern and a factor. A pattern is a regular expression, searched for
        (``re.search``) in the path of a leaf. A factor is one of

        - a finite number >= 0;
        - a vector (an array of one axis, or a list of numbers) with one factor for each layer of an
          array in which layers are stacked along the first axis, as by ``nn.scan``;
        - a pair ``(vector, stacked(axis))``, where layers are stacked along another axis.
          ``stacked(axis, mesh_axis)`` is for pipeline parallelism inside ``shard_map`` or ``pmap``:
          the vector has one factor for each layer of all devices.

        A factor may be traced. Rules are tried in their order.

    Returns:
      A piece whose state is the empty `ScaleByRulesState`. Updates keep their dtype; the product is
      computed in float32 or wider. It accepts `SparseRows`.

    Raises:
      ArgumentValueError: A factor is negative, not finite, or has more than one axis; in ``init``,
        a pattern matches no leaf; in ``init`` and ``update``, a vector does not have one factor for
        each layer of its leaf; in ``update``, a gradient has another shape than its parameter.
      ArgumentTypeError: ``factors`` are not pairs of a pattern and a factor; in ``init``, a
        parameter is not a real floating-point array.

    Example:
      ```python
      tx = optax.chain(
          optim_zoo.adamw(1e-4),
          optim_zoo.scale_by_rules([("norm|bias", 0.0), ("stack", [0.5, 1.0])]),
      )
      ```
    """
    rules.check_rules("factors", factors)
    parsed = [(pattern, _parsed(pattern, factor)) for pattern, factor in factors]

    def check(params: Tree) -> None:
        rules.check_matches("factors", [pattern for pattern, _ in factors], params)
        for path, x in leaves_with_path(params):
            factor = rules.first_match(parsed, path, None)
            if factor is not None:
                _of_layers(factor, path, jnp.shape(x))

    def update(u: Any, state: ScaleByRulesState, leaf: Leaf) -> tuple[Any, ScaleByRulesState]:
        factor = rules.first_match(parsed, leaf.path, None)
        if factor is None:
            return u, state
        values = _of_layers(factor, leaf.path, u.shape)
        if rows.is_sparse(u) and np.ndim(values) and factor.along.axis % len(u.shape) == 0:
            values = values.at[u.ids].get(mode="clip")  # the rows of padding are never read
        return rows.on_rows(lambda x: _scaled(x, values, factor.along.axis), u), state

    return leafwise(
        Declaration(
            name="scale_by_rules",
            update=update,
            state=ScaleByRulesState,
            check=check,
            params="optional",
            takes_rows=True,
        )
    )


def _scaled(u: jax.Array, values: Any, axis: int) -> jax.Array:
    """Returns ``u`` times one value, or times one value for each index along ``axis``."""
    if isinstance(values, int | float) and values == 0:
        return jnp.full_like(u, -0.0)
    if isinstance(values, int | float):
        return u if values == 1 else (wide(u) * values).astype(u.dtype)
    if values.ndim:
        values = jnp.expand_dims(values, [i for i in range(u.ndim) if i != axis % u.ndim])
    return jnp.where(values == 0, -0.0, wide(u) * values).astype(u.dtype)


def _of_layers(factor: _Factor, path: str, shape: Sequence[int]) -> Any:
    """Returns the factor of an array, or the factors of those of its layers that a device holds.

    Raises:
      ArgumentValueError: ``factor`` is a vector, and the array does not have that many layers.
    """
    values, axis, mesh_axis = factor.values, factor.along.axis, factor.along.mesh_axis
    if not np.ndim(values):
        return values
    expected = "have a vector with one factor for each layer"
    if not -len(shape) <= axis < len(shape):
        sentence = f"{{argument}}: {path} has shape {tuple(shape)} and no axis {axis} for a vector"
        raise ArgumentValueError("factors", expected, values, sentence=sentence)
    layers, parts = shape[axis], _size(mesh_axis)
    values = jnp.asarray(values)
    if len(values) == layers:
        return values
    if len(values) == layers * parts:
        return jax.lax.dynamic_slice_in_dim(values, jax.lax.axis_index(mesh_axis) * layers, layers)
    advice = "put a rule with a number for this leaf in front"
    raise ArgumentValueError(
        "factors",
        expected,
        values,
        advice,
        sentence=f"{{argument}}: {path} has {layers} layers along axis {axis}, its vector has "
        f"{len(values)} factors; if no layers are stacked in it, {advice}",
    )


def _size(mesh_axis: str | None) -> int:
    """Returns the number of devices along a mesh axis, which is 1 outside a mapped function."""
    try:
        return jax.lax.axis_size(mesh_axis) if mesh_axis is not None else 1
    except NameError:
        return 1


def _parsed(pattern: str, factor: Any) -> _Factor:
    """Returns the factor of a rule.

    Raises:
      ArgumentTypeError, ArgumentValueError: See `scale_by_rules`.
    """
    values, along = factor, stacked(0)
    if isinstance(factor, tuple | list) and any(isinstance(x, LayerAxis) for x in factor):
        values, along = factor[0], factor[-1]
        is_stack = isinstance(along, LayerAxis) and along.parts is None
        if len(factor) != 2 or not is_stack or not np.ndim(values):
            raise _refused(pattern, "be a pair (vector, stacked(axis))", factor, ArgumentTypeError)
    if isinstance(values, tuple | list):
        traced = any(isinstance(x, jax.core.Tracer) for x in values)
        values = jnp.stack(list(map(jnp.asarray, values))) if traced else _array(pattern, values)
    if np.ndim(values) > 1:
        raise _refused(pattern, "be a number or a vector", values, ArgumentValueError)
    is_known = np.ndim(values) and not isinstance(values, jax.core.Tracer)
    for value in np.asarray(values).tolist() if is_known else [values] * (np.ndim(values) == 0):
        try:
            ranges.check("factors", value, 0.0, open_high=True)
        except ArgumentError as error:
            is_number = isinstance(error, ArgumentValueError)
            expected = "be in [0, inf)" if is_number else "be a number in [0, inf)"
            raise _refused(pattern, expected, value, type(error)) from None
    return _Factor(values, along)


def _array(pattern: str, values: Sequence[Any]) -> np.ndarray:
    if all(isinstance(x, int | float | np.number | jax.Array) for x in values):
        return np.asarray(values)
    raise _refused(pattern, "be a number or a vector", values, ArgumentTypeError)


def _refused(pattern: str, expected: str, value: Any, kind: type[ArgumentError]) -> ArgumentError:
    sentence = f"{{argument}}: the factor of {pattern!r} must {expected}, got {value!r}"
    return kind("factors", expected, value, sentence=sentence)
