"""Large-batch training in JAX whose optimizer you can trust.

Optimizers are chains of small pure pieces, ordinary ``optax.GradientTransformation``s::

    tx = optim_zoo.lamb(1e-3, weight_decay=0.01, layers=[("encoder/layers", optim_zoo.stacked(0))])
"""

from optim_zoo import (
    errors,
    layers,
    ports,
    recorded,
    registry,
    rows,
    rules,
    saved_state,
    schedules,
    sharding,
)
from optim_zoo.layers import layerwise_decay, split, stacked
from optim_zoo.registry import *  # noqa: F403 - the optimizers and the pieces
from optim_zoo.rows import SparseRows, apply_updates
from optim_zoo.wrappers import accumulation, averaging, guards, metrics, precision

__version__ = "0.2.0"

__all__ = [
    "SparseRows",
    "accumulation",
    "apply_updates",
    "averaging",
    "errors",
    "guards",
    "layers",
    "layerwise_decay",
    "metrics",
    "ports",
    "precision",
    "recorded",
    "registry",
    "rows",
    "rules",
    "saved_state",
    "schedules",
    "sharding",
    "split",
    "stacked",
]
__all__ += registry.__all__
