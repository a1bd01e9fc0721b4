"""What a loss function returns: the mean loss or a `WeightedLoss`, with or without aux."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.tree import Tree

LossFn = Callable[[Tree, Tree], Any]
"""``loss_fn(params, batch)``; see `optim_zoo.sharding.data_parallel`."""

_RETURNED = "return the mean loss, a scalar, or sharding.WeightedLoss(total, weight)"
_RETURNED_WITH_AUX = (
    "return a pair (loss, aux) with has_aux=True, where loss is the mean loss, a scalar, or "
    "sharding.WeightedLoss(total, weight)"
)
_ADVICE = (
    "return sharding.WeightedLoss(total, weight) for a sum and its weight, or pass has_aux=True "
    "for a loss and auxiliary values"
)


class WeightedLoss(NamedTuple):
    """A loss whose examples have different weights, as masked tokens do.

    The mean loss is the sum of all totals divided by the sum of all weights, where both sums are
    over devices and micro-batches. A loss function computes both from the batch it is called with::

        def loss_fn(params, batch):
            losses = per_token_loss(params, batch)  # (batch, length)
            return WeightedLoss(jnp.sum(losses * batch["mask"]), jnp.sum(batch["mask"]))

    Where the sum of the weights is 0, loss and gradient are 0.

    Attributes:
      total: a scalar, the weighted sum of the losses of the batch.
      weight: a scalar, the sum of the weights of the batch, such as the number of masked tokens.
    """

    total: jax.Array
    weight: jax.Array


def loss_and_aux(value: Any, has_aux: bool) -> tuple[WeightedLoss, Tree]:
    """Returns the loss and aux of what a loss function returned; aux is None without ``has_aux``.

    A mean loss is returned with weight 1.

    Raises:
      ArgumentTypeError: ``value`` is of another type, such as a pair that is not a `WeightedLoss`.
      ArgumentValueError: the loss, its total or its weight is not a scalar.
    """
    if not has_aux:
        return _weighted(value, _RETURNED), None
    pair = isinstance(value, tuple | list) and not isinstance(value, WeightedLoss)
    if not pair or len(value) != 2:
        raise _type_error(_RETURNED_WITH_AUX, value)
    loss, aux = value
    return _weighted(loss, _RETURNED_WITH_AUX), aux


def _weighted(loss: Any, expected: str) -> WeightedLoss:
    is_weighted = isinstance(loss, WeightedLoss)
    if loss is None or (isinstance(loss, tuple | list | dict) and not is_weighted):
        raise _type_error(expected, loss)
    parts = loss if is_weighted else (loss, 1.0)
    for part in parts:
        if shape := jnp.shape(part):
            raise ArgumentValueError(
                "loss_fn",
                expected,
                shape,
                sentence=f"{{argument}} must {expected}, got an array of shape {shape}",
            )
    total, weight = (jnp.asarray(part, float) for part in parts)
    return WeightedLoss(total, weight)


def _type_error(expected: str, value: Any) -> ArgumentTypeError:
    """Returns the error about a value that is of no accepted type."""
    received = type(value).__name__
    if isinstance(value, tuple | list):
        received = f"a {received} of {len(value)}"
    return ArgumentTypeError(
        "loss_fn",
        expected,
        received,
        _ADVICE,
        sentence=f"{{argument}} must {expected}, got {received}: {_ADVICE}",
        related=["has_aux"],
    )
