"""Large-batch training in JAX whose optimizer you can trust.

Optimizers are chains of small pure pieces, ordinary ``optax.GradientTransformation``s::

    tx = optim_zoo.lamb(1e-3, weight_decay=0.01, layers=[("encoder/layers", optim_zoo.stacked(0))])
"""

from optim_zoo import layers, metrics, registry, rules, schedules, sharding
from optim_zoo.layers import split, stacked
from optim_zoo.optimizers import adamw, bert_adamw, lamb
from optim_zoo.transforms import (
    add_decayed_weights,
    clip_by_global_norm,
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_trust_ratio,
)

__all__ = [
    "adamw",
    "add_decayed_weights",
    "bert_adamw",
    "clip_by_global_norm",
    "lamb",
    "layers",
    "metrics",
    "registry",
    "rules",
    "scale_by_adam",
    "scale_by_learning_rate",
    "scale_by_trust_ratio",
    "schedules",
    "sharding",
    "split",
    "stacked",
]
