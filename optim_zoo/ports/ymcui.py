"""ymcui/LAMB_Optimizer_TF (8788e45), ``optimization.py``."""

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
    """`lamb` without bias correction: version 3 of the paper. Every leaf has its trust ratio.

    Agrees with the source to 2e-5 in float32.
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
    """`bert.create_optimizer` around `LAMBOptimizer`, with the same drop of the learning rate.

    Agrees with the source to 2e-5 in float32.
    """
    return bert.under_berts_schedule(
        "ymcui", LAMBOptimizer, init_lr, num_train_steps, num_warmup_steps, use_tpu,
        exclude_from_weight_decay,
    )  # fmt: skip
