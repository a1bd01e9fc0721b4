"""The gradient noise scale, measured from the micro-batches of each step (arXiv 1812.06162).

A step takes the mean of the gradients ``g_i`` of ``n`` micro-batches with weights ``w_i``, where
``W = sum(w_i)`` and ``gbar = sum(w_i g_i) / W``. With ``Sigma``, the covariance of the gradient of
one unit of weight, and ``G``, the expected gradient, two estimates are unbiased::

    tr(Sigma) = (sum(w_i |g_i|^2) - W |gbar|^2) / (n - 1)
    |G|^2     = |gbar|^2 - tr(Sigma) / W

The noise scale is ``tr(Sigma) / |G|^2``, in units of the weights. The ratio of two noisy numbers is
biased, so it is the ratio of their exponential averages. Both averages start at 0 and have the same
decay, so their factors ``1 - decay^steps`` cancel, and the ratio needs no bias correction.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo.errors import ArgumentValueError
from optim_zoo.layers import mesh_axes, norms
from optim_zoo.tree import Tree, map_with_path, promoting


class Spread(NamedTuple):
    """Sums over the micro-batches of a step that have a positive weight and are not left out."""

    micro_batches: jax.Array  # (), float32: their number n
    weight: jax.Array  # (), float32: sum of w
    squares: jax.Array  # (), float32: sum of w |g|^2

    @classmethod
    def zero(cls) -> "Spread":
        """Returns the sums over no micro-batch."""
        return cls(_zero(), _zero(), _zero())

    @classmethod
    def of(cls, weight: jax.Array, square: jax.Array) -> "Spread":
        """Returns what one micro-batch adds.

        Args:
          weight: ``w``, ().
          square: ``|g|^2`` of its mean gradient, ().
        """
        counts = weight > 0
        # Selected, because NaN * 0 is NaN.
        return cls(
            micro_batches=counts.astype(jnp.float32),
            weight=jnp.where(counts, weight, 0).astype(jnp.float32),
            squares=jnp.where(counts, weight * square, 0).astype(jnp.float32),
        )


def _square(tree: Tree, axis_name: mesh_axes.AxisName) -> jax.Array:
    norm = norms.global_norm(tree, axis_name, whole_range=False)  # its square is float32, too
    return jnp.square(norm.astype(jnp.float32))


def spread_of(
    gradient: Tree, weight: jax.Array, params: Tree | None, axis_name: mesh_axes.AxisName
) -> Spread:
    """Returns what one micro-batch adds, whose gradient may be sharded inside a mapped function.

    Args:
      gradient: the mean gradient of the micro-batch.
      weight: its weight, ().
      params: the parameters, with whose types those of the gradient are compared; or None.
      axis_name: the mesh axes that leaves are sharded over, in addition to those in their types.

    Raises:
      ArgumentValueError: the type of a leaf shows that it differs between devices that hold the
        same parameter. Its square would be added up over them.
    """
    if params is not None:
        map_with_path(mesh_axes.check_averaged, gradient, params)
    return Spread.of(weight, _square(gradient, axis_name))


class NoiseScaleState(NamedTuple):
    """State of the gradient noise scale, around the state of an optimizer.

    `optim_zoo.accumulation.accumulate` and `optim_zoo.sharding.data_parallel` keep it with
    ``noise_scale=True``, and `optim_zoo.metrics.read` reads it.
    """

    spread: Spread  # of the micro-batches since the last step, or of the last step
    trace: jax.Array  # (), float32: exponential average of the estimates of tr(Sigma)
    squared_norm: jax.Array  # (), float32: exponential average of the estimates of |G|^2
    inner: optax.OptState

    @property
    def noise_scale(self) -> jax.Array:
        """The noise scale, ``tr(Sigma) / |G|^2``: (), float32; see `optim_zoo.metrics.read`."""
        return ratio(self.trace, self.squared_norm)


def noise_scale_states(state: Tree) -> list[NoiseScaleState]:
    """Returns the outermost states of noise scales in ``state``."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, NoiseScaleState))
    return [node for node in nodes if isinstance(node, NoiseScaleState)]


def with_noise_scale(
    inner: optax.GradientTransformationExtraArgs,
    decay: float,
    *,
    axis_name: mesh_axes.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns ``inner`` with the averages of the noise scale kept around its state.

    The caller writes the `Spread` of a step into the state before it calls ``update`` with the mean
    gradient. A step with fewer than two micro-batches, or whose estimates are not finite, leaves
    the averages unchanged.

    Args:
      inner: the optimizer. Its updates, and its part of the state, are unchanged.
      decay: the decay rate of both averages for each step, in [0, 1).
      axis_name: the mesh axes that leaves are sharded over, in addition to those in their types.
    """

    def init(params: Tree) -> NoiseScaleState:
        return NoiseScaleState(Spread.zero(), _zero(), _zero(), inner.init(params))

    @functools.wraps(inner.update)  # `data_parallel` passes the arguments in the signature of inner
    @promoting
    def update(
        updates: Tree, state: NoiseScaleState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, NoiseScaleState]:
        square = _square(updates, axis_name)
        trace, squared_norm = estimates(state.spread, square)
        counts = (state.spread.micro_batches > 1) & jnp.isfinite(trace) & jnp.isfinite(squared_norm)

        def averaged(average: jax.Array, estimate: jax.Array) -> jax.Array:
            return jnp.where(counts, decay * average + (1 - decay) * estimate, average)

        steps, inner_state = inner.update(updates, state.inner, params, **extra)
        return steps, NoiseScaleState(
            spread=state.spread,
            trace=averaged(state.trace, trace),
            squared_norm=averaged(state.squared_norm, squared_norm),
            inner=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _zero() -> jax.Array:
    return jnp.zeros((), jnp.float32)


def estimates(spread: Spread, square: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the unbiased estimates of ``tr(Sigma)`` and ``|G|^2`` from one step.

    Args:
      spread: sums over the ``n`` micro-batches of the step. For ``n`` below 2 the results mean
        nothing.
      square: ``|gbar|^2``, ().
    """
    # Rounding can make the difference negative, which the sum of w |g - gbar|^2 is not.
    difference = jnp.maximum(spread.squares - spread.weight * square, 0)
    trace = difference / jnp.maximum(spread.micro_batches - 1, 1)
    return trace, square - trace / jnp.where(spread.weight > 0, spread.weight, 1)


def ratio(trace: jax.Array, squared_norm: jax.Array) -> jax.Array:
    """Returns the noise scale, given the averages of ``tr(Sigma)`` and ``|G|^2``.

    The average of ``|G|^2`` may be 0 or negative where the gradient is lost in its noise. The noise
    scale is then infinite: larger than this many steps can measure. It is NaN before the first
    estimate, and where all gradients are 0.
    """
    measured = squared_norm > 0
    finite = trace / jnp.where(measured, squared_norm, 1)
    return jnp.where(measured, finite, jnp.where(trace > 0, jnp.inf, jnp.nan))


def one_micro_batch(advice: str) -> ArgumentValueError:
    """Returns the error about steps with a single micro-batch, whose gradient has no spread."""
    expected = "be False unless the gradient of a step is the mean of at least two that can differ"
    return ArgumentValueError("noise_scale", expected, True, advice)
