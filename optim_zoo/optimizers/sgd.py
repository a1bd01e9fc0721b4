"""Gradient descent, with the momentum of torch's SGD."""

import jax
import optax

from optim_zoo import errors
from optim_zoo.transforms import scale_by_learning_rate, trace_momentum


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.0,
    nesterov: bool = False,
    dampening: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformation:
    """Gradient descent, plain or with momentum.

    ::

        m <- momentum m + (1 - dampening) g     at the first step m <- g
        x <- x - learning_rate m                with nesterov  x - learning_rate (momentum m + g)

    Without momentum m is g, and nothing is kept. The learning rate stands outside the momentum,
    as in ``optax.sgd`` and ``torch.optim.SGD``; Keras has it inside, which differs while the rate
    changes. Agrees with ``torch.optim.SGD`` (2.13.0) to 1e-9 in float64.

    Args:
      learning_rate: a number or a schedule: step -> learning rate, the first step being 0.
      momentum: in [0, 1); 0, as a Python number, is plain gradient descent.
      nesterov: looks one step ahead along the momentum.
      dampening: in [0, 1].

    Raises:
      ValueError: see `trace_momentum` and `scale_by_learning_rate`.
    """
    with errors.renaming({"decay": "momentum"}):
        trace = trace_momentum(momentum, nesterov=nesterov, dampening=dampening)
    if not nesterov and isinstance(momentum, (int, float)) and momentum == 0:
        return optax.chain(scale_by_learning_rate(learning_rate))
    return optax.chain(trace, scale_by_learning_rate(learning_rate))
