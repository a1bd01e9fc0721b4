"""Experiments in bfloat16: parameters, moments, and the dtypes of an optimizer's state."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optim_zoo
from experiments.trajectories import LEARNING_RATE, Row, scan, scan_raises
from optim_zoo import precision, registry


def small_steps() -> Row:
    """Steps that are too small for bfloat16.

    1,024 parameters have the same gradient, so that the noise of stochastic rounding is visible.
    """
    steps = 1000
    one = jnp.ones(1024)

    def end(tx: Any, dtype: str) -> tuple[float, float]:
        params = scan(tx, one.astype(dtype), one.astype(dtype), steps)[0].astype(jnp.float32)
        return float(params.mean()), float(params.std())

    wide, _ = end(optax.adamw(LEARNING_RATE), "float32")
    theirs, _ = end(optax.adamw(LEARNING_RATE), "bfloat16")
    inner = optim_zoo.adamw(LEARNING_RATE)
    master, _ = end(precision.master_weights(inner), "bfloat16")
    rounding = precision.stochastic_rounding(inner, jax.random.key(0))
    rounded, deviation = end(rounding, "bfloat16")
    return Row(
        f"bfloat16 parameters: {steps:,} steps of AdamW at {LEARNING_RATE} from 1, in float32 to "
        f"{wide:z.4f}",
        f"`adamw`: to {theirs:z.4f}",
        f"`master_weights`: to {master:z.4f}; `stochastic_rounding`: to {rounded:z.4f} on average, "
        f"standard deviation {deviation:.3f}",
        {
            "float32_end": wide,
            "optax_end": theirs,
            "ours_master_weights_end": master,
            "ours_stochastic_rounding_end": rounded,
            "ours_stochastic_rounding_deviation": deviation,
        },
    )


def second_moment() -> Row:
    """Measures a second moment whose changes are too small for bfloat16, with 1,024 parameters."""
    steps, b2 = 3000, 0.999
    one = jnp.ones(1024)
    expected = 1 - b2**steps

    def shares(tx: Any, dtype: str) -> tuple[float, float]:
        state = scan(tx, one.astype(dtype), one.astype(dtype), steps)[1]
        nu = optax.tree.get(state, "nu")
        assert nu.dtype == jnp.bfloat16
        nu = nu.astype(jnp.float32) / expected
        return float(nu.mean()), float(nu.std())

    theirs, _ = shares(optax.scale_by_adam(b2=b2), "bfloat16")
    storing = precision.store_state(optim_zoo.scale_by_adam(b2=b2), {"nu": "bfloat16"})
    ours, deviation = shares(storing, "float32")
    return Row(
        f"second moment in bfloat16, {steps:,} steps with the same gradient: share of its value",
        f"`scale_by_adam` on bfloat16 parameters: {100 * theirs:.0f} %",
        f"`store_state(..., {{'nu': 'bfloat16'}})`: {100 * ours:.1f} % on average, standard "
        f"deviation {100 * deviation:.1f} %",
        {"optax_share": theirs, "ours_share": ours, "ours_deviation": deviation},
    )


# The optimizers whose update needs only gradients and parameters. Optional momentum is on.
OPTAX_OPTIMIZERS: Mapping[str, Mapping[str, float]] = {
    "adabelief": {},
    "adadelta": {},
    "adafactor": {},
    "adagrad": {},
    "adam": {},
    "adamax": {},
    "adamaxw": {},
    "adamw": {},
    "adan": {},
    "amsgrad": {},
    "fromage": {},
    "lamb": {},
    "lars": {},
    "lion": {},
    "nadam": {},
    "nadamw": {},
    "novograd": {},
    "optimistic_adam_v2": {},
    "optimistic_gradient_descent": {},
    "radam": {},
    "rmsprop": {"momentum": 0.9},
    "rprop": {},
    "sgd": {"momentum": 0.9},
    "sign_sgd": {},
    "signum": {},
    "sm3": {},
    "yogi": {},
}


def state_dtypes() -> Row:
    """Optimizers whose state changes its dtype in a step, so that ``lax.scan`` fails."""
    params = {"kernel": jnp.ones((4, 4), jnp.bfloat16), "bias": jnp.ones(4, jnp.bfloat16)}
    gradients = jax.tree.map(lambda x: jnp.full(x.shape, 0.1, jnp.float32), params)

    def fails(tx: Any) -> bool:
        return bool(scan_raises(tx, params, gradients))

    theirs = {
        name: fails(getattr(optax, name)(LEARNING_RATE, **arguments))
        for name, arguments in OPTAX_OPTIMIZERS.items()
    }
    ours = {
        name: fails(eval(entry.example, {"optim_zoo": optim_zoo}))
        for name, entry in registry.OPTIMIZERS.items()
    }
    return Row(
        "bfloat16 parameters, float32 gradients: optimizers that `lax.scan` refuses, because a "
        "step changes a dtype of their state",
        f"{sum(theirs.values())} of {len(theirs)}, `adamw` {_among('adamw', theirs)}",
        f"{sum(ours.values()) or 'none'}",
        {
            "optax_failing": [name for name, failed in theirs.items() if failed],
            "optax_optimizers": len(theirs),
            "ours_failing": [name for name, failed in ours.items() if failed],
            "ours_optimizers": len(ours),
        },
    )


def _among(name: str, failed: Mapping[str, bool]) -> str:
    return "among them" if failed[name] else "not among them"
