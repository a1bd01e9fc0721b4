"""The Adam that BERT was trained with (Devlin et al., arXiv 1810.04805)."""

import jax
import optax

from optim_zoo import rules
from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.optimizers.adamw import adamw

UNDECAYED = rules.optional("LayerNorm", "layer_norm", "bias")


@accepts_optax_arguments
def bert_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    weight_decay: jax.typing.ArrayLike = 0.01,
    *,
    exclude_from_weight_decay: rules.Patterns = UNDECAYED,
) -> optax.GradientTransformation:
    """`adamw` without bias correction: ``AdamWeightDecayOptimizer`` of BERT's ``optimization.py``.

    ::

        x <- x - learning_rate (mu / (sqrt(nu) + eps) + weight_decay x)

    BERT's ``create_optimizer`` is this behind ``clip_by_global_norm(1.0)`` with the schedule
    `optim_zoo.schedules.bert_warmup_polynomial`. Agrees with google-research/bert (eedf571) to
    2e-5 in float32, the precision it runs in.

    Args:
      exclude_from_weight_decay: path patterns of leaves that are not decayed; the default is
        BERT's and need not match anything.

    Raises:
      ValueError: see `adamw`.
    """
    return adamw(
        learning_rate,
        b1,
        b2,
        eps,
        weight_decay,
        bias_correction=False,
        exclude_from_weight_decay=exclude_from_weight_decay,
    )
