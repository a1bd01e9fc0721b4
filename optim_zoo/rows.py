"""The gradient of a few rows of a table, and steps that touch those rows alone.

An embedding table of a million rows of which a batch reads eight thousand has a gradient that is
zero almost everywhere. `value_and_grad` gives the rows that are not, as `SparseRows`; `lazy_adam`
moves those rows and their moments; `apply_updates` adds them to the table, in place where the
table is donated::

    def loss_fn(params, batch):
        x = params["embed"][batch["ids"]]  # the gather that is seen
        ...

    loss, grads = rows.value_and_grad(loss_fn, ["^embed$"])(params, batch)
    updates, state = tx.update(grads, state, params)
    params = optim_zoo.apply_updates(params, updates)
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.extend.core
import jax.extend.random
import jax.numpy as jnp
import numpy as np

from optim_zoo import rules
from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.tree import (
    Tree,
    by_path,
    is_partial,
    leaf_paths,
    leaves_with_path,
    map_with_path,
    varying_axes,
    wide,
    wide_dtype,
)

_HINT = "only optim_zoo's pieces and optim_zoo.apply_updates take SparseRows; or use to_dense()"


def _no_randomness(*_: Any, **__: Any) -> NoReturn:
    raise TypeError(f"the ids of SparseRows are no random keys: {_HINT}")


# JAX has one kind of array that no arithmetic reaches, that of random keys. Ids travel as such,
# so that a foreign transformation that scales, clips, adds or sums every leaf raises instead of
# changing them in silence. The tag stands in JAX's own error messages.
_OPAQUE = jax.extend.random.define_prng_impl(
    key_shape=(1,),
    seed=_no_randomness,
    split=_no_randomness,
    random_bits=_no_randomness,
    fold_in=_no_randomness,
    name="sparse_rows_ids",
    tag=f"ids of SparseRows: {_HINT}",
)


@jax.tree_util.register_pytree_with_keys_class
class SparseRows:
    """Rows of an array of which all other rows are zero; rows of the same id add up.

    It crosses ``jit``, ``scan`` and ``shard_map`` like any tree, but arithmetic on its leaves
    raises: mostly ``TypeError``; of JAX's own exceptions, outside ``jit``, also
    ``NotImplementedError``. A foreign ``zeros_like`` leaves padding only. `to_dense` is what a
    piece that does not know rows can take.

    Attributes:
      ids: (n,), int32: which rows, in any order. ``num_rows`` is padding. An id that is known
        only while traced cannot be checked: one outside [0, num_rows] becomes padding.
      rows: (n, ...), the rows.
      num_rows: rows of the whole array.
    """

    __array_ufunc__ = None  # NumPy leaves arithmetic to the methods below

    def __init__(
        self, ids: jax.typing.ArrayLike, rows: jax.typing.ArrayLike, num_rows: int
    ) -> None:
        """Raises ``TypeError`` or ``ValueError`` where the three do not fit one another."""
        if isinstance(num_rows, bool) or not isinstance(num_rows, (int, np.integer)):
            raise ArgumentTypeError("num_rows", "be a whole number", num_rows, caller="SparseRows")
        if not 0 <= num_rows < 2**31:
            raise ArgumentValueError("num_rows", "be in [0, 2**31)", num_rows, caller="SparseRows")
        ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
        rows = rows if isinstance(rows, jax.Array) else np.asarray(rows)
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ArgumentTypeError("ids", "be integers", ids.dtype, caller="SparseRows")
        if ids.ndim != 1 or rows.ndim < 1 or len(ids) != len(rows):
            raise ArgumentValueError(
                "ids",
                "have shape (n,) and rows (n, ...)",
                ids.shape,
                sentence=f"SparseRows: {{argument}} must have shape (n,) and rows (n, ...), got "
                f"{ids.shape} and {rows.shape}",
                related=["rows"],
            )
        if not isinstance(ids, jax.core.Tracer):
            values = np.asarray(ids)
            wrong = values[(values < 0) | (values > num_rows)]
            if wrong.size:
                raise ArgumentValueError(
                    "ids",
                    f"be in [0, {num_rows}], {num_rows} being padding",
                    int(wrong[0]),
                    sentence=f"SparseRows: {{argument}} must be in [0, {num_rows}], {num_rows} "
                    f"being padding, got {wrong[0]}",
                    related=["num_rows"],
                )
        # Counted from the end, so that zeros are padding.
        stored = num_rows - _in_range(ids, num_rows)
        self._ids = jax.random.wrap_key_data(stored.view(jnp.uint32)[:, None], impl=_OPAQUE)
        self.rows = jnp.asarray(rows)
        self.num_rows = int(num_rows)

    @property
    def ids(self) -> jax.Array:
        """(n,), int32."""
        return self.num_rows - jax.random.key_data(self._ids)[..., 0].view(jnp.int32)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array."""
        return (self.num_rows, *self.rows.shape[1:])

    @property
    def dtype(self) -> jnp.dtype:
        """Of the rows."""
        return self.rows.dtype

    def with_rows(self, rows: jax.Array) -> "SparseRows":
        """Other rows under the same ids."""
        return self.tree_unflatten(self.num_rows, (rows, self._ids))

    def to_dense(self) -> jax.Array:
        """The whole array, zeros included."""
        return jnp.zeros(self.shape, self.dtype).at[self.ids].add(self.rows, mode="drop")

    def merged(self) -> "SparseRows":
        """The same with every id once, in rising order, then padding; n stays what it was.

        Rows of the same id are added in float32 or wider, those of padding become zero.
        """
        n = len(self.rows)
        ids, in_order = self.ids, jnp.sort(self.ids)
        # Two sorts of ids alone, and a search: on a CPU half the time of one that moves places too.
        unique = jnp.sort(jnp.where(jnp.diff(in_order, prepend=-1) == 0, self.num_rows, in_order))
        place = jnp.where(ids == self.num_rows, n, jnp.searchsorted(unique, ids))
        rows = jax.ops.segment_sum(wide(self.rows), place, num_segments=n)
        return SparseRows(unique, rows, self.num_rows)

    def __repr__(self) -> str:
        ids, rows = (getattr(leaf, "shape", leaf) for leaf in (self._ids, self.rows))
        return f"SparseRows(ids={ids}, rows={rows}, num_rows={self.num_rows})"

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError(f"SparseRows has no arithmetic: {_HINT}")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __neg__ = __jax_array__ = __array__ = _refuse

    def tree_flatten_with_keys(self) -> tuple[tuple[Any, Any], int]:
        """The leaves are the rows and the opaque ids."""
        key = jax.tree_util.GetAttrKey
        return ((key("rows"), self.rows), (key("ids"), self._ids)), self.num_rows

    def tree_flatten(self) -> tuple[tuple[Any, Any], int]:
        """As `tree_flatten_with_keys`, without keys."""
        return (self.rows, self._ids), self.num_rows

    @classmethod
    def tree_unflatten(cls, num_rows: int, children: Sequence[Any]) -> "SparseRows":
        """Checks nothing: while JAX handles trees, leaves may be anything."""
        made = object.__new__(cls)
        made.rows, made._ids = children
        made.num_rows = num_rows
        return made


