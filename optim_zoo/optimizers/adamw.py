"""AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

import jax
import optax

from optim_zoo import rules
from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms import add_decayed_weights, scale_by_adam, scale_by_learning_rate


@accepts_optax_arguments
def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 1e-4,
    *,
    bias_correction: bool = True,
    exclude_from_weight_decay: rules.Patterns = (),
    mask: rules.Mask = None,
    eps_root: jax.typing.ArrayLike = 0.0,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay.

    ::

        x <- x - learning_rate (mu_hat / (sqrt(nu_hat) + eps) + weight_decay x)

    The order is Adam's direction, decay, learning rate: the decay is multiplied by the rate, as
    in ``optax.adamw`` and ``torch.optim.AdamW``, and not by a schedule of its own as in the paper.
    The fifth argument is the decay, where optax has ``eps_root``: give it by name.
    Agrees with ``optax.adamw`` (0.2.8) to 1e-9 in float64.

    Args:
      learning_rate: a number or a schedule: step -> learning rate, the first step being 0.
      b1, b2, eps, bias_correction: see `scale_by_adam`.
      weight_decay: >= 0.
      exclude_from_weight_decay: path patterns (``re.search``) of leaves that are not decayed.

    Raises:
      ValueError: see `scale_by_adam`, `add_decayed_weights` and `scale_by_learning_rate`.
    """
    return optax.chain(
        scale_by_adam(
            b1, b2, eps, bias_correction=bias_correction, eps_root=eps_root, nesterov=nesterov
        ),
        add_decayed_weights(
            weight_decay,
            rules.named("exclude_from_weight_decay", exclude_from_weight_decay),
            mask=mask,
        ),
        scale_by_learning_rate(learning_rate),
    )
