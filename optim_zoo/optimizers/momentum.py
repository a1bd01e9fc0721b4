"""Momentum: the heavy ball of Polyak (USSR Comput. Math. Math. Phys. 4, 1964), and its average."""

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
    """Gradient descent along an average of the gradients.

    ::

        m <- momentum m + g                     heavy ball
        m <- momentum m + (1 - momentum) g      ema
        x <- x - learning_rate m

    The two agree where the learning rate of the second is that of the first divided by
    1 - momentum. Agrees with ``MomentumOptimizer`` of TensorFlow 1 to 1e-9 in float64.

    Args:
      learning_rate: a number or a schedule: step -> learning rate, the first step being 0.
      momentum: in [0, 1).
      ema: the moving average, as in Algorithm 1 of arXiv 1904.00962.

    Raises:
      ValueError: see `trace_momentum` and `scale_by_learning_rate`.
    """
    with errors.renaming({"decay": "momentum"}):
        trace = trace_momentum(momentum, ema=ema)
    return optax.chain(trace, scale_by_learning_rate(learning_rate))
