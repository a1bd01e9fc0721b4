"""Reads the metrics that are kept in the state of an optimizer."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.tree import Tree
from optim_zoo.wrappers.counters import SkippedMicroBatches, SkippedSteps, all_of, check_types
from optim_zoo.wrappers.metrics.state import PIECES, figures

_OF_ALL_LEAVES = ("gradient_norm", "clipped_gradient_norm", "gradient_noise_scale")


def read(state: Tree) -> dict[str, jax.Array]:
    """Returns the metrics of the last step that the pieces of an optimizer kept in its state.

    No array of the size of a parameter is read: a key is present where a piece of this library
    keeps the value.

    - ``learning_rate``: of the last step, (), float32.
    - ``gradient_norm``, ``clipped_gradient_norm``: the global norm before and after clipping, (),
      float32.
    - ``gradient_noise_scale``: with ``noise_scale=True`` in `accumulate` or `data_parallel`, see
      below, (), float32.
    - ``trust_ratio/<path>``: of each layer-adapted leaf, float32, (), or (layers,) where the leaf
      holds several layers.
    - ``parameter_norm/<path>``: before the step, in the same shape.
    - ``update_norm/<path>``: of the direction that the trust ratio scaled, in the same shape.
      `with_metrics` adds both norms of the other leaves, (), there of the whole update.
    - ``skipped_steps``: of all guards and accumulations since the start, (), int32.
    - ``skipped_micro_batches``: left out of a mean since the start, (), int32.

    **Gradient noise scale** (arXiv 1812.06162, equation 2.8). It is ``tr(Sigma) / |G|^2``, where
    ``G`` is the expected gradient and ``Sigma`` the covariance of the gradient of one example: the
    batch size up to which a larger batch saves nearly as many steps as it costs examples. From the
    ``n`` micro-batches of a step, with mean gradients ``g_i``, weights ``w_i``, ``W = sum(w_i)``
    and the mean ``gbar`` of the step, come two unbiased estimates::

        tr(Sigma) = (sum(w_i |g_i|^2) - W |gbar|^2) / (n - 1)
        |G|^2     = |gbar|^2 - tr(Sigma) / W

    The value is the ratio of their exponential averages. Both have the decay rate ``noise_decay``
    and start at 0, so that the bias of the start cancels. It is in units of the weights: examples
    or tokens where the weights count them; micro-batches, each with its size, where no weights are
    passed. It is NaN before the first estimate, and infinite where the average of ``|G|^2`` is not
    positive: the gradient is then too small for its noise to be measured by this many steps, and
    a larger ``noise_decay`` helps. It is measured in float32, for gradients whose norm is between
    1e-18 and 1e18, and before guards and clipping inside: a step that such a guard skips because
    of a spike counts, and one whose gradient is not finite does not.

    **Parameter groups.** Where several groups of ``optax.partition`` keep a learning rate, each is
    named by its label: ``learning_rate/<label>``, and ``learning_rate/<outer label>/<inner label>``
    where partitions are nested. A group that is made with ``optax.masked`` is named by its index in
    the chain: ``learning_rate/0`` and ``learning_rate/1`` in ``chain(masked(a, x), masked(b, y))``.
    A learning rate that is kept only once has no label. Gradient norms and noise scales of a
    group always have it, because they are not those of all parameters. The paths of leaves do not
    depend on groups.

    Args:
      state: The state of an optimizer, or any tree that holds one: a ``TrainState``, an
        ``nnx.Optimizer`` or its ``opt_state``. It may be traced, so that a jitted step can return
        the result. Where it is replicated for ``jax.pmap``, every value has a leading axis with one
        entry for each device.

    Returns:
      A dict with the keys above. Every value is an array.

    Raises:
      ArgumentValueError: The same value is kept twice and no group distinguishes the two, as in
        ``chain(lamb(1e-3), adamw(1e-3))``.
      ArgumentTypeError: ``state`` has lost its types, as in a checkpoint that was restored without
        a target, which `optim_zoo.saved_state.rebuild` repairs.
    """
    kept = list(figures(state))
    counts = {
        "skipped_steps": [skipped.total for skipped in all_of(SkippedSteps, state)],
        "skipped_micro_batches": [skipped.total for skipped in all_of(SkippedMicroBatches, state)],
    }
    if not kept and not any(counts.values()):
        check_types("metrics.read", state, [*PIECES, SkippedSteps])
    rates = sum(name == "learning_rate" for name, _, _ in kept)
    metrics: dict[str, jax.Array] = {}
    for name, group, value in kept:
        labelled = rates > 1 if name == "learning_rate" else name in _OF_ALL_LEAVES
        key = "/".join((name, *group)) if labelled else name
        if key in metrics:
            advice = "read each part of it alone"
            raise ArgumentValueError(
                "state",
                "hold every value once",
                key,
                advice,
                sentence=f"the {{argument}} holds several values of {key}: {advice}",
            )
        metrics[key] = value
    return metrics | {name: sum(x[1:], x[0]) for name, x in counts.items() if x}


def flat(metrics: Mapping[str, jax.typing.ArrayLike] | Tree) -> dict[str, float]:
    """Returns metrics as Python numbers, one for each key, as loggers take them.

    A value of several layers becomes one number for each of them, whose key ends with its index:
    ``trust_ratio/blocks/kernel[3]``, or ``[1,3]`` where the value has two axes, as in a state that
    is replicated for ``jax.pmap``. It runs on the host and waits for the values.

    Args:
      metrics: What `read` returned, with any other metrics of the step; or an optimizer state,
        which is read first.

    Returns:
      A dict of floats and ints.

    Raises:
      ArgumentTypeError: ``metrics`` is traced, or a value of it is not an array of numbers.

    Example:
      ```python
      logger.log(metrics.flat({"loss": loss, **metrics.read(state)}), step)
      ```
    """
    values = dict(metrics) if isinstance(metrics, Mapping) else read(metrics)
    numbers: dict[str, float] = {}
    for name, value in jax.device_get(_checked(values)).items():
        array = np.asarray(value)
        for index in np.ndindex(array.shape):
            suffix = f"[{','.join(map(str, index))}]" if index else ""
            numbers[f"{name}{suffix}"] = array[index].item()
    return numbers


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    expected = "hold arrays of numbers"
    for name, value in values.items():
        if isinstance(value, jax.core.Tracer):
            received = "a traced value"
            advice = "call it outside jit, on the metrics that the step returns"
        elif isinstance(value, int | float | np.number | np.ndarray | jax.Array):
            continue
        else:
            received, advice = type(value).__name__, "pass what metrics.read returns"
        raise ArgumentTypeError(
            "metrics",
            expected,
            value,
            advice,
            sentence=f"{{argument}} must {expected}, got {received} as {name}: {advice}",
        )
    return values
