"""How the auxiliary values of a loss are combined over devices and micro-batches.

A step calls the loss once for every device and micro-batch, or once for the global batch. Every
leaf of aux is combined by one rule, so that the result does not depend on that:

- a floating-point scalar is a mean over the examples, and is averaged with the weights of the loss;
- an integer or boolean scalar is a sum over the examples, and is added, booleans in int32;
- an array whose first axis is the batch is concatenated in the order of the batch;
- a leaf that is marked as `Mean` or `Sum` is averaged or added, whatever its shape and dtype;
- anything else is refused.

On device ``d`` with micro-batch ``m``, a mean of ``x_dm`` is ``sum_dm w_dm x_dm / sum_dm w_dm``,
and 0 where the sum of the weights is 0. Parts of weight 0 are left out, because their mean is
usually 0 / 0.
"""

import dataclasses
import enum
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optim_zoo.errors import ArgumentValueError
from optim_zoo.sharding.losses import LossFn, loss_and_aux
from optim_zoo.tree import Tree, leaves_with_path


class Mean(NamedTuple):
    """Marks a value of aux as a mean over the examples of a batch.

    The step returns the mean over the global batch, ``sum(weight * value) / sum(weight)`` over all
    calls of the loss, and 0 where the sum of the weights is 0. It is returned without the mark, in
    the dtype of ``value``, or in JAX's default float dtype where that is an integer or boolean. A
    floating-point scalar that is not marked is a `Mean` without ``weight``.

    Attributes:
      value: an array or a pytree of arrays, whose shapes do not depend on the size of the batch.
      weight: a scalar, what the mean was divided by: the number or the summed weights of the
        examples. None means the weight of the loss, which is 1 unless that is a `WeightedLoss`.

    Raises:
      ArgumentValueError: when the step is traced, the shape of ``value`` depends on the batch or
        ``weight`` is not a scalar.

    Example:
      ::

        def loss_fn(params, batch):  # used with data_parallel(..., has_aux=True)
            hidden = model(params, batch["x"])  # (batch, features)
            return loss(hidden), {"mean": Mean(hidden.mean(0)), "total": Sum(hidden.sum(0))}
    """

    value: Any
    weight: Any = None


class Sum(NamedTuple):
    """Marks a value of aux as a sum over the examples of a batch.

    The step returns the sum over the global batch, without the mark, in the dtype of ``value``, or
    in int32 where that is boolean. An integer or boolean scalar that is not marked is a `Sum`.

    Attributes:
      value: an array or a pytree of arrays. Shapes that depend on the batch are refused.
    """

    value: Any


class Aux(NamedTuple):
    """Combined aux, in two trees that can be sharded differently.

    Each has the structure of aux and None for the leaves of the other one.
    """

    replicated: Tree  # means and sums, equal on all devices
    rows: Tree  # arrays whose first axis is the batch: with an axis name, the rows of one device

    def joined(self) -> Tree:
        """Returns the tree of all leaves."""
        return jax.tree.map(
            lambda x, rows: rows if x is None else x, *self, is_leaf=lambda x: x is None
        )


