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
    """Gradient descent that looks one step ahead along its momentum.

    ::

        m <- momentum m + g
        x <- x - learning_rate (momentum m + g)

    x is the point looked ahead to, x + momentum v in the notation of Sutskever et al., which is
    where the gradient is taken. Agrees with ``MomentumOptimizer(use_nesterov=True)`` of
    TensorFlow 1 to 1e-9 in float64.

    Args:
      learning_rate: a number or a schedule: step -> learning rate, the first step being 0.
      momentum: in (0, 1).

    Raises:
      ValueError: see `trace_momentum` and `scale_by_learning_rate`.
    """
    with errors.renaming({"decay": "momentum"}):
        trace = trace_momentum(momentum, nesterov=True)
    return optax.chain(trace, scale_by_learning_rate(learning_rate))
