"""Gradient descent, with the momentum of torch's SGD."""

import jax
import optax

from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms import scale_by_learning_rate
from optim_zoo.transforms.momentum import trace_if_set


@accepts_optax_arguments
def sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
    dampening: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformation:
    """Gradient descent, plain or with momentum.

    ::

        m <- momentum m + (1 - dampening) g     at the first step m <- g
        x <- x - learning_rate m                with nesterov  x - learning_rate (momentum m + g)

    With ``momentum=None``, m is g and is not stored. The learning rate stands outside the momentum,
    as in ``optax.sgd`` and ``torch.optim.SGD``; Keras has it inside, which differs while the rate
    changes. Agrees with ``torch.optim.SGD`` (2.13.0) to 1e-9 in float64.

    Args:
      learning_rate: a number or a schedule: step -> learning rate, the first step being 0.
      momentum: in [0, 1), or None for plain gradient descent, which keeps no m. A number, also 0,
        keeps m, so that the structure of the state does not depend on whether it is traced.
      nesterov: looks one step ahead along the momentum.
      dampening: in [0, 1].

    Raises:
      ValueError: see `trace_momentum` and `scale_by_learning_rate`.
    """
    trace = trace_if_set(momentum, nesterov=nesterov, dampening=dampening)
    return optax.chain(*trace, scale_by_learning_rate(learning_rate))
