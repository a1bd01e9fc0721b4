"""Nesterov's accelerated gradient (Soviet Math. Dokl. 27, 1983; Sutskever et al., ICML 2013)."""

import jax
import optax

from optim_zoo import errors
from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms import scale_by_learning_rate, trace_momentum


@accepts_optax_arguments
def nesterov(
    learning_rate: optax.ScalarOrSchedule, momentum: jax.typing.ArrayLike = 0.9
) -> optax.GradientTransformation:
    """Descends along the gradient one step ahead of the momentum.

    ::

        m <- momentum m + g
        x <- x - learning_rate (momentum m + g)

    This is Nesterov's accelerated gradient (Soviet Math. Dokl. 27, 1983) in the form of Sutskever
    et al. (ICML 2013). x is the point ahead, x + momentum v in their notation, because the gradient
    is taken there. It agrees with ``MomentumOptimizer(use_nesterov=True)`` of TensorFlow 1 to 1e-9
    in float64.

    Args:
      learning_rate: A finite number >= 0, or a schedule: a function from the step to the learning
        rate, where the first step is 0.
      momentum: The decay rate of m, in (0, 1).

    Returns:
      A transformation whose state is the tuple of the states of its pieces:
      ``TraceNesterovMomentumState`` (the count of steps and m, like the parameters, in float32 or
      wider) and ``ScaleByLearningRateState`` (the step and the learning rate).

    Raises:
      ArgumentValueError: An argument is out of its range; in ``update``, a gradient has another
        shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optim_zoo.nesterov(0.1, 0.9)
      ```
    """
    with errors.renaming({"decay": "momentum"}):
        trace = trace_momentum(momentum, nesterov=True)
    return optax.chain(trace, scale_by_learning_rate(learning_rate))
