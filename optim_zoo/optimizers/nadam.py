"""NAdam (Dozat, Incorporating Nesterov Momentum into Adam, ICLR workshop 2016)."""

import jax
import optax

from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms import scale_by_learning_rate, scale_by_nadam


@accepts_optax_arguments
def nadam(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    eps_root: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformation:
    """`adam` with Nesterov's momentum.

    ::

        mu <- b1 mu + (1 - b1) g
        nu <- b2 nu + (1 - b2) g^2
        u   = (b1 mu / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t)) / (sqrt(nu / (1 - b2^t)) + eps)
        x  <- x - learning_rate u

    Without the schedule of the momentum that torch and Keras have: `ports.torch.NAdam`,
    `ports.keras.Nadam`. Agrees with ``optax.nadam`` (0.2.8) to 1e-9 in float64.

    Args:
      learning_rate: a number or a schedule: step -> learning rate, the first step being 0.
      b1, b2, eps: see `scale_by_nadam`.

    Raises:
      ValueError: see `scale_by_nadam` and `scale_by_learning_rate`.
    """
    return optax.chain(
        scale_by_nadam(b1, b2, eps, eps_root=eps_root), scale_by_learning_rate(learning_rate)
    )
