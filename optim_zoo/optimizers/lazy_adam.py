"""LazyAdam: Adam on only those rows of a table that have a gradient (arXiv 1412.6980)."""

import jax
import optax

from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms import scale_by_lazy_adam, scale_by_learning_rate


@accepts_optax_arguments
def lazy_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
) -> optax.GradientTransformation:
    """Runs Adam on only those rows of a table that have a gradient.

    ::

        for each row i of the gradient, where rows with the same id are summed:
            mu_i <- b1 mu_i + (1 - b1) g_i
            nu_i <- b2 nu_i + (1 - b2) g_i^2
            x_i  <- x_i - learning_rate (mu_i / (1 - b1^t)) / (sqrt(nu_i / (1 - b2^t)) + eps)

    t counts all steps. Where a gradient is `SparseRows`, the other rows and their moments stay
    unchanged, and the update is `SparseRows` again, for `optim_zoo.apply_updates`. Such gradients
    come from `optim_zoo.rows.value_and_grad`. A leaf with a dense gradient is updated as by `adam`.

    ``LazyAdam`` of TensorFlow Addons and ``SparseAdam`` of PyTorch add eps to the root of the
    uncorrected moment. They are `optim_zoo.ports.tensorflow_addons.LazyAdam` and
    `optim_zoo.ports.torch.SparseAdam`, which agree to 1e-9 in float64. The formula is that of arXiv
    1412.6980.

    Args:
      learning_rate: A finite number >= 0, or a schedule: a function from the step to the learning
        rate, where the first step is 0.
      b1: The decay rate of mu, in [0, 1).
      b2: The decay rate of nu, in [0, 1).
      eps: A finite number >= 0, added to the root.

    Returns:
      A transformation whose state is the tuple of the states of its pieces:
      ``ScaleByLazyAdamState`` (the count of steps, mu and nu; the moments are like the parameters,
      in float32 or wider) and ``ScaleByLearningRateState`` (the step and the learning rate).

    Raises:
      ArgumentValueError: An argument is out of its range; in ``update``, a gradient has another
        shape than its parameter, or rows do not fit their table.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optim_zoo.lazy_adam(1e-3)
      ```
    """
    return optax.chain(scale_by_lazy_adam(b1, b2, eps), scale_by_learning_rate(learning_rate))