class _Rule(enum.Enum):
    MEAN = enum.auto()
    SUM = enum.auto()
    ROWS = enum.auto()


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A leaf of aux without its mark."""

    path: str
    value: Any
    mark: type[Mean] | type[Sum] | None
    weight: Any = None  # that of a `Mean`

    def refused(self, reason: str, advice: str) -> ArgumentValueError:
        """Returns the error about this leaf."""
        return ArgumentValueError(
            "loss_fn",
            "return aux that can be combined over devices and micro-batches",
            self.path,
            advice,
            sentence=f"aux of {{argument}}: {self.path or 'the value'} {reason}: {advice}",
            related=["has_aux"],
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the leaves of one loss's aux are combined; made by `plan`."""

    structure: Any  # that of aux without marks
    rules: tuple[_Rule, ...]  # one for each leaf
    results: tuple[jax.ShapeDtypeStruct, ...]  # those of `_Rule.ROWS` with the rows of one call

    def zeros(self) -> list[Any]:
        """Returns what is added to in `parts`, before the first call."""
        zeros: list[Any] = []
        for rule, result in zip(self.rules, self.results, strict=True):
            if rule is not _Rule.ROWS:
                x = jnp.zeros(result.shape, _wide(result.dtype))
                zeros.append((x, jnp.zeros((), float)) if rule is _Rule.MEAN else x)
        return zeros

    def parts(self, aux: Tree, weight: jax.Array) -> tuple[list[Any], list[Any]]:
        """Returns what is added over the calls of the loss, and what is concatenated.

        Args:
          aux: as one call of the loss returned it.
          weight: the weight of that loss.
        """
        added: list[Any] = []
        rows: list[Any] = []
        for leaf, rule, result in zip(_leaves(aux), self.rules, self.results, strict=True):
            x = jnp.asarray(leaf.value)
            if rule is _Rule.ROWS:
                rows.append(x)
                continue
            x = x.astype(_wide(result.dtype))
            if rule is _Rule.MEAN:
                w = weight if leaf.weight is None else jnp.asarray(leaf.weight, float)
                added.append((jnp.where(w == 0, 0, w * x), w))
            else:
                added.append(x)
        return added, rows

    def combined(self, added: list[Any], rows: list[Any]) -> Aux:
        """Returns aux from the sum of what is added and the concatenation of the rows."""
        sums, concatenated = iter(added), iter(rows)
        replicated: list[Any] = []
        by_row: list[Any] = []
        for rule, result in zip(self.rules, self.results, strict=True):
            if rule is _Rule.ROWS:
                replicated.append(None)
                by_row.append(next(concatenated))
                continue
            x = next(sums)
            if rule is _Rule.MEAN:
                total, weight = x
                x = total / jnp.where(weight > 0, weight, 1)
            replicated.append(x.astype(result.dtype))
            by_row.append(None)
        return Aux(self.structure.unflatten(replicated), self.structure.unflatten(by_row))


NO_AUX = Plan(jax.tree.structure(None), (), ())
"""The plan of a loss without aux."""


def plan(loss_fn: LossFn, params: Tree, batch: Tree) -> Plan:
    """Returns how each leaf of aux is combined, from its shapes for ``batch`` and twice as much.

    Args:
      loss_fn: ``loss_fn(params, batch)`` returns ``(loss, aux)``.
      params: the parameters.
      batch: a batch of the size that the loss is called with.

    Raises:
      ArgumentValueError: a leaf cannot be combined. The error names its path.
    """

    def aux_of(params: Tree, batch: Tree) -> Tree:
        _, aux = loss_and_aux(loss_fn(params, batch), has_aux=True)
        for leaf in _leaves(aux):
            _check_array(leaf)
        return aux

    def aux_of_two(params: Tree, batch: Tree) -> Tree:
        return aux_of(params, jax.tree.map(lambda x: jnp.concatenate([x, x]), batch))

    aux = jax.eval_shape(aux_of, params, batch)
    structure: Any = jax.tree.structure(aux)
    try:
        aux_for_two = jax.eval_shape(aux_of_two, params, batch)
    except Exception as error:
        error.add_note(
            "data_parallel traced the loss with twice the batch, to find the arrays of aux whose "
            "first axis is the batch."
        )
        raise
    if structure != jax.tree.structure(aux_for_two):
        raise _Leaf("", aux, None).refused(
            "has a structure that depends on the size of the batch",
            "return the same for every size",
        )
    rows = {x.shape[0] for x in jax.tree.leaves(batch)}
    leaves = list(_leaves(aux))
    rules = [_rule(*pair, rows) for pair in zip(leaves, _leaves(aux_for_two), strict=True)]
    results = [_result(leaf, rule) for leaf, rule in zip(leaves, rules, strict=True)]
    plain = jax.tree.map(lambda x: x.value if _is_mark(x) else x, aux, is_leaf=_is_mark)
    return Plan(jax.tree.structure(plain), tuple(rules), tuple(results))


