"""``tf_keras.optimizers.legacy`` (2.21)."""

from typing import Any

import optax

from optim_zoo.ports._pieces import (0, 001, 1e, 7, 9, 999, Any, Nadam, Rate, beta_1, beta_2, chain, clipping, def, epsilon, float, from, import, in_source_words, keras, kwargs, learning_rate, name, optim_zoo, ports, refuse, scale_by_learning_rate, scale_by_scheduled_nadam, str, transforms) -> optax.GradientTransformation:
    """NAdam whose momentum is scheduled by 0.96^(0.004 t), as torch's.

    ``clipnorm``, ``clipvalue`` and ``global_clipnorm`` are supported; ``name`` changes nothing.
    Agrees with the source to 1e-8 in float64, for it keeps some constants in float32.
    """
    known = ("clipnorm", "clipvalue", "global_clipnorm")
    refuse("tf_keras.Nadam", **{k: (v, None) for k, v in kwargs.items() if k not in known})
    return chain(
        clipping(kwargs),
        scale_by_scheduled_nadam(beta_1, beta_2, epsilon, momentum_decay=0.004),
        scale_by_learning_rate(learning_rate),
    )
