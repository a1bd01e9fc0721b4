"""Finds the rows that a traced function gathers from tables.

``jnp.take(jnp.asarray(table), ids, axis=0)`` and the embedding layers of Flax use a table as an
array, which they may cast first. `evaluate` runs the traced function, but gathers the rows before
it casts them, so that the rows can be replaced by values that are differentiated.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.lax import GatherScatterMode

from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.rows.sparse_rows import in_range

Tap = Callable[[str, jax.Array, jax.Array], jax.Array]
"""``(path of the table, ids, rows)`` to the rows that the loss continues with."""

_COPIES = ("copy", "copy_p")
_CASTS_OF_MESH_AXES = ("pvary", "pcast")  # they change what an array varies over by its type


class _Table(NamedTuple):
    """A table inside the traced function, where it may have been cast."""

    path: str
    array: jax.Array
    dtype: Any


def evaluate(traced: Any, tables: dict[str, jax.Array], args: Sequence[Any], tap: Tap) -> list[Any]:
    """Evaluates a traced function, and calls ``tap`` for every gather of rows of a table.

    Args:
      traced: a ``ClosedJaxpr`` whose first inputs are the tables, in the order of ``tables``.
      tables: the tables, keyed by path.
      args: the other inputs.
      tap: see `Tap`. The ids are those of the rows read, and ``num_rows`` where no row is read.

    Returns:
      The flat outputs.

    Raises:
      ArgumentTypeError: a table is used for something else than a gather of rows.
      ArgumentValueError: a table is read inside another transformation, such as ``scan``.
    """
    inputs = [_Table(path, x, x.dtype) for path, x in tables.items()]
    outputs = _evaluate(traced.jaxpr, traced.consts, [*inputs, *args], tap)
    for x in outputs:
        if isinstance(x, _Table):
            raise dense_gradient(x.path)
    return outputs


def dense_gradient(path: str) -> ArgumentTypeError:
    """Returns the error about a table that is not read by gathering rows."""
    return ArgumentTypeError(
        "tables",
        "match arrays that are read row by row",
        path,
        sentence=f"rows.value_and_grad: the loss must read the table {path} as table[ids], by "
        f"jnp.take(jnp.asarray(table), ids, axis=0) or by a Flax Embed; anything else, such as "
        f"tied output embeddings (Embed.attend), has a dense gradient: leave it out of "
        f"{{argument}}",
    )


def read_inside(path: str) -> ArgumentValueError:
    """Returns the error about a table that is read inside another transformation."""
    return ArgumentValueError(
        "tables",
        "match arrays that are read outside of other transformations",
        path,
        sentence=f"rows.value_and_grad: the table {path} is read inside an inner scan, cond, vmap, "
        f"jit, checkpoint or grad, where its ids are not seen: gather outside of it",
    )


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], tap: Tap) -> list[Any]:
    variables = (*jaxpr.constvars, *jaxpr.invars)
    values: dict[Any, Any] = dict(zip(variables, (*consts, *args), strict=True))

    def read(x: Any) -> Any:
        return x.val if isinstance(x, jax.extend.core.Literal) else values[x]

    for equation in jaxpr.eqns:
        inputs = [read(x) for x in equation.invars]
        outputs = _apply(equation, inputs, tap)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _apply(equation: Any, inputs: list[Any], tap: Tap) -> list[Any]:
    """Returns the outputs of one operation."""
    primitive, params = equation.primitive, equation.params
    tables = [x for x in inputs if isinstance(x, _Table)]
    if not tables:
        with equation.ctx.manager:
            outputs = primitive.bind(*inputs, **primitive.get_bind_params(params))
        return list(outputs) if primitive.multiple_results else [outputs]
    table = tables[0]
    if primitive.name in ("jit", "pjit"):
        inner = params["jaxpr"]
        return _evaluate(inner.jaxpr, inner.consts, inputs, tap)
    if any(hasattr(x, "eqns") or hasattr(x, "jaxpr") for x in jax.tree.leaves(params)):
        raise read_inside(table.path)
    if primitive.name == "convert_element_type":
        return [table._replace(dtype=params["new_dtype"])]
    if primitive.name in _COPIES:
        return inputs
    if primitive.name in _CASTS_OF_MESH_AXES:
        outputs = primitive.bind(table.array, **params)
        (array,) = outputs if primitive.multiple_results else [outputs]
        return [table._replace(array=array)]
    if primitive.name != "gather" or inputs[0] is not table or len(tables) > 1:
        raise dense_gradient(table.path)
    if not _gathers_rows(table, inputs[1], params):
        raise dense_gradient(table.path)
    with equation.ctx.manager:
        rows = primitive.bind(table.array, inputs[1], **params)
    ids, num_rows = inputs[1][..., 0], len(table.array)
    if params["mode"] == GatherScatterMode.CLIP:
        ids = jnp.clip(ids, 0, num_rows - 1)
    return [tap(table.path, in_range(ids, num_rows), rows).astype(table.dtype)]


def _gathers_rows(table: _Table, indices: jax.Array, params: Any) -> bool:
    """Whether a gather reads whole rows, one for each index, with the axes of a row last."""
    numbers, shape = params["dimension_numbers"], table.array.shape
    axes = range(indices.ndim - 1, indices.ndim + len(shape) - 2)
    return (
        tuple(numbers.offset_dims) == tuple(axes)
        and tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(numbers.start_index_map) == (0,)
        and not numbers.operand_batching_dims
        and tuple(params["slice_sizes"]) == (1, *shape[1:])
    )
