"""Momentum (Polyak, USSR Comput. Math. Math. Phys. 4, 1964), as a sum or as a moving average."""

import jax
import optax

from optim_zoo import errors
from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms import scale_by_learning_rate, trace_momentum


@accepts_optax_arguments
def momentum(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
    *,
    ema: bool = False,
) -> optax.GradientTransformation:
    """Descends along a decaying sum, or a moving average, of the gradients.

    ::

        m <- momentum m + g                     heavy ball
        m <- momentum m + (1 - momentum) g      with ema
        x <- x - learning_rate m

    The heavy ball is that of Polyak (USSR Comput. Math. Math. Phys. 4, 1964). The moving average
    takes the same path if its learning rate is larger by the factor 1 / (1 - momentum). Both agree
    with ``MomentumOptimizer`` of TensorFlow 1 to 1e-9 in float64.

    Args:
      learning_rate: A finite number >= 0, or a schedule: a function from the step to the learning
        rate, where the first step is 0.
      momentum: The decay rate of m, in [0, 1).
      ema: Whether m is a moving average, as in Algorithm 1 of arXiv 1904.00962.

    Returns:
      A transformation whose state is the tuple of the states of its pieces: ``TraceMomentumState``
      or, with ema, ``TraceMomentumEmaState`` (the count of steps and m, like the parameters, in
      float32 or wider) and ``ScaleByLearningRateState`` (the step and the learning rate).

    Raises:
      ArgumentValueError: An argument is out of its range; in ``update``, a gradient has another
        shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optim_zoo.momentum(0.1, 0.9)
      ```
    """
    with errors.renaming({"decay": "momentum"}):
        trace = trace_momentum(momentum, ema=ema)
    return optax.chain(trace, scale_by_learning_rate(learning_rate))
