"""The record that `data_parallel` returns."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from optim_zoo.tree import Tree

Step = Callable[[Tree, optax.OptState, Tree], tuple[Any, ...]]
"""``(params, state, batch)`` to ``(params, state, loss)``, and aux where there is one."""


@dataclasses.dataclass(frozen=True, eq=False)
class DataParallelStep:
    """A compiled training step and the functions that belong to it; made by `data_parallel`.

    ::

        params, state = step.init(params)
        params, state, loss = step(params, state, batch)  # and aux with has_aux=True

    With several processes, every process calls each function with the same global values, or with
    arrays that span the processes.

    Attributes:
      step: ``step(params, state, batch)`` returns ``(params, state, loss)`` after one step, and aux
        with ``has_aux=True``. It donates ``params`` and ``state``. Calling the record calls it. It
        raises `ArgumentValueError` where the batch cannot be divided over devices and
        micro-batches.
      init: ``init(params)`` returns copies of the parameters with the shardings that the step uses,
        and the initial optimizer state. The copies keep the caller's arrays from being donated.
      params: ``params(params)`` returns plain parameters on one device (with several processes, on
        one device of each). They are copies, because the next step donates its arguments.
      lower: ``lower(params, batch)`` lowers the step for arguments of these shapes. Memory, cost
        and collectives can be read from its ``.compile()``. The arguments are arrays or
        ``jax.ShapeDtypeStruct``s, and the devices of the mesh may be absent
        (``jax.experimental.topologies``).
      global_arrays: ``global_arrays(tree)`` returns parameters or state in the layout that all
        modes share, for checkpoints and metrics: without the device axis of mode ``pmap``. The
        arrays may be sharded over devices and processes. They are not copies, and the next step
        donates them.
      place: ``place(params, state)`` is the inverse of ``global_arrays``: it returns the arrays of
        a checkpoint with the shardings that the step uses. They may share memory with the
        arguments, and a step donates them.
      batch_divisor: the number of devices along the batch axis times the number of micro-batches.
        It must divide the first axis of every array of a batch.
    """

    step: Step
    init: Callable[[Tree], tuple[Tree, optax.OptState]]
    params: Callable[[Tree], Tree]
    lower: Callable[[Tree, Tree], jax.stages.Lowered]
    global_arrays: Callable[[Tree], Tree]
    place: Callable[[Tree, optax.OptState], tuple[Tree, optax.OptState]]
    batch_divisor: int

    def __call__(self, params: Tree, state: optax.OptState, batch: Tree) -> tuple[Any, ...]:
        """Calls ``step``."""
        return self.step(params, state, batch)

    @property
    def uncopied(self) -> Callable[[Tree], Tree]:
        """The former name of ``global_arrays``."""
        return self.global_arrays
