"""AdaGrad (Duchi, Hazan and Singer, JMLR 12, 2011)."""

import jax
import optax

from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms import scale_by_adagrad, scale_by_learning_rate


@accepts_optax_arguments
def adagrad(
    learning_rate: optax.ScalarOrSchedule,
    initial_accumulator_value: jax.typing.ArrayLike = 0.1,
    eps: jax.typing.ArrayLike = 1e-7,
) -> optax.GradientTransformation:
    """Divides each gradient by the root of the sum of all its squares.

    ::

        s <- s + g^2,   s_0 = initial_accumulator_value
        x <- x - learning_rate g / sqrt(s + eps)

    eps is added under the root, as in ``optax.adagrad`` and Keras. PyTorch adds it to the root and
    starts s at 0: see `optim_zoo.ports.torch.Adagrad`. The source is Duchi, Hazan and Singer, JMLR
    12, 2011. It agrees with ``optax.adagrad`` (0.2.8) to 1e-9 in float64.

    Args:
      learning_rate: A finite number >= 0, or a schedule: a function from the step to the learning
        rate, where the first step is 0.
      initial_accumulator_value: The sum of squares before the first step, a finite number >= 0.
      eps: A finite number >= 0, added under the root. Where s + eps is 0, the update is 0.

    Returns:
      A transformation whose state is the tuple of the states of its pieces: ``ScaleByAdagradState``
      (s, like the parameters, in float32 or wider) and ``ScaleByLearningRateState`` (the step and
      the learning rate).

    Raises:
      ArgumentValueError: An argument is out of its range; in ``update``, a gradient has another
        shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optim_zoo.adagrad(0.01)
      ```
    """
    return optax.chain(
        scale_by_adagrad(initial_accumulator_value, eps), scale_by_learning_rate(learning_rate)
    )