def _in_range(ids: Any, num_rows: int) -> jax.Array:
    """The ids in int32, those outside [0, num_rows] made padding before they are narrowed."""
    xp: Any = jnp if isinstance(ids, jax.Array) else np
    ids = xp.asarray(ids)
    ids = ids.astype(np.int32) if ids.dtype.itemsize < 4 else ids
    return jnp.asarray(xp.where((ids < 0) | (ids > num_rows), num_rows, ids), jnp.int32)


def is_sparse(x: Any) -> bool:
    """Whether ``x`` is `SparseRows`: ``is_leaf`` of every map over gradients."""
    return isinstance(x, SparseRows)


def on_rows(function: Callable[..., jax.Array], u: Any, *rest: Any) -> Any:
    """``function`` of an array, or of the rows of `SparseRows`."""
    return u.with_rows(function(u.rows, *rest)) if is_sparse(u) else function(u, *rest)


def summed(tree: Tree) -> Tree:
    """``tree`` with the rows of `SparseRows` in their place, those of the same id added up."""
    return jax.tree.map(lambda x: x.merged().rows if is_sparse(x) else x, tree, is_leaf=is_sparse)


def check_updates(piece: str, updates: Tree, like: Tree, *, sparse: bool = False) -> None:
    """Raises unless ``updates`` is a tree like ``like``, leaf by leaf of the same shape.

    Args:
      piece: who asks, for the message.
      updates: gradients or what a chain made of them.
      like: the parameters, or state that is like them.
      sparse: whether the piece takes `SparseRows`.

    Raises:
      ValueError: a leaf is missing or has another shape; its path and both shapes are named.
      TypeError: a leaf is not real and floating-point, or `SparseRows` reached a piece that does
        not take it.
    """
    given = leaves_with_path(updates, is_leaf=is_sparse)
    if not sparse:
        for path, u in given:
            if is_sparse(u):
                advice = "use lazy_adam for it (optax.partition), or its to_dense()"
                raise ArgumentTypeError(
                    "updates",
                    "be arrays",
                    u,
                    advice,
                    sentence=f"{piece} takes no SparseRows, which the gradient of {path} is: "
                    f"{advice}",
                )
    structure: Any = jax.tree.structure(updates, is_leaf=is_sparse)
    try:
        expected = structure.flatten_up_to(like)
    except (ValueError, TypeError, KeyError):
        expected = None
    if expected is None or len(expected) != len(jax.tree.leaves(like, is_leaf=is_sparse)):
        ours, theirs = leaf_paths(like), [path for path, _ in given]
        apart = sorted(set(ours) ^ set(theirs))
        what = f"they differ at {', '.join(apart[:5])}" if apart else "their containers differ"
        raise ArgumentValueError(
            "updates",
            "be a tree like the parameters",
            apart,
            sentence=f"{piece}: gradients must be a tree like the parameters; {what}",
            related=["params"],
        )
    for (path, u), x in zip(given, expected, strict=True):
        if not jax.tree_util.all_leaves([x], is_sparse) and not is_partial(x):
            name, kind = path or "the parameter", type(x).__name__
            raise ArgumentValueError(
                "updates",
                "be a tree like the parameters",
                type(u).__name__,
                sentence=f"{piece}: gradients must be a tree like the parameters; that of {name} "
                f"is an array, its parameter is in a {kind}",
                related=["params"],
            )
        dtype = u.dtype if is_sparse(u) else jnp.result_type(u)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ArgumentTypeError(
                "updates",
                "be real and floating-point",
                dtype,
                sentence=f"{piece}: gradients must be real and floating-point, that of "
                f"{path or 'the parameter'} has dtype {dtype}",
            )
        if jnp.shape(u) != jnp.shape(x) and not is_partial(x):
            raise ArgumentValueError(
                "updates",
                "have the shapes of the parameters",
                jnp.shape(u),
                sentence=f"{piece}: the gradient of {path or 'the parameter'} has shape "
                f"{jnp.shape(u)}, its parameter {jnp.shape(x)}",
                related=["params"],
            )


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """``params + updates``, where a leaf of ``updates`` may be `SparseRows`.

    Dense leaves are added as by ``optax.apply_updates``. Rows are added to the rows of their
    table, and nothing else of it is touched: in place under ``jit`` where ``params`` is donated.

    Raises:
      ValueError: a leaf of ``updates`` has another shape than its parameter.
    """
    structure: Any = jax.tree.structure(params, is_leaf=lambda x: x is None)
    check_updates("apply_updates", updates, params, sparse=True)

    def add(x: jax.Array | None, u: Any) -> jax.Array | None:
        if x is None or u is None:
            return x
        x = jnp.asarray(x)
        if not is_sparse(u):
            return (x + u).astype(x.dtype)
        if u.dtype == x.dtype == wide_dtype(x):
            return x.at[u.ids].add(u.rows, mode="drop")
        # In the wider dtype first, then rounded once.
        u = u.merged()
        moved = (x.at[u.ids].get(mode="clip") + u.rows).astype(x.dtype)
        return x.at[u.ids].set(moved, mode="drop")

    leaves = zip(structure.flatten_up_to(params), structure.flatten_up_to(updates), strict=True)
    return structure.unflatten([add(x, u) for x, u in leaves])


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
        ids = _in_range(ids, len(self))
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
