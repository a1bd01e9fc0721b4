"""Metrics of a step: learning rate, norms, and the trust ratio of every layer.

The pieces of this library keep figures that they compute anyway, and `read` finds them in the state
of any optimizer that is made of them, at no cost. `with_metrics` adds the norms that no piece
computes. `flat` turns the result into numbers for a logger::

    tx = metrics.with_metrics(adamw(1e-3), every=10)
    ...
    figures = metrics.read(state)  # inside jit or outside
    figures["update_norm/encoder/layer_0/attention/query/kernel"]
    logger.log(metrics.flat(figures), step)
"""

from optim_zoo.wrappers.metrics.keeping import with_metrics
from optim_zoo.wrappers.metrics.reading import flat, read
from optim_zoo.wrappers.metrics.state import WithMetricsState
from optim_zoo.wrappers.noise_scale import NoiseScaleState

__all__ = ["NoiseScaleState", "WithMetricsState", "flat", "read", "with_metrics"]
