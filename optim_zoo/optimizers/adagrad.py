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
    """Divides by the root of the sum of all squared gradients.

    ::

        s <- s + g^2,   s_0 = initial_accumulator_value
        x <- x - learning_rate g / sqrt(s + eps)

    eps stands inside the root, as in ``optax.adagrad`` and Keras; torch has it outside and s_0 0:
    `ports.torch.Adagrad`. Agrees with ``optax.adagrad`` (0.2.8) to 1e-9 in float64.

    Args:
      learning_rate: a number or a schedule: step -> learning rate, the first step being 0.
      initial_accumulator_value, eps: see `scale_by_adagrad`.

    Raises:
      ValueError: see `scale_by_adagrad` and `scale_by_learning_rate`.
    """
    return optax.chain(
        scale_by_adagrad(initial_accumulator_value, eps), scale_by_learning_rate(learning_rate)
    )
