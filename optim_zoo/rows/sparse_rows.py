"""`SparseRows`: a few rows of an array all of whose other rows are zero."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np

from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.tree import Tree, array, wide

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
    """Rows of an array whose other rows are all zero; rows with the same id are added.

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
        stored = num_rows - in_range(ids, num_rows)
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


def in_range(ids: Any, num_rows: int) -> jax.Array:
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
    """Returns the arrays whose norms are the norms of the leaves of ``tree``.

    These are the rows of `SparseRows`, with those of the same id added; zeros for a leaf of dtype
    float0, which the gradient of an integer parameter has; and the other leaves unchanged.
    """

    def of_leaf(x: Any) -> Any:
        if is_sparse(x):
            return x.merged().rows
        if getattr(x, "dtype", None) == jax.dtypes.float0:
            return jnp.zeros(x.shape)
        return array(x)

    return jax.tree.map(of_leaf, tree, is_leaf=is_sparse)
