"""An experiment on metrics: norms that are read inside ``lax.scan``."""

import jax.numpy as jnp
import optax

import optim_zoo
from experiments.trajectories import LEARNING_RATE, Row, scan, scan_raises
from optim_zoo import metrics


def metrics_in_scan() -> Row:
    """Lists the norms that can be read from a state that ``lax.scan`` carries."""
    params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    monitor, snapshot = (
        optax.chain(optax.adamw(LEARNING_RATE), piece)
        for piece in (
            optax.monitor({"norm": optax.tree.norm}),
            optax.snapshot("norm", optax.tree.norm),
        )
    )
    ours = metrics.with_metrics(optim_zoo.lamb(LEARNING_RATE))
    theirs = {
        name: scan_raises(tx, params, params)
        for name, tx in {"monitor": monitor, "snapshot": snapshot}.items()
    }
    raised = scan_raises(ours, params, params)
    read = [] if raised else sorted(metrics.read(scan(ours, params, params, 2)[1]))
    kinds = sorted({name.partition("/")[0].replace("_", " ") for name in read})
    return Row(
        "norms of a step inside `lax.scan`",
        "; ".join(
            f"`{name}`: {f'`{error}`' if error else 'the updates at its place in the chain'}"
            for name, error in theirs.items()
        ),
        f"`with_metrics`: {f'`{raised}`' if raised else ', '.join(kinds)}",
        {"optax_raises": theirs, "ours_raises": raised, "ours_values": read},
    )
