"""Placement of optimizer state on a mesh, and one training step over all of its devices.

Optimizer state often takes twice as much memory as the parameters. `state_shardings` gives every
array of the state a sharding: that of its parameter or, with ZeRO-1 (arXiv 1910.02054), one that is
also sharded over the data axis::

    state = sharding.init(tx, params, mesh=mesh, zero1="data")

`data_parallel` builds the whole training step in one of three modes (``jit``, ``shard_map`` and
``pmap``), which give the same numbers. From the bottom up:

- ``placement``: where parameters and state are placed.
- ``losses``: what a loss function returns, such as a `WeightedLoss`.
- ``auxiliary``: how the auxiliary values of a loss are combined.
- ``gradients``: the mean gradient over devices and micro-batches.
- ``device_axis``: the layout of mode ``pmap``, whose arrays have a leading axis of devices.
- ``record``: `DataParallelStep`, the functions that make up a training step.
- ``modes``: one function per mode, which fills the record.
- ``step``: `data_parallel`, which checks its arguments and chooses the mode.
"""

from optim_zoo.sharding.auxiliary import Mean, Sum
from optim_zoo.sharding.losses import LossFn, WeightedLoss
from optim_zoo.sharding.placement import init, put, state_shardings, unsharded_by_zero1
from optim_zoo.sharding.step import DataParallelStep, data_parallel

__all__ = [
    "DataParallelStep",
    "LossFn",
    "Mean",
    "Sum",
    "WeightedLoss",
    "data_parallel",
    "init",
    "put",
    "state_shardings",
    "unsharded_by_zero1",
]
