"""`value_and_grad`, whose gradient of a table has only the rows that the loss reads."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from optim_zoo import rules
from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.rows.gathers import Tap, dense_gradient, evaluate, read_inside
from optim_zoo.rows.sparse_rows import SparseRows, in_range
from optim_zoo.tree import Tree, by_path, map_with_path, varying_axes


class Table:
    """What the loss of `value_and_grad` receives in place of a table.

    ``table[ids]``, with integer ids of any shape, gathers rows: an array of shape
    ``ids.shape + row shape``. The row of an id outside [0, num_rows) is zero and has no gradient.
    ``jnp.asarray(table)`` and ``table[...]`` return an array, from which JAX's functions may gather
    rows: ``jnp.take(jnp.asarray(table), ids, axis=0)``. Ids outside the table then mean what they
    mean in JAX.

    Attributes:
      shape: the shape of the table.
      dtype: its dtype.
      ndim: the number of its axes.
    """

    def __init__(
        self, path: str, table: jax.Array, tap: Tap, as_array: Callable[[str], jax.Array]
    ) -> None:
        self._path, self._table, self._tap, self._as_array = path, table, tap, as_array
        self.shape, self.dtype, self.ndim = table.shape, table.dtype, table.ndim

    def __getitem__(self, ids: Any) -> jax.Array:
        if ids is Ellipsis:  # as `nnx.Embed` reads its variable
            return self.__jax_array__()
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

    def __jax_array__(self) -> jax.Array:
        return self._as_array(self._path)

    def _refuse(self) -> NoReturn:
        raise dense_gradient(self._path)

    # Properties, because NumPy asks only whether an object has the first one.
    __array__ = T = astype = at = property(_refuse)


def value_and_grad(
    loss_fn: Callable[..., Any], tables: rules.Patterns, *, has_aux: bool = False
) -> Callable[..., tuple[Any, Tree]]:
    """Returns ``jax.value_and_grad(loss_fn)`` with `SparseRows` as the gradients of ``tables``.

    In ``loss_fn``, the rows of a table are read any number of times, with ids of any shape, by

    - ``params["embed"][ids]``, where the row of an id outside [0, num_rows) is zero and has no
      gradient;
    - ``nn.Embed`` and ``nnx.Embed`` of Flax, also with a ``dtype``;
    - ``jnp.take(jnp.asarray(params["embed"]), ids, axis=0)``, in all of its modes.

    The gathered rows are differentiated, and no array of the size of a table is made. The rows must
    not be read inside an inner ``scan``, ``cond``, ``checkpoint`` or ``grad``, where the ids cannot
    be returned; ``table[ids]`` not inside ``vmap`` or ``jit`` either. A table that is used in
    another way, such as ``x @ table.T`` or ``Embed.attend`` (tied output embeddings), has a dense
    gradient, and is refused.

    Under ``shard_map`` the rows are those of one device, even where JAX sums the gradients of other
    leaves over the devices. Gather them to have the rows of all devices::

        jax.tree.map(lambda x: jax.lax.all_gather(x, "data", tiled=True), grads["embed"])

    Args:
      loss_fn: a function ``(params, *args, **kwargs) -> loss`` or, with ``has_aux``,
        ``(loss, aux)``. The loss is a scalar. It receives a `Table` in place of each table.
      tables: path patterns of the leaves of ``params`` that are tables: arrays of one or more axes.
        The loss indexes the first axis.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.

    Returns:
      A function of the arguments of ``loss_fn`` that returns ``(loss, gradients)``, or
      ``((loss, aux), gradients)``. The gradients have the structure of ``params``.

    Raises:
      ArgumentValueError: a pattern matches no leaf of ``params``, or one without rows; or a table
        is read inside an inner transformation.
      ArgumentTypeError: a table is used for something else than a gather of rows.

    Example:
      ::

        def loss_fn(params, ids):
            return jnp.mean(model.apply(params, ids) ** 2)  # a model with an nn.Embed

        loss, grads = rows.value_and_grad(loss_fn, ["embedding$"])(params, ids)
        updates, state = lazy_adam(1e-3).update(grads, state, params)
        params = optim_zoo.apply_updates(params, updates)
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

        as_arrays: set[str] = set()  # the paths of the tables that the loss uses as arrays

        def loss(dense: Tree, taps: Sequence[jax.Array] | None) -> tuple[jax.Array, Any]:
            reads.clear()

            def with_tap(path: str, rows: jax.Array) -> jax.Array:
                reads.append(path)
                return rows if taps is None else rows + taps[len(reads) - 1]

            def seen(inputs: dict[str, jax.Array], dense: Tree) -> tuple[Any, ...]:
                ids_read, rows_read = [], []
                outer = jax.extend.core.get_opaque_trace_state()

                def tap(path: str, ids: jax.Array, rows: jax.Array) -> jax.Array:
                    if jax.extend.core.get_opaque_trace_state() != outer:
                        raise read_inside(path)
                    ids_read.append(ids)
                    rows_read.append(rows)
                    return with_tap(path, rows)

                def as_array(path: str) -> jax.Array:
                    as_arrays.add(path)
                    return inputs[path]

                def as_seen(path: str, table: bool, x: Any) -> Any:
                    return Table(path, arrays[path], tap, as_array) if table else x

                result = loss_fn(map_with_path(as_seen, is_table, dense), *args, **kwargs)
                value, aux = result if has_aux else (result, None)
                return value, aux, ids_read, rows_read

            if not as_arrays:
                value, aux, ids_read, rows_read = seen(arrays, dense)
                return value, (aux, ids_read, rows_read)

            inputs = dict(sorted(arrays.items()))  # the order in which JAX flattens a dict
            traced, shapes = jax.make_jaxpr(seen, return_shape=True)(inputs, dense)
            ids_gathered, rows_gathered = [], []

            def tap_gathered(path: str, ids: jax.Array, rows: jax.Array) -> jax.Array:
                ids_gathered.append(ids)
                rows_gathered.append(rows)
                return with_tap(path, rows)

            outputs = evaluate(traced, inputs, jax.tree.leaves(dense), tap_gathered)
            structure: Any = jax.tree.structure(shapes)
            value, aux, ids_read, rows_read = structure.unflatten(outputs)
            return value, (aux, ids_read + ids_gathered, rows_read + rows_gathered)

        def without_table(path: str, table: bool, x: Any) -> Any:
            if table and arrays[path].ndim == 0:
                raise ArgumentValueError(
                    "tables",
                    "match arrays of at least one axis",
                    path,
                    sentence=f"rows.value_and_grad: {path} has no rows, its shape is ()",
                )
            # None would change the structure of the tree; a scalar keeps it.
            return jnp.zeros((), arrays[path].dtype) if table else x

        dense = map_with_path(without_table, is_table, params)
        _, (_, _, like) = jax.eval_shape(lambda dense: loss(dense, None), dense)
        if as_arrays:  # now that this is known, the gathers from these arrays are found too
            _, (_, _, like) = jax.eval_shape(lambda dense: loss(dense, None), dense)
        # They vary over the same mesh axes as the rows; else JAX would sum their gradients.
        taps = [jnp.zeros_like(rows) for rows in like]
        (value, (aux, ids_read, _)), (dense_grads, row_grads) = jax.value_and_grad(
            loss, argnums=(0, 1), has_aux=True
        )(dense, taps)

        axes = varying_axes(value).union(*map(varying_axes, row_grads))

        def of_device(r: jax.Array) -> jax.Array:
            # Where the ids are the same on all devices, JAX has summed the gradient over them.
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
                    rows.append(of_device(r).reshape(-1, *x.shape[1:]))
            return SparseRows(jnp.concatenate(ids), jnp.concatenate(rows), len(x))

        grads = map_with_path(gradient, is_table, dense_grads)
        return ((value, aux) if has_aux else value), grads

    return with_grad
