"""RAdam (Liu et al., arXiv 1908.03265)."""

import jax
import optax

from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms import scale_by_learning_rate, scale_by_radam


@accepts_optax_arguments
def radam(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    threshold: jax.typing.ArrayLike = 5.0,
    *,
    eps_root: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformation:
    """`adam` with a factor that makes up for the few gradients its first second moments hold.

    ::

        x <- x - learning_rate r_t mu_hat / (sqrt(nu_hat) + eps)   where rho_t >= threshold
        x <- x - learning_rate mu_hat                              before

    Algorithm 2 of the paper with the threshold of the code in use, eps beside the corrected root;
    rho_t and r_t: `scale_by_radam`. For every b2 in [0.9, 0.999] the sixth step is the first that
    is rectified. Agrees with ``optax.radam`` (0.2.8) to 1e-9 in float64.

    Args:
      learning_rate: a number or a schedule: step -> learning rate, the first step being 0.
      b1, b2, eps: see `scale_by_adam`.
      threshold: >= 4.

    Raises:
      ValueError: see `scale_by_radam` and `scale_by_learning_rate`.
    """
    return optax.chain(
        scale_by_radam(b1, b2, eps, threshold, eps_root=eps_root),
        scale_by_learning_rate(learning_rate),
    )
