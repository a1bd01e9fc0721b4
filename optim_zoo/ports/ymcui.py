"""Optimizers of ymcui/LAMB_Optimizer_TF (8788e45), ``optimization.py``."""

import optax

from optim_zoo import rules
from optim_zoo.optimizers.bert_adamw import UNDECAYED
from optim_zoo.optimizers.lamb import lamb
from optim_zoo.ports import bert
from optim_zoo.ports._arguments import Rate, in_source_words, patterns


@in_source_words
def LAMBOptimizer(
    learning_rate: Rate,
    weight_decay_rate: float = 0.01,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-6,
    exclude_from_weight_decay: rules.Patterns | None = None,
    name: str = "LAMBOptimizer",
) -> optax.GradientTransformation:
    """Applies `lamb` without bias correction, as in version 3 of the paper.

    Every leaf has a trust ratio. Agrees with the source to 2e-5 in float32.

    Args:
      learning_rate: A number >= 0 or a schedule: step -> learning rate, the first step being 0.
      weight_decay_rate: The factor of the parameters in the direction, >= 0.
      beta_1, beta_2: The decay rates of the moments, in [0, 1).
      epsilon: The number that is added to the root of the second moment, >= 0.
      exclude_from_weight_decay: Path patterns (``re.search``) of leaves that are not decayed.
      name: Accepted and ignored.
    """
    return lamb(
        learning_rate,
        beta_1,
        beta_2,
        epsilon,
        weight_decay_rate,
        bias_correction=False,
        exclude_from_weight_decay=patterns(exclude_from_weight_decay),
    )


@in_source_words
def create_optimizer(
    init_lr: float,
    num_train_steps: int,
    num_warmup_steps: int,
    use_tpu: bool = False,
    *,
    exclude_from_weight_decay: rules.Patterns = UNDECAYED,
) -> optax.GradientTransformation:
    """Applies `bert.create_optimizer` around `LAMBOptimizer`.

    The learning rate has the same drop at the end of the warmup. Agrees with the source to 2e-5 in
    float32.

    Args:
      init_lr: The learning rate at the end of the warmup, >= 0.
      num_train_steps: The steps after which the learning rate is 0.
      num_warmup_steps: The steps of the linear warmup, which starts at 0.
      use_tpu: Must be left at its default: gradients are averaged over devices before ``update``.
      exclude_from_weight_decay: Path patterns (``re.search``) of leaves that are not decayed.
    """
    return bert.under_berts_schedule(
        "ymcui", LAMBOptimizer, init_lr, num_train_steps, num_warmup_steps, use_tpu,
        exclude_from_weight_decay,
    )  # fmt: skip
