"""Wrappers around any transformation: precision, accumulation, guards, metrics and averages.

They compose in any order and pass extra arguments on to the transformation inside. Where they
reduce over devices, they take ``axis_name``.
"""

from optim_zoo.wrappers import accumulation, averaging, guards, metrics, precision

__all__ = ["accumulation", "averaging", "guards", "metrics", "precision"]