def _leaves(aux: Tree) -> Iterator[_Leaf]:
    for path, x in leaves_with_path(aux, is_leaf=_is_mark):
        if not _is_mark(x):
            yield _Leaf(path, x, None)
            continue
        for inner, value in leaves_with_path(x.value):
            full_path = "/".join(filter(None, (path, inner)))
            yield _Leaf(full_path, value, type(x), x.weight if isinstance(x, Mean) else None)


def _is_mark(x: Any) -> bool:
    return isinstance(x, Mean | Sum)


def _check_array(leaf: _Leaf) -> None:
    """Raises unless a leaf is an array or a number, and the weight of a `Mean` a scalar."""
    x = leaf.value
    dtype = getattr(x, "dtype", None)
    kinds = (jnp.number, jnp.bool_, jax.dtypes.extended)
    if not (
        isinstance(x, int | float | complex)
        if dtype is None
        else any(jnp.issubdtype(dtype, kind) for kind in kinds)
    ):
        raise leaf.refused(f"is not an array but a {type(x).__name__}", "leave it out of aux")
    if jnp.ndim(0 if leaf.weight is None else leaf.weight):
        shape = jnp.shape(leaf.weight)
        raise leaf.refused(f"has a weight of shape {shape}", "return Mean(value, weight=scalar)")


def _rule(leaf: _Leaf, for_two: _Leaf, rows: set[int]) -> _Rule:
    """Returns the rule of a leaf, from its shapes for a batch and for twice as much.

    Args:
      leaf: the leaf for a batch.
      for_two: the same leaf for twice the batch.
      rows: the sizes of the first axes of the batch.
    """
    shape, larger, dtype = leaf.value.shape, for_two.value.shape, leaf.value.dtype
    shown = f"of shape {shape} and dtype {dtype}"
    is_number = jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)
    if leaf.mark is None and shape and shape[0] in rows and larger == (2 * shape[0], *shape[1:]):
        return _Rule.ROWS
    if not is_number:
        raise leaf.refused(
            f"{shown} can be neither averaged nor added over devices and micro-batches",
            "return one for each example, or leave it out of aux",
        )
    if leaf.mark is not None:
        if shape != larger:
            raise leaf.refused(
                f"{shown} is marked as {leaf.mark.__name__}, but its shape depends on the batch",
                "reduce it over the examples, or return it without the mark if its first axis is "
                "the batch",
            )
        return _Rule.MEAN if leaf.mark is Mean else _Rule.SUM
    if shape or larger:
        raise leaf.refused(
            f"{shown} is not a scalar, and its first axis is not the batch",
            "return sharding.Mean(x) for a mean over the examples, sharding.Sum(x) for a sum, or "
            "leave it out of aux",
        )
    return _Rule.MEAN if jnp.issubdtype(dtype, jnp.inexact) else _Rule.SUM


def _result(leaf: _Leaf, rule: _Rule) -> jax.ShapeDtypeStruct:
    dtype = leaf.value.dtype
    if rule is _Rule.MEAN and not jnp.issubdtype(dtype, jnp.inexact):
        dtype = jnp.result_type(float)
    if rule is _Rule.SUM and dtype == jnp.bool_:
        dtype = jnp.dtype("int32")
    return jax.ShapeDtypeStruct(leaf.value.shape, dtype)


def _wide(dtype: Any) -> Any:
    """Returns the dtype in which values of ``dtype`` are added: at least JAX's default float."""
    is_inexact = jnp.issubdtype(dtype, jnp.inexact)
    return jnp.promote_types(dtype, jnp.result_type(float)) if is_inexact else dtype
