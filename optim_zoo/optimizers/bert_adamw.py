"""The AdamW that BERT was trained with (Devlin et al., arXiv 1810.04805)."""

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
    """Runs the AdamW that BERT was trained with, which has no bias correction.

    ::

        mu <- b1 mu + (1 - b1) g
        nu <- b2 nu + (1 - b2) g^2
        x  <- x - learning_rate (mu / (sqrt(nu) + eps) + weight_decay x)

    This is ``AdamWeightDecayOptimizer`` of BERT's ``optimization.py`` (google-research/bert, arXiv
    1810.04805). BERT's ``create_optimizer`` clips the gradients first,
    ``clip_by_global_norm(1.0)``, and uses the schedule
    `optim_zoo.schedules.bert_warmup_polynomial`; `optim_zoo.ports.bert.create_optimizer` is all of
    it. It agrees with google-research/bert (eedf571) to 2e-5 in float32, the precision in which
    that code runs.

    Args:
      learning_rate: A finite number >= 0, or a schedule: a function from the step to the learning
        rate, where the first step is 0.
      b1: The decay rate of mu, in [0, 1).
      b2: The decay rate of nu, in [0, 1).
      eps: A finite number >= 0, added to the root.
      weight_decay: A finite number >= 0. At 0, as a Python number, nothing is decayed.
      exclude_from_weight_decay: Path patterns of the leaves that are not decayed. A pattern is a
        regular expression, searched for (``re.search``) in the path of a leaf, such as
        ``encoder/layer_0/bias``. The default patterns are those of BERT, and need not match a leaf.

    Returns:
      A transformation whose state is the tuple of the states of its pieces:
      ``ScaleByUncorrectedAdamState`` (the count of steps, mu and nu; the moments are like the
      parameters, in float32 or wider), ``AddDecayedWeightsState`` (empty) and
      ``ScaleByLearningRateState`` (the step and the learning rate).

    Raises:
      ArgumentValueError: An argument is out of its range; in ``init``, a path pattern matches no
        leaf; in ``update``, the parameters are missing, or a gradient has another shape than its
        parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      schedule = optim_zoo.schedules.bert_warmup_polynomial(1e-4, warmup_steps=10, total_steps=100)
      tx = optax.chain(optim_zoo.clip_by_global_norm(1.0), optim_zoo.bert_adamw(schedule))
      ```
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
