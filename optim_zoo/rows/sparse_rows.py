"""`SparseRows`: a few rows of an array whose other rows are zero."""

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
    raise TypeError(f"the ids of SparseRows are not random keys: {_HINT}")


# JAX has one kind of array without arithmetic: random keys. The ids are stored as random keys, so
# that a transformation of another library that scales or adds every leaf raises instead of
# changing them silently. The tag is shown in JAX's own error messages.
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
    """Some rows of an array whose other rows are zero; rows with the same id are added.

    It is a pytree that ``jit``, ``scan`` and ``shard_map`` accept. Arithmetic on its leaves raises
    ``TypeError`` or, outside ``jit``, sometimes JAX's ``NotImplementedError``. After ``zeros_like``
    of its leaves it consists of padding. For a transformation that does not accept `SparseRows`,
    use `to_dense`.

    Attributes:
      ids: (n,), int32: the index of each row, in any order. The id ``num_rows`` marks padding. A
        traced id cannot be checked: one outside [0, num_rows] becomes padding.
      rows: (n, ...), the rows.
      num_rows: the number of rows of the whole array, in [0, 2^31).

    Raises:
      ArgumentTypeError: ``ids`` are not integers, or ``num_rows`` is not a whole number.
      ArgumentValueError: the shapes of ``ids`` and ``rows`` do not fit each other, or a number is
        outside its range.

    Example:
      ::

        g = SparseRows(ids=[4, 1, 1], rows=jnp.ones((3, 2)), num_rows=6)
        g.to_dense()[1]  # [2., 2.]
    """

    __array_ufunc__ = None  # so that NumPy calls the methods below for arithmetic

    def __init__(
        self, ids: jax.typing.ArrayLike, rows: jax.typing.ArrayLike, num_rows: int
    ) -> None:
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
        # Ids are counted from the end, so that zeros are padding.
        stored = num_rows - in_range(ids, num_rows)
        self._ids = jax.random.wrap_key_data(stored.view(jnp.uint32)[:, None], impl=_OPAQUE)
        self.rows = jnp.asarray(rows)
        self.num_rows = int(num_rows)

    @property
    def ids(self) -> jax.Array:
        """The index of each row: (n,), int32."""
        return self.num_rows - jax.random.key_data(self._ids)[..., 0].view(jnp.int32)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole array."""
        return (self.num_rows, *self.rows.shape[1:])

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the rows."""
        return self.rows.dtype

    def with_rows(self, rows: jax.Array) -> "SparseRows":
        """Returns `SparseRows` of other rows, (n, ...), with the same ids."""
        return self.tree_unflatten(self.num_rows, (rows, self._ids))

    def to_dense(self) -> jax.Array:
        """Returns the whole array, including the rows that are zero."""
        return jnp.zeros(self.shape, self.dtype).at[self.ids].add(self.rows, mode="drop")

    def merged(self) -> "SparseRows":
        """Returns equal `SparseRows` in which every id occurs once.

        The ids are in ascending order and followed by padding; ``n`` does not change. Rows of the
        same id are added in float32 or wider. The rows of padding are zero.
        """
        n = len(self.rows)
        ids, in_order = self.ids, jnp.sort(self.ids)
        # On a CPU two sorts and a search take half the time of one sort with a payload.
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
        """Returns the leaves, which are the rows and the opaque ids, with their keys."""
        key = jax.tree_util.GetAttrKey
        return ((key("rows"), self.rows), (key("ids"), self._ids)), self.num_rows

    def tree_flatten(self) -> tuple[tuple[Any, Any], int]:
        """Returns the leaves without keys."""
        return (self.rows, self._ids), self.num_rows

    @classmethod
    def tree_unflatten(cls, num_rows: int, children: Sequence[Any]) -> "SparseRows":
        """Makes `SparseRows` without checks, because JAX puts placeholders into trees."""
        made = object.__new__(cls)
        made.rows, made._ids = children
        made.num_rows = num_rows
        return made


def in_range(ids: Any, num_rows: int) -> jax.Array:
    """Returns ids in int32; those outside [0, num_rows] become ``num_rows``, which is padding."""
    xp: Any = jnp if isinstance(ids, jax.Array) else np
    ids = xp.asarray(ids)
    ids = ids.astype(np.int32) if ids.dtype.itemsize < 4 else ids
    return jnp.asarray(xp.where((ids < 0) | (ids > num_rows), num_rows, ids), jnp.int32)


def is_sparse(x: Any) -> bool:
    """Returns whether ``x`` is `SparseRows`; pass it as ``is_leaf`` to map over gradients."""
    return isinstance(x, SparseRows)


def on_rows(function: Callable[..., jax.Array], u: Any, *rest: Any) -> Any:
    """Applies ``function`` to an array, or to the rows of `SparseRows`."""
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
