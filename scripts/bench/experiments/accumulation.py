"""Experiments on micro-batches: `optim_zoo.accumulation.accumulate` and `optax.MultiSteps`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optim_zoo
from experiments.trajectories import EVERY, LEARNING_RATE, Row, jitted_step, run, same_bits
from optim_zoo import accumulation
from optim_zoo.tree import Tree


def nan_micro_batch() -> Row:
    """Measures one NaN micro-batch, and the steps that follow it.

    Every later step starts from the parameters and the inner state from before the NaN, so that
    only the accumulator itself can still hold it.
    """
    after = 20  # steps that follow
    params = jnp.ones(4)
    good, bad = jnp.full(4, 0.1), jnp.array([0.1, jnp.nan, 0.1, 0.1])

    def finite_steps(tx: Any, inner: str) -> tuple[int, int]:
        """Counts the micro-batches before the first step, and the later steps that were finite."""
        step, fresh, seen = jitted_step(tx), tx.init(params), 0
        moved, state, inner_state = params, fresh, getattr(fresh, inner)
        while same_bits(moved, params):
            moved, state = step(params, state, bad if seen == 1 else good)
            seen += 1
        finite = 0
        for _ in range(after):
            state = state._replace(**{inner: inner_state})
            for _ in range(EVERY):
                moved, state = step(params, state, good)
            finite += bool(np.all(np.isfinite(moved)))
        return seen, finite

    adamw = optax.adamw(LEARNING_RATE)
    _, spoiled = finite_steps(optax.MultiSteps(adamw, EVERY), "inner_opt_state")
    skipping = optax.MultiSteps(adamw, EVERY, should_skip_update_fn=optax.skip_not_finite)
    skipping_micro_batches, skipping_finite = finite_steps(skipping, "inner_opt_state")
    micro_batches, finite = finite_steps(
        accumulation.accumulate(optim_zoo.adamw(LEARNING_RATE), EVERY), "inner"
    )
    return Row(
        f"one of {EVERY} micro-batches has a NaN",
        f"`MultiSteps`: {spoiled} of the next {after} steps finite, even from good parameters and "
        f"inner state; with `skip_not_finite` {skipping_finite}, the step made after "
        f"{skipping_micro_batches} micro-batches",
        f"`accumulate`: {finite} of {after} finite, the step made after {micro_batches} "
        f"micro-batches",
        {
            "steps": after,
            "optax_finite_steps": spoiled,
            "optax_skipping_finite_steps": skipping_finite,
            "optax_skipping_micro_batches": skipping_micro_batches,
            "ours_finite_steps": finite,
            "ours_micro_batches": micro_batches,
        },
    )


def inner_calls() -> Row:
    """Counts how often the inner optimizer runs."""
    steps = 5

    def calls(wrap: Callable[[optax.GradientTransformation], Any]) -> int:
        """Counts the inner updates: a callback runs only in the branch that is taken."""
        count = 0

        def counted() -> None:
            nonlocal count
            count += 1

        def update(updates: Tree, state: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
            jax.debug.callback(counted)
            return updates, state

        tx = wrap(optax.GradientTransformation(lambda _: optax.EmptyState(), update))
        gradients = [jnp.ones(4)] * (EVERY * steps)
        run(tx, jnp.ones(4), gradients)
        jax.effects_barrier()
        return count

    theirs = calls(lambda inner: optax.MultiSteps(inner, EVERY))
    ours = calls(lambda inner: accumulation.accumulate(inner, EVERY))
    return Row(
        f"inner updates executed for {steps} steps of {EVERY} micro-batches",
        f"`MultiSteps`: {theirs}",
        f"`accumulate`: {ours}",
        {"steps": steps, "optax_calls": theirs, "ours_calls": ours},
    )


def token_weights() -> Row:
    """Measures a least-squares gradient over micro-batches of 64, 48, 24 and 8 tokens."""
    tokens, width = (64, 48, 24, 8), 16
    rng = np.random.default_rng(0)
    x = rng.normal(size=(sum(tokens), width))
    error = x @ rng.normal(size=width) + rng.normal(size=sum(tokens))
    of_tokens = (x * error[:, None]).astype(np.float32)
    whole = of_tokens.mean(axis=0)
    means = [part.mean(axis=0) for part in np.split(of_tokens, np.cumsum(tokens)[:-1])]

    def percent(tx: Any, weights: Sequence[dict[str, float]]) -> float:
        params = run(tx, jnp.zeros(width), [jnp.asarray(mean) for mean in means], weights)[-1]
        return float(100 * np.linalg.norm(whole + params) / np.linalg.norm(whole))

    theirs = percent(optax.MultiSteps(optax.sgd(1.0), EVERY), [{}] * EVERY)
    ours = percent(
        accumulation.accumulate(optim_zoo.sgd(1.0), EVERY), [{"weight": float(n)} for n in tokens]
    )
    counts = ", ".join(map(str, tokens))
    return Row(
        f"micro-batches of {counts} masked tokens: distance from the gradient of the full batch",
        f"`MultiSteps`, which takes no weights: {theirs:.2g} %",
        f"`accumulate(...).update(..., weight=tokens)`: {ours:.1g} %",
        {"optax_percent": theirs, "ours_percent": ours},
    )


def low_precision_mean() -> Row:
    """Measures the error of the mean of bfloat16 gradients between 1 and 2.

    SGD with learning rate 1 on zeros makes the mean visible: it is the negated parameters.
    """
    rng = np.random.default_rng(0)
    gradients = [jnp.asarray(1 + rng.random(1000), jnp.bfloat16) for _ in range(EVERY)]
    mean = np.mean([np.asarray(g, np.float64) for g in gradients], axis=0)

    def error(tx: Any) -> float:
        params = run(tx, jnp.zeros(1000), gradients)[-1]
        return float(np.max(np.abs(mean + np.asarray(params, np.float64)) / mean))

    theirs = error(optax.MultiSteps(optax.sgd(1.0), EVERY))
    ours = error(accumulation.accumulate(optim_zoo.sgd(1.0), EVERY))
    return Row(
        f"{EVERY} micro-batches of bfloat16 gradients: largest error of the mean passed on",
        f"`MultiSteps`: {100 * theirs:.2g} %",
        f"`accumulate`: {100 * ours:.1g} %",
        {"optax_error": theirs, "ours_error": ours},
    )
