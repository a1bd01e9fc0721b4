"""Gradients of the rows that a batch reads from a table, and steps that update only those rows.

If a batch reads eight thousand rows of an embedding table of a million, the gradient of the table
is zero almost everywhere. `value_and_grad` returns the rows that are not zero as `SparseRows`;
`lazy_adam` updates those rows and their moments; `apply_updates` adds them to the table, in place
where the table is donated::

    def loss_fn(params, batch):
        x = params["embed"][batch["ids"]]  # or a Flax Embed
        ...

    loss, grads = rows.value_and_grad(loss_fn, ["^embed$"])(params, batch)
    updates, state = tx.update(grads, state, params)
    params = optim_zoo.apply_updates(params, updates)
"""

from optim_zoo.rows.gradients import Table, value_and_grad
from optim_zoo.rows.sparse_rows import SparseRows, is_sparse, on_rows, summed
from optim_zoo.rows.updates import apply_updates, check_updates

__all__ = [
    "SparseRows",
    "Table",
    "apply_updates",
    "check_updates",
    "is_sparse",
    "on_rows",
    "summed",
    "value_and_grad",
]
