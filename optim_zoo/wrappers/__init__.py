"""Wrappers around any transformation: precision, accumulation, guards and metrics.

They compose in any order, pass extra arguments on, and take ``axis_name`` where they reduce over
devices.
"""

from optim_zoo.wrappers import accumulation, guards, metrics, precision

__all__ = ["accumulation", "guards", "metrics", "precision"]
