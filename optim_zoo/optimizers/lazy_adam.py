"""LazyAdam: Adam on the rows of a table that a batch touched (TensorFlow Addons' name)."""

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
    """`adam` that, where a gradient is `SparseRows`, moves those rows and their moments alone.

    ::

        for each row i of the gradient, rows of the same id added up:
            mu_i <- b1 mu_i + (1 - b1) g_i
            nu_i <- b2 nu_i + (1 - b2) g_i^2
            x_i  <- x_i - learning_rate (mu_i / (1 - b1^t)) / (sqrt(nu_i / (1 - b2^t)) + eps)

    t counts all steps. A dense gradient gets `adam`. The updates are `SparseRows` again, for
    `optim_zoo.apply_updates`; the gradients come from `optim_zoo.rows.value_and_grad`. TensorFlow
    Addons' ``LazyAdam`` and torch's ``SparseAdam`` have eps beside the uncorrected root:
    `ports.tensorflow_addons.LazyAdam`, `ports.torch.SparseAdam`, which agree to 1e-9 in float64.

    Args:
      learning_rate: a number or a schedule: step -> learning rate, the first step being 0.
      b1, b2, eps: see `scale_by_adam`.

    Raises:
      ValueError: see `scale_by_lazy_adam` and `scale_by_learning_rate`; in ``update``, the rows
        do not fit their table.
    """
    return optax.chain(scale_by_lazy_adam(b1, b2, eps), scale_by_learning_rate(learning_rate))
