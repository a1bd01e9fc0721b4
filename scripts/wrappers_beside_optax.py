"""What optax's wrappers do where this library's do otherwise.

    python scripts/wrappers_beside_optax.py [--table]

Each row is a small experiment that is run here, on eight virtual CPU devices, seconds in all. What
its cells say is made of what was measured. Prints one JSON line a row; with ``--table`` a Markdown
table of the same rows at the end.
"""

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import bench_common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

import optim_zoo
from optim_zoo import accumulation, guards, metrics, precision, registry
from optim_zoo.tree import Tree

EVERY = 4  # micro-batches a step
DEVICES = 8
RATE = 1e-3


class Row(NamedTuple):
    """A row of the table."""

    situation: str
    optax: str
    optim_zoo: str
    figures: Mapping[str, Any]  # what the cells are made of


def nan_micro_batch() -> Row:
    """Each time parameters and inner state are put back to what they were before the NaN."""
    after = 20  # steps that are watched
    params = jnp.ones(4)
    good, bad = jnp.full(4, 0.1), jnp.array([0.1, jnp.nan, 0.1, 0.1])

    def finite_steps(tx: Any, inner: str) -> tuple[int, int]:
        """Micro-batches until the first step, and the steps after it that were finite."""
        step, fresh, seen = _step(tx), tx.init(params), 0
        moved, state, inner_state = params, fresh, getattr(fresh, inner)
        while _same_bits(moved, params):
            moved, state = step(params, state, bad if seen == 1 else good)
            seen += 1
        finite = 0
        for _ in range(after):
            state = state._replace(**{inner: inner_state})
            for _ in range(EVERY):
                moved, state = step(params, state, good)
            finite += bool(np.all(np.isfinite(moved)))
        return seen, finite

    adamw = optax.adamw(RATE)
    _, spoiled = finite_steps(optax.MultiSteps(adamw, EVERY), "inner_opt_state")
    skipping = optax.MultiSteps(adamw, EVERY, should_skip_update_fn=optax.skip_not_finite)
    skipping_micro_batches, skipping_finite = finite_steps(skipping, "inner_opt_state")
    micro_batches, finite = finite_steps(
        accumulation.accumulate(optim_zoo.adamw(RATE), EVERY), "inner"
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
    steps = 5

    def calls(wrap: Callable[[optax.GradientTransformation], Any]) -> int:
        """How often the inner update was executed: a callback runs in the branch taken alone."""
        count = 0

        def counted() -> None:
            nonlocal count
            count += 1

        def update(updates: Tree, state: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
            jax.debug.callback(counted)
            return updates, state

        tx = wrap(optax.GradientTransformation(lambda _: optax.EmptyState(), update))
        gradients = [jnp.ones(4)] * (EVERY * steps)
        _run(tx, jnp.ones(4), gradients)
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
    """The gradient of a least-squares fit, whose micro-batches have 64, 48, 24 and 8 tokens."""
    tokens, width = (64, 48, 24, 8), 16
    rng = np.random.default_rng(0)
    x = rng.normal(size=(sum(tokens), width))
    error = x @ rng.normal(size=width) + rng.normal(size=sum(tokens))
    of_tokens = (x * error[:, None]).astype(np.float32)
    whole = of_tokens.mean(axis=0)
    means = [part.mean(axis=0) for part in np.split(of_tokens, np.cumsum(tokens)[:-1])]

    def percent(tx: Any, weights: Sequence[dict[str, float]]) -> float:
        params = _run(tx, jnp.zeros(width), [jnp.asarray(mean) for mean in means], weights)[-1]
        return float(100 * np.linalg.norm(whole + params) / np.linalg.norm(whole))

    theirs = percent(optax.MultiSteps(optax.sgd(1.0), EVERY), [{}] * EVERY)
    ours = percent(
        accumulation.accumulate(optim_zoo.sgd(1.0), EVERY), [{"weight": float(n)} for n in tokens]
    )
    counts = ", ".join(map(str, tokens))
    return Row(
        f"micro-batches of {counts} masked tokens: distance from the gradient of the whole batch",
        f"`MultiSteps`, which takes no weights: {theirs:.2g} %",
        f"`accumulate(...).update(..., weight=tokens)`: {ours:.1g} %",
        {"optax_percent": theirs, "ours_percent": ours},
    )


def low_precision_mean() -> Row:
    """Gradients between 1 and 2; what is handed on is read as the step of SGD on zeros."""
    rng = np.random.default_rng(0)
    gradients = [jnp.asarray(1 + rng.random(1000), jnp.bfloat16) for _ in range(EVERY)]
    mean = np.mean([np.asarray(g, np.float64) for g in gradients], axis=0)

    def error(tx: Any) -> float:
        params = _run(tx, jnp.zeros(1000), gradients)[-1]
        return float(np.max(np.abs(mean + np.asarray(params, np.float64)) / mean))

    theirs = error(optax.MultiSteps(optax.sgd(1.0), EVERY))
    ours = error(accumulation.accumulate(optim_zoo.sgd(1.0), EVERY))
    return Row(
        f"{EVERY} micro-batches of bfloat16 gradients: largest error of the mean handed on",
        f"`MultiSteps`: {100 * theirs:.2g} %",
        f"`accumulate`: {100 * ours:.1g} %",
        {"optax_error": theirs, "ours_error": ours},
    )


def small_steps() -> Row:
    """Of 1,024 parameters with the same gradient, so that the noise of a rounding is seen."""
    steps = 1000
    one = jnp.ones(1024)

    def end(tx: Any, dtype: str) -> tuple[float, float]:
        params = _scan(tx, one.astype(dtype), one.astype(dtype), steps)[0].astype(jnp.float32)
        return float(params.mean()), float(params.std())

    wide, _ = end(optax.adamw(RATE), "float32")
    theirs, _ = end(optax.adamw(RATE), "bfloat16")
    inner = optim_zoo.adamw(RATE)
    master, _ = end(precision.master_weights(inner), "bfloat16")
    rounding = precision.stochastic_rounding(inner, jax.random.key(0))
    rounded, deviation = end(rounding, "bfloat16")
    return Row(
        f"bfloat16 parameters: {steps:,} steps of AdamW at {RATE} from 1, in float32 to "
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
    """Of 1,024 parameters, as in `small_steps`."""
    steps, b2 = 3000, 0.999
    one = jnp.ones(1024)
    expected = 1 - b2**steps

    def shares(tx: Any, dtype: str) -> tuple[float, float]:
        state = _scan(tx, one.astype(dtype), one.astype(dtype), steps)[1]
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


# Those whose update needs gradients and parameters alone; what has momentum by choice has it here.
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
    params = {"kernel": jnp.ones((4, 4), jnp.bfloat16), "bias": jnp.ones(4, jnp.bfloat16)}
    gradients = jax.tree.map(lambda x: jnp.full(x.shape, 0.1, jnp.float32), params)

    def fails(tx: Any) -> bool:
        return bool(_scan_raises(tx, params, gradients))

    theirs = {
        name: fails(getattr(optax, name)(RATE, **arguments))
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


def nans_in_a_row() -> Row:
    borne = 3
    params = jnp.array([1.0, -2.0])
    bad = [jnp.array([jnp.nan, 1.0])] * (borne + 1)

    def first_change(made: Sequence[jax.Array]) -> int | None:
        changed = [i + 1 for i, x in enumerate(made) if not _same_bits(x, params)]
        return changed[0] if changed else None

    theirs = _run(optax.apply_if_finite(optax.adamw(RATE), borne), params, bad)
    guarded = guards.skip_nonfinite(optim_zoo.adamw(RATE), borne)
    ours, states = _run_with_states(guarded, params, bad)
    raised = [i + 1 for i, state in enumerate(states) if _check_raises(state)]
    spoiled, touched = first_change(theirs), first_change(ours)
    lost = bool(jnp.any(jnp.isnan(theirs[-1])))
    return Row(
        f"{len(bad)} NaN gradients in a row, where {borne} are borne",
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


def negative_zero() -> Row:
    """A gradient that must not move parameters: NaN for a guard, the first of a micro-batch."""
    # `MultiSteps` multiplies the update by 0. A product of 0.0 changes a parameter of -0.0, and a
    # product of -0.0 does not. XLA's version decides which sign of the gradient gives 0.0.
    params = jnp.array([-0.0, -0.0, 0.0, 1.0])
    bad, good = jnp.array([jnp.nan, 1.0, 1.0, 1.0]), jnp.array([1.0, -1.0, 1.0, 1.0])

    def changed(tx: Any, gradient: jax.Array) -> bool:
        return not _same_bits(_run(tx, params, [gradient])[-1], params)

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
            f"`{name}`: {'another number' if x else 'kept to the bit'}" for name, x in seen.items()
        )

    return Row(
        "a step that is not made, on a parameter of -0.0",
        cell(theirs),
        cell(ours),
        {"optax_changed": theirs, "ours_changed": ours},
    )


def spike() -> Row:
    """Gradients as in training: their norm falls, here to a hundredth in 300 steps."""
    steps, at, window, factor, size = 300, 290, 50, 4.0, 100
    norms = np.geomspace(1.0, 0.01, steps)
    norms[at] *= size
    gradients = [jnp.array([norm, 0.0]) for norm in norms]

    def refused(tx: Any) -> tuple[bool, int]:
        """Whether the spike was refused, and how many others."""
        params = [jnp.zeros(2), *_run(tx, jnp.zeros(2), gradients)]
        steps_refused = [_same_bits(*params[i : i + 2]) for i in range(steps)]
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


def metrics_in_scan() -> Row:
    params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    monitor, snapshot = (
        optax.chain(optax.adamw(RATE), piece)
        for piece in (
            optax.monitor({"norm": optax.tree.norm}),
            optax.snapshot("norm", optax.tree.norm),
        )
    )
    ours = metrics.with_metrics(optim_zoo.lamb(RATE))
    theirs = {
        name: _scan_raises(tx, params, params)
        for name, tx in {"monitor": monitor, "snapshot": snapshot}.items()
    }
    raised = _scan_raises(ours, params, params)
    read = [] if raised else sorted(metrics.read(_scan(ours, params, params, 2)[1]))
    kinds = sorted({name.partition("/")[0].replace("_", " ") for name in read})
    return Row(
        "norms of a step inside `lax.scan`",
        "; ".join(
            f"`{name}`: {f'`{error}`' if error else 'a measure of the updates where it stands'}"
            for name, error in theirs.items()
        ),
        f"`with_metrics`: {f'`{raised}`' if raised else ', '.join(kinds)}",
        {"optax_raises": theirs, "ours_raises": raised, "ours_values": read},
    )


def nan_on_one_device() -> Row:
    """Nothing is averaged over the devices: each holds another part of the parameters."""
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
        return sum(not _same_bits(new, old) for new, old in zip(made, params, strict=True))

    def cell(seen: Mapping[str, int]) -> str:
        return ", ".join(f"{n} of {len(devices)} under `{mode}`" for mode, n in seen.items())

    theirs = {mode: moved(mode, optax.apply_if_finite(optax.adamw(RATE), 3)) for mode in modes}
    inner = optim_zoo.adamw(RATE)
    ours = {
        "pmap": moved("pmap", guards.skip_nonfinite(inner, axis_name="model")),
        "shard_map": moved("shard_map", guards.skip_nonfinite(inner)),
    }
    return Row(
        f"parameters cut over {len(devices)} devices, a NaN on one of them: devices that make the "
        f"step",
        f"`apply_if_finite`: {cell(theirs)}",
        f"`skip_nonfinite`: {cell(ours)}, the first with `axis_name`",
        {"devices": len(devices), "optax_moved": theirs, "ours_moved": ours},
    )


EXPERIMENTS: Sequence[Callable[[], Row]] = (
    nan_micro_batch,
    inner_calls,
    token_weights,
    low_precision_mean,
    small_steps,
    second_moment,
    state_dtypes,
    nans_in_a_row,
    nan_on_one_device,
    spike,
    negative_zero,
    metrics_in_scan,
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="Markdown at the end")
    arguments = parser.parse_args(argv)
    rows = []
    for experiment in EXPERIMENTS:
        row = experiment()
        rows.append(row)
        cells = {"situation": row.situation, "optax": row.optax, "optim_zoo": row.optim_zoo}
        versions = {"jax": jax.__version__, "optax_version": optax.__version__}
        bench_common.show(experiment.__name__, {**cells, **row.figures, **versions})
    if arguments.table:
        print(table(rows))


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [f"| situation | optax {optax.__version__} | optim_zoo |", "|---|---|---|"]
    lines += [f"| {row.situation} | {row.optax} | {row.optim_zoo} |" for row in rows]
    return "\n".join(lines)


def _step(tx: Any) -> Callable[..., tuple[Tree, Tree]]:
    """A jitted step: (params, state, gradients, **extra) -> (params, state)."""

    @jax.jit
    def step(params: Tree, state: Tree, gradients: Tree, **extra: Any) -> tuple[Tree, Tree]:
        updates, state = tx.update(gradients, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def _run_with_states(
    tx: Any, params: Tree, gradients: Sequence[Tree], extra: Sequence[Mapping[str, Any]] = ()
) -> tuple[list[Tree], list[Tree]]:
    """Parameters and state after each of the gradients."""
    step, state = _step(tx), tx.init(params)
    made: tuple[list[Tree], list[Tree]] = ([], [])
    for i, g in enumerate(gradients):
        params, state = step(params, state, g, **(extra[i] if extra else {}))
        made[0].append(params)
        made[1].append(state)
    return made


def _run(
    tx: Any, params: Tree, gradients: Sequence[Tree], extra: Sequence[Mapping[str, Any]] = ()
) -> list[Tree]:
    return _run_with_states(tx, params, gradients, extra)[0]


def _scan(tx: Any, params: Tree, gradients: Tree, steps: int) -> tuple[Tree, Tree]:
    """Parameters and state after steps with the same gradients."""
    step = _step(tx)

    def body(carry: tuple[Tree, Tree], _: None) -> tuple[tuple[Tree, Tree], None]:
        return step(*carry, gradients), None

    return jax.lax.scan(body, (params, tx.init(params)), None, length=steps)[0]


def _scan_raises(tx: Any, params: Tree, gradients: Tree) -> str:
    """What tracing a scan of steps raises, or the empty string."""
    try:
        jax.eval_shape(functools.partial(_scan, tx, steps=2), params, gradients)
    except TypeError as error:
        return type(error).__name__
    return ""


def _same_bits(x: jax.typing.ArrayLike, y: jax.typing.ArrayLike) -> bool:
    return np.asarray(x).tobytes() == np.asarray(y).tobytes()


def _check_raises(state: Tree) -> bool:
    try:
        guards.check(state)
    except guards.TooManyRefusals:
        return True
    return False


def _among(name: str, failed: Mapping[str, bool]) -> str:
    return "among them" if failed[name] else "not among them"


def _refused(was: bool) -> str:
    return "refused" if was else "let through"


def _step_number(number: int | None, does: str) -> str:
    return f"none {does}" if number is None else f"number {number} {does}"


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    main()
