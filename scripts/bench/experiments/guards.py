"""Experiments on steps that a guard must skip: NaN gradients and spikes."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

import optim_zoo
from experiments.trajectories import (
    EVERY,
    LEARNING_RATE,
    Row,
    run,
    run_with_states,
    same_bits,
)
from optim_zoo import accumulation, guards
from optim_zoo.tree import Tree

DEVICES = 8


def nans_in_a_row() -> Row:
    """One more NaN gradient than the guard allows in a row."""
    allowed = 3
    params = jnp.array([1.0, -2.0])
    bad = [jnp.array([jnp.nan, 1.0])] * (allowed + 1)

    def first_change(made: Sequence[jax.Array]) -> int | None:
        changed = [i + 1 for i, x in enumerate(made) if not same_bits(x, params)]
        return changed[0] if changed else None

    theirs = run(optax.apply_if_finite(optax.adamw(LEARNING_RATE), allowed), params, bad)
    guarded = guards.skip_nonfinite(optim_zoo.adamw(LEARNING_RATE), allowed)
    ours, states = run_with_states(guarded, params, bad)
    raised = [i + 1 for i, state in enumerate(states) if _check_raises(state)]
    spoiled, touched = first_change(theirs), first_change(ours)
    lost = bool(jnp.any(jnp.isnan(theirs[-1])))
    return Row(
        f"{len(bad)} NaN gradients in a row, with a limit of {allowed}",
        f"`apply_if_finite`: {_step_number(spoiled, 'reaches the parameters')}"
        f"{', which are NaN from then on' if lost else ''}",
        f"`skip_nonfinite`: {_step_number(touched, 'reaches the parameters')}; "
        f"`guards.check` raises {f'from number {raised[0]} on' if raised else 'never'}",
        {
            "optax_first_change": spoiled,
            "optax_parameters_nan": lost,
            "ours_first_change": touched,
            "ours_check_raises_after": raised,
        },
    )


def nan_on_one_device() -> Row:
    """Model parallelism: each device has another part of the parameters, and no mean is taken."""
    devices = jax.devices()[:DEVICES]
    params = jnp.ones((len(devices), 4))
    gradients = jnp.full_like(params, 0.1).at[2, 1].set(jnp.nan)
    cut = PartitionSpec("model")
    mesh = Mesh(np.array(devices), ("model",))
    modes = {
        "pmap": lambda step: jax.pmap(step, "model", devices=devices),
        "shard_map": lambda step: jax.jit(
            jax.shard_map(step, mesh=mesh, in_specs=(cut, cut), out_specs=cut)
        ),
    }

    def moved(mode: str, tx: Any) -> int:
        def step(params: jax.Array, gradients: jax.Array) -> jax.Array:
            updates, _ = tx.update(gradients, tx.init(params), params)
            return optax.apply_updates(params, updates)

        made = modes[mode](step)(params, gradients)
        return sum(not same_bits(new, old) for new, old in zip(made, params, strict=True))

    def cell(seen: Mapping[str, int]) -> str:
        return ", ".join(f"{n} of {len(devices)} under `{mode}`" for mode, n in seen.items())

    theirs = {
        mode: moved(mode, optax.apply_if_finite(optax.adamw(LEARNING_RATE), 3)) for mode in modes
    }
    inner = optim_zoo.adamw(LEARNING_RATE)
    ours = {
        "pmap": moved("pmap", guards.skip_nonfinite(inner, axis_name="model")),
        "shard_map": moved("shard_map", guards.skip_nonfinite(inner)),
    }
    return Row(
        f"parameters sharded over {len(devices)} devices, a NaN on one of them: devices that make "
        f"the step",
        f"`apply_if_finite`: {cell(theirs)}",
        f"`skip_nonfinite`: {cell(ours)}, the first with `axis_name`",
        {"devices": len(devices), "optax_moved": theirs, "ours_moved": ours},
    )


def spike() -> Row:
    """One gradient that is too large, where norms fall as in training: to 1 % in 300 steps."""
    steps, at, window, factor, size = 300, 290, 50, 4.0, 100
    norms = np.geomspace(1.0, 0.01, steps)
    norms[at] *= size
    gradients = [jnp.array([norm, 0.0]) for norm in norms]

    def refused(tx: Any) -> tuple[bool, int]:
        """Whether the spike was skipped, and how many other gradients were."""
        params = [jnp.zeros(2), *run(tx, jnp.zeros(2), gradients)]
        steps_refused = [same_bits(*params[i : i + 2]) for i in range(steps)]
        return steps_refused[at], sum(steps_refused) - steps_refused[at]

    def bounded(norm: float) -> Any:
        skip = functools.partial(optax.skip_large_updates, max_squared_norm=(factor * norm) ** 2)
        return optax.MultiSteps(optax.sgd(0.1), 1, should_skip_update_fn=skip)

    of_first, first_others = refused(bounded(float(np.median(norms[:window]))))
    of_last, last_others = refused(bounded(float(np.median(norms[at - window : at]))))
    spiked, others = refused(guards.skip_spikes(optim_zoo.sgd(0.1), window, factor))
    return Row(
        f"one gradient {size} times too large, late in {steps} steps in which the norm falls to a "
        f"hundredth",
        f"no guard that adapts; `skip_large_updates` in `MultiSteps`, bound {factor:.0f} x the "
        f"first norms: {_refused(of_first)}, with {first_others} others; bound {factor:.0f} x the "
        f"last: {_refused(of_last)}, with {last_others} others",
        f"`skip_spikes`: {_refused(spiked)}, with {others} others",
        {
            "optax_first_bound_refused": of_first,
            "optax_first_bound_others": first_others,
            "optax_last_bound_refused": of_last,
            "optax_last_bound_others": last_others,
            "ours_refused": spiked,
            "ours_others": others,
        },
    )


def negative_zero() -> Row:
    """A gradient that must leave the parameters unchanged.

    For a guard it is NaN; for an accumulator it is the gradient of the first micro-batch.
    """
    # `MultiSteps` multiplies the update by 0. A product of 0.0 changes a parameter of -0.0, and a
    # product of -0.0 does not. XLA's version decides which sign of the gradient gives 0.0.
    params = jnp.array([-0.0, -0.0, 0.0, 1.0])
    bad, good = jnp.array([jnp.nan, 1.0, 1.0, 1.0]), jnp.array([1.0, -1.0, 1.0, 1.0])

    def changed(tx: Any, gradient: jax.Array) -> bool:
        return not same_bits(run(tx, params, [gradient])[-1], params)

    theirs = {
        "apply_if_finite": changed(optax.apply_if_finite(optax.sgd(0.1), 3), bad),
        "MultiSteps": changed(optax.MultiSteps(optax.sgd(0.1), EVERY), good),
    }
    ours = {
        "skip_nonfinite": changed(guards.skip_nonfinite(optim_zoo.sgd(0.1)), bad),
        "accumulate": changed(accumulation.accumulate(optim_zoo.sgd(0.1), EVERY), good),
    }

    def cell(seen: Mapping[str, bool]) -> str:
        return "; ".join(
            f"`{name}`: {'another number' if x else 'unchanged to the bit'}"
            for name, x in seen.items()
        )

    return Row(
        "a skipped step, on a parameter of -0.0",
        cell(theirs),
        cell(ours),
        {"optax_changed": theirs, "ours_changed": ours},
    )


def _check_raises(state: Tree) -> bool:
    try:
        guards.check(state)
    except guards.TooManyRefusals:
        return True
    return False


def _refused(was: bool) -> str:
    return "skipped" if was else "let through"


def _step_number(number: int | None, does: str) -> str:
    return f"none {does}" if number is None else f"number {number} {does}"
