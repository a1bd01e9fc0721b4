"""Square roots of sums of squares, where a square may not fit into float32.

The square of 2e19 is larger than any float32, and the square of 1e-23 is zero. The array is then
multiplied by a power of two before it is squared, and the root is divided by it. A power of two
changes no digit, so ordinary numbers give the same bits with and without it.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from optim_zoo.tree import root, wide_dtype

# (arrays, a factor for each of them or None) -> sums of (factor x)^2, one for each array or one for
# all of them. Factors and sums have shape () or (layers,).
Sums = Callable[[Sequence[jax.Array], Sequence[jax.Array] | None], list[jax.Array]]

# A sum of squares between these bounds lost nothing to underflow, and did not overflow.
LOW, HIGH = 1e-20, 3e38
# A sum below or above the bounds is computed again, with one of these factors.
ENLARGE, REDUCE = 2.0**80, 2.0**-80
# Where both sums are computed at once, the first is used unless it overflows. The second must then
# lose nothing to underflow, so that the two are closer.
ENLARGE_AT_ONCE, REDUCE_AT_ONCE = 2.0**60, 2.0**-40


def roots(sums: Sums, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns the square root of each of several sums of squares.

    In float32 and bfloat16 the roots are right for entries from 1e-28 to 1e25. A NaN stays NaN and
    infinity stays infinity. In float16 no square overflows in float32, and in float64 none of these
    entries overflows, so that nothing is done for them.

    On a CPU the sums are computed again, all of them in one branch, if one of them is out of
    bounds: a second sum would be a second pass over the array. Other devices compute two sums in
    one pass, because a branch would keep the sum from being part of a larger kernel. The condition
    of the branch is known after the sum over devices, so that all devices take the same branch.

    Args:
      sums: computes the sums. It may sum over mesh axes.
      arrays: any shapes; an argument of ``sums``.
    """
    if not any(_is_limited(x) for x in arrays):
        return [root(total) for total in sums(arrays, None)]
    if not any(isinstance(x, jax.core.Tracer) for x in arrays):
        plain = sums(arrays, None)
        # Inside jit, the sum of an array that is a constant is traced.
        if not any(isinstance(total, jax.core.Tracer) for total in plain):
            return _again(sums, arrays, plain) if _any_out_of_bounds(plain) else _plain(plain)
    return jax.lax.platform_dependent(
        *arrays,
        cpu=lambda *arrays: _with_branch(sums, [_with_own_conversion(x) for x in arrays]),
        default=lambda *arrays: _at_once(sums, arrays),
    )


def plain_roots(sums: Sums, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns the roots of sums that are computed once, right for entries from 1e-18 to 1e18.

    There is no branch, for which XLA on a CPU would write an array to memory that nothing else
    needs whole.

    Args:
      sums: as in `roots`.
      arrays: as in `roots`.
    """
    if not any(x.dtype == jnp.bfloat16 for x in arrays):
        return _plain(sums(arrays, None))
    return jax.lax.platform_dependent(
        *arrays,
        cpu=lambda *arrays: _plain(sums([_with_own_conversion(x) for x in arrays], None)),
        default=lambda *arrays: _plain(sums(arrays, None)),
    )


def _is_limited(x: jax.Array) -> bool:
    """Returns whether squares of entries of ``x`` can leave the range of the dtype of their sum."""
    return wide_dtype(x) == jnp.float32 and x.dtype != jnp.float16


def _with_branch(sums: Sums, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    plain = sums(arrays, None)
    return jax.lax.cond(
        _any_out_of_bounds(plain),
        lambda arrays, plain: _again(sums, arrays, plain),
        lambda arrays, plain: _plain(plain),
        arrays,
        plain,
    )


def _any_out_of_bounds(totals: Sequence[jax.Array]) -> jax.Array:
    return ~jnp.all(jnp.stack([jnp.all(_is_in_bounds(total)) for total in totals]))


def _is_in_bounds(total: jax.Array) -> jax.Array:
    return (total >= LOW) & (total < HIGH)


def _plain(totals: Sequence[jax.Array]) -> list[jax.Array]:
    return [root(total) for total in totals]


def _again(sums: Sums, arrays: Sequence[jax.Array], plain: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns the roots of the sums that are in bounds, and of new sums in place of the others."""
    factors = [
        jnp.where(total < LOW, jnp.asarray(ENLARGE, total.dtype), jnp.asarray(REDUCE, total.dtype))
        for total in plain
    ]
    # Without barriers, XLA writes a factor that several arrays share to memory as an array, and it
    # squares an array that is a constant before it multiplies.
    pairs = zip(arrays, _for_each(arrays, factors), strict=True)
    separate = [jax.lax.optimization_barrier(pair) for pair in pairs]
    new = sums([x for x, _ in separate], [factor for _, factor in separate])
    found = []
    for total, again, factor in zip(plain, new, factors, strict=True):
        in_bounds = _is_in_bounds(total)
        # The root comes last: the derivative of the root of an unused zero would be NaN.
        chosen = jnp.where(in_bounds, total, again)
        found.append(root(chosen) / jnp.where(in_bounds, jnp.ones_like(factor), factor))
    return found


def _at_once(sums: Sums, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns the roots of the sums of enlarged or of reduced entries, whichever is correct."""
    shapes = jax.eval_shape(lambda arrays: sums(arrays, None), arrays)
    enlarge, reduce = (
        [jnp.asarray(factor, total.dtype) for total in shapes]
        for factor in (ENLARGE_AT_ONCE, REDUCE_AT_ONCE)
    )
    enlarged = sums(arrays, _for_each(arrays, enlarge))
    reduced = sums(arrays, _for_each(arrays, reduce))
    found = []
    for i, (small, large) in enumerate(zip(enlarged, reduced, strict=True)):
        fits = small < HIGH
        chosen = jnp.where(fits, small, large)
        found.append(root(chosen) / jnp.where(fits, enlarge[i], reduce[i]))
    return found


def _for_each(arrays: Sequence[jax.Array], factors: list[jax.Array]) -> list[jax.Array]:
    """Returns a factor for each array, given one for all of them or one for each."""
    return factors * (len(arrays) // len(factors))


def _with_own_conversion(x: jax.Array) -> jax.Array:
    """Returns ``x``. On a CPU its conversion to float32 is not shared with other uses of it.

    An update reads a bfloat16 array twice, for its norm and then entry by entry. Where both share
    the conversion, XLA on a CPU writes the float32 array to memory, in LARS for the parameters and
    for the gradients at once. XLA removes the barrier, but only after it has looked for equal
    operations. Other devices fuse a shared conversion into each of its uses; there a barrier
    would prevent that.

    A barrier does not help float16, whose conversion XLA on a CPU never fuses into a sum.
    """
    return jax.lax.optimization_barrier(x) if x.dtype == jnp.bfloat16 else x
