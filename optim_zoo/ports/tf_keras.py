"""Optimizer of ``tf_keras.optimizers.legacy`` (2.21)."""

from typing import Any

import optax

from optim_zoo.ports import _keras_base
from optim_zoo.ports._arguments import Rate, check_arguments, in_source_words
from optim_zoo.ports._pieces import chain
from optim_zoo.transforms import scale_by_learning_rate, scale_by_scheduled_nadam


@in_source_words
def Nadam(
    learning_rate: Rate = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    name: str = "Nadam",
    **kwargs: Any,
) -> optax.GradientTransformation:
    """Applies NAdam whose momentum is scheduled by 0.96^(0.004 t), as in torch.

    Agrees with the source to 1e-8 in float64, because it keeps some constants in float32. All
    arguments mean what they mean in `ports.keras`; ``clipnorm``, ``clipvalue`` and
    ``global_clipnorm`` are passed by keyword.
    """
    refused = {**_keras_base.REFUSED_BEFORE, "schedule_decay": 0.004}
    check_arguments("tf_keras.Nadam", kwargs, _keras_base.CLIPPING, refused)
    return chain(
        _keras_base.clipping(kwargs),
        scale_by_scheduled_nadam(beta_1, beta_2, epsilon, momentum_decay=0.004),
        scale_by_learning_rate(learning_rate),
    )
