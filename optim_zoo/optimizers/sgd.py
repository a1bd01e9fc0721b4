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
    """Descends along the gradient, with or without momentum.

    ::

        m <- momentum m + (1 - dampening) g           at the first step m <- g
        x <- x - learning_rate m
        x <- x - learning_rate (momentum m + g)       with nesterov

    The learning rate is applied after the momentum, as in ``optax.sgd`` and ``torch.optim.SGD``
    (2.13.0), with which this optimizer agrees to 1e-9 in float64. Keras applies it before the
    momentum, which gives other updates while the learning rate changes: see
    `optim_zoo.ports.keras.SGD`.

    Args:
      learning_rate: A finite number >= 0, or a schedule: a function from the step to the learning
        rate, where the first step is 0.
      momentum: The decay rate of m, in [0, 1), or None for plain gradient descent, where m is g and
        is not stored. Any number, including 0, stores m, so that the structure of the state does
        not depend on whether the number is traced.
      nesterov: Whether the update looks one step ahead along the momentum. Needs a momentum above 0
        and no dampening.
      dampening: The share of the gradient that is left out of m after the first step, in [0, 1].

    Returns:
      A transformation whose state is the tuple of the states of its pieces:
      ``ScaleByLearningRateState`` (the step and the learning rate). With momentum,
      ``TraceMomentumState`` (the count of steps and m, like the parameters, in float32 or wider)
      comes before it.

    Raises:
      ArgumentValueError: An argument is out of its range; in ``update``, a gradient has another
        shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optim_zoo.sgd(0.1, momentum=0.9, nesterov=True)
      ```
    """
    trace = trace_if_set(momentum, nesterov=nesterov, dampening=dampening)
    return optax.chain(*trace, scale_by_learning_rate(learning_rate))
