"""google-research/bert (eedf571), ``optimization.py``; macanv/BERT-BiLSTM-CRF-NER has the same."""

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
    """`bert_adamw`, with no exclusions unless told. Agrees with the source to 2e-5 in float32."""
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
    """The learning rate drops at the end of the warmup, for its decay starts at step 0.

    Repaired: `schedules.warmup_polynomial`. Clipping to the global norm 1, then
    `AdamWeightDecayOptimizer` with decay 0.01 under `schedules.bert_warmup_polynomial`. The source
    takes the loss and makes the gradients; here they come to ``update``, averaged over devices,
    which ``use_tpu`` is about. Agrees with the source to 2e-5 in float32.
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
    """What `create_optimizer` puts around its optimizer."""
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
