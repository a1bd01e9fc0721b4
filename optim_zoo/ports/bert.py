"""Optimizers of google-research/bert (eedf571), ``optimization.py``.

macanv/BERT-BiLSTM-CRF-NER has the same code.
"""

from collections.abc import Callable

import optax

from optim_zoo import rules, schedules
from optim_zoo.optimizers.bert_adamw import UNDECAYED, bert_adamw
from optim_zoo.ports._arguments import Rate, in_source_words, patterns, refuse
from optim_zoo.ports._pieces import chain
from optim_zoo.transforms import clip_by_global_norm


@in_source_words
def AdamWeightDecayOptimizer(
    learning_rate: Rate,
    weight_decay_rate: float = 0.0,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-6,
    exclude_from_weight_decay: rules.Patterns | None = None,
    name: str = "AdamWeightDecayOptimizer",
) -> optax.GradientTransformation:
    """Applies `bert_adamw`, which excludes no leaf here by default.

    Agrees with the source to 2e-5 in float32.

    Args:
      learning_rate: A number >= 0 or a schedule: step -> learning rate, the first step being 0.
      weight_decay_rate: The factor of the parameters in the direction, >= 0.
      beta_1, beta_2: The decay rates of the moments, in [0, 1).
      epsilon: The number that is added to the root of the second moment, >= 0.
      exclude_from_weight_decay: Path patterns (``re.search``) of leaves that are not decayed.
      name: Accepted and ignored.
    """
    return bert_adamw(
        learning_rate,
        beta_1,
        beta_2,
        epsilon,
        weight_decay_rate,
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
    """Applies the optimizer of BERT, whose learning rate drops at the end of the warmup.

    The decay of the source starts at step 0 and not at the end of the warmup. Repaired:
    `schedules.warmup_polynomial`. The gradients are clipped to the global norm 1;
    `AdamWeightDecayOptimizer` with weight decay 0.01 follows `schedules.bert_warmup_polynomial`.
    The source takes the loss and computes the gradients itself. Agrees with the source to 2e-5 in
    float32.

    Args:
      init_lr: The learning rate at the end of the warmup, >= 0.
      num_train_steps: The steps after which the learning rate is 0.
      num_warmup_steps: The steps of the linear warmup, which starts at 0.
      use_tpu: Must be left at its default: gradients are averaged over devices before ``update``.
      exclude_from_weight_decay: Path patterns (``re.search``) of leaves that are not decayed.
    """
    return under_berts_schedule(
        "bert", AdamWeightDecayOptimizer, init_lr, num_train_steps, num_warmup_steps, use_tpu,
        exclude_from_weight_decay,
    )  # fmt: skip


def under_berts_schedule(
    port: str,
    optimizer: Callable[..., optax.GradientTransformation],
    init_lr: float,
    num_train_steps: int,
    num_warmup_steps: int,
    use_tpu: bool,
    exclude_from_weight_decay: rules.Patterns,
) -> optax.GradientTransformation:
    """Returns what `create_optimizer` builds around its optimizer."""
    refuse(f"{port}.create_optimizer", use_tpu=(use_tpu, False))
    schedule = schedules.bert_warmup_polynomial(init_lr, num_warmup_steps, num_train_steps)
    return chain(
        clip_by_global_norm(1.0),
        optimizer(
            schedule,
            weight_decay_rate=0.01,
            exclude_from_weight_decay=exclude_from_weight_decay,
        ),
    )
