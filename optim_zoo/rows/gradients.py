"""`value_and_grad`, whose gradient of a table has only the rows that the loss has read."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from optim_zoo import rules
from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.rows.sparse_rows import SparseRows, in_range
from optim_zoo.tree import Tree, by_path, map_with_path, varying_axes


class Table:
    """What the loss of `value_and_grad` gets in place of a table: index it with integer ids.

    ``table[ids]`` gathers rows, shape ``ids.shape + row shape``; a row of an id outside
    [0, num_rows) is zero and has no gradient.
    """

    def __init__(
        self, path: str, table: jax.Array, tap: Callable[[str, jax.Array, jax.Array], jax.Array]
    ) -> None:
        self._path, self._table, self._tap = path, table, tap
        self.shape, self.dtype, self.ndim = table.shape, table.dtype, table.ndim

    def __getitem__(self, ids: Any) -> jax.Array:
        if not isinstance(ids, (int, np.integer, np.ndarray, jax.Array)) or not jnp.issubdtype(
            jnp.result_type(ids), jnp.integer
        ):
            raise ArgumentTypeError(
                "ids",
                "be an array of integers",
                ids,
                sentence=f"rows.value_and_grad: the table {self._path} is read by an array of "
                f"integer ids, got {ids!r}",
            )
        ids = in_range(ids, len(self))
        rows = self._table.at[ids].get(mode="fill", fill_value=0)
        return self._tap(self._path, ids, rows)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise TypeError(
            f"rows.value_and_grad: the loss must read the table {self._path} as table[ids]; "
            f"anything else has a dense gradient"
        )

    # Properties, since JAX and NumPy ask only whether an object has the first two.
    __jax_array__ = __array__ = T = astype = at = property(_refuse)


def value_and_grad(
    loss_fn: Callable[..., Any], tables: rules.Patterns, *, has_aux: bool = False
) -> Callable[..., tuple[Any, Tree]]:
    """As ``jax.value_and_grad(loss_fn)``, with `SparseRows` for the gradients of ``tables``.

    In ``loss_fn(params, ...)`` the tables are read by ``params["embed"][ids]``, with ids of any
    shape and any number of times. No array of a table's size is made: what is differentiated is
    the gathered rows. The gather has to stand in ``loss_fn`` itself, not inside an inner ``scan``,
    ``cond``, ``vmap``, ``jit``, ``checkpoint`` or ``grad``, where its ids are not seen. A table
    that is read in another way, such as ``x @ table.T``, has a dense gradient. Both raise.

    Under ``shard_map`` the rows are the device's own share, whatever is summed for other leaves;
    to add those of all devices is to gather them::

        jax.tree.map(lambda x: jax.lax.all_gather(x, "data", tiled=True), grads["embed"])

    Args:
      loss_fn: ``(params, *args, **kwargs) -> loss``, or ``(loss, aux)``.
      tables: path patterns of leaves of ``params`` that are tables.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.

    Returns:
      A function of the arguments of ``loss_fn`` that returns ``(loss, gradients)``, or
      ``((loss, aux), gradients)``.

    Raises:
      ValueError: a pattern matches no leaf of ``params``, or one that has no rows; or a table is
        read inside an inner transformation.
      TypeError: a table is read in another way than by integer ids.
    """
    rules.check_patterns("tables", tables)

    @functools.wraps(loss_fn)
    def with_grad(params: Tree, *args: Any, **kwargs: Any) -> tuple[Any, Tree]:
        rules.check_matches("tables", tables, params)
        is_table = rules.mask(tables, params)
        arrays = {  # the tables
            path: jnp.asarray(x)
            for path, x in by_path(params).items()
            if rules.matches(tables, path)
        }
        reads: list[str] = []  # the path of each read, in order

        def loss(dense: Tree, taps: Sequence[jax.Array] | None) -> tuple[jax.Array, Any]:
            reads.clear()
            ids_read, rows_read = [], []
            outer = jax.extend.core.get_opaque_trace_state()

            def tap(path: str, ids: jax.Array, rows: jax.Array) -> jax.Array:
                if jax.extend.core.get_opaque_trace_state() != outer:
                    raise ValueError(
                        f"rows.value_and_grad: the table {path} is read inside an inner scan, "
                        f"cond, vmap, jit, checkpoint or grad, where its ids are not seen: "
                        f"gather outside of it"
                    )
                reads.append(path)
                ids_read.append(ids)
                rows_read.append(rows)
                return rows if taps is None else rows + taps[len(reads) - 1]

            def as_seen(path: str, table: bool, x: Any) -> Any:
                return Table(path, arrays[path], tap) if table else x

            result = loss_fn(map_with_path(as_seen, is_table, dense), *args, **kwargs)
            value, aux = result if has_aux else (result, None)
            return value, (aux, ids_read, rows_read)

        def without_table(path: str, table: bool, x: Any) -> Any:
            if table and arrays[path].ndim == 0:
                raise ArgumentValueError(
                    "tables",
                    "match arrays of at least one axis",
                    path,
                    sentence=f"rows.value_and_grad: {path} has no rows, its shape is ()",
                )
            # None would change the structure; a zero of no size does not.
            return jnp.zeros((), arrays[path].dtype) if table else x

        dense = map_with_path(without_table, is_table, params)
        _, (_, _, like) = jax.eval_shape(lambda dense: loss(dense, None), dense)
        # Like the rows, also in the mesh axes they vary over: else JAX sums their gradients.
        taps = [jnp.zeros_like(rows) for rows in like]
        (value, (aux, ids_read, _)), (dense_grads, row_grads) = jax.value_and_grad(
            loss, argnums=(0, 1), has_aux=True
        )(dense, taps)

        axes = varying_axes(value).union(*map(varying_axes, row_grads))

        def own_share(r: jax.Array) -> jax.Array:
            # Of ids that are the same on all devices, JAX has summed the gradient.
            summed = tuple(sorted(axes - varying_axes(r)))
            if not summed:
                return r
            return jax.lax.pcast(r / jax.lax.axis_size(summed), summed, to="varying")

        def gradient(path: str, table: bool, g: jax.Array) -> Any:
            if not table:
                return g
            x = arrays[path]
            ids, rows = [jnp.zeros(0, jnp.int32)], [jnp.zeros((0, *x.shape[1:]), x.dtype)]
            for read, i, r in zip(reads, ids_read, row_grads, strict=True):
                if read == path:
                    ids.append(i.reshape(-1))
                    rows.append(own_share(r).reshape(-1, *x.shape[1:]))
            return SparseRows(jnp.concatenate(ids), jnp.concatenate(rows), len(x))

        grads = map_with_path(gradient, is_table, dense_grads)
        return ((value, aux) if has_aux else value), grads

    return with_grad
