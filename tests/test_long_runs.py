"""Tests runs of more than 2^31 steps, where int32 counters saturate."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim_zoo import accumulation, adam, guards, lookahead, metrics, precision, sgd, transforms
from optim_zoo.optimizers.lookahead import LookaheadState
from optim_zoo.transforms.radam import rectification
from tests.test_contract import FULL, Make

pytestmark = pytest.mark.usefixtures("quick_to_compile")

LAST = 2**31 - 1  # the largest count
START = LAST - 2
# At this count the bias corrections are also 1, because 0.999^EARLY is 0 in float32. EARLY and
# START agree modulo 5040, and so modulo every synchronization period of Lookahead up to 10.
EARLY = START % 5040 + 200 * 5040


def _chained(piece: Callable[[], optax.GradientTransformation]) -> Make:
    return lambda rate: optax.chain(piece(), transforms.scale_by_learning_rate(rate))


COUNTING: dict[str, Make] = {
    **FULL,
    "scale_by_scheduled_nadam": _chained(transforms.scale_by_scheduled_nadam),
    "trace_momentum-dampened": _chained(lambda: transforms.trace_momentum(dampening=0.5)),
}
counting = pytest.mark.parametrize("make", COUNTING.values(), ids=COUNTING)


def _params() -> Any:
    rng = np.random.default_rng(0)
    shapes = {"stack": (2, 4, 3), "dense": {"kernel": (3, 2), "bias": (2,)}, "norm": {"scale": ()}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), "float32"),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def _grads(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), "float32"), _params())


def _with_counts(state: Any, count: int) -> Any:
    """Sets every counter of a state, which are its int32 fields."""
    return jax.tree.map(lambda x: jnp.full_like(x, count) if x.dtype == "int32" else x, state)


def _split(state: Any) -> tuple[list[int], list[jax.Array]]:
    """Returns the counters and the other leaves; a later test covers the counter of Lookahead."""
    if isinstance(state, LookaheadState):
        state = state._replace(fast_steps=None)
    leaves = jax.tree.leaves(state)
    counts = [int(x) for x in leaves if x.dtype == "int32"]
    return counts, [x for x in leaves if x.dtype != "int32"]


@counting
def test_steps_continue_when_the_counter_is_saturated(make: Make) -> None:
    """Compares, to the bit, with a run whose counter is small but whose bias corrections are 1."""
    seen: list[int] = []

    def schedule(step: jax.Array) -> float:
        seen.append(int(step))
        return 0.1

    params = _params()
    tx, reference = make(schedule), make(0.1)
    late = _with_counts(tx.init(params), START)
    early = _with_counts(reference.init(params), EARLY)
    del seen[:]  # `init` calls the schedule too
    with jax.disable_jit():  # so that the schedule receives numbers
        for i in range(5):
            grads = _grads(i)
            updates, late = tx.update(grads, late, params)
            expected, early = reference.update(grads, early, params)
            jax.tree.map(np.testing.assert_array_equal, updates, expected)
            assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
            (counts, rest), (_, expected_rest) = _split(late), _split(early)
            assert set(counts) == {min(START + i + 1, LAST)}
            jax.tree.map(np.testing.assert_array_equal, rest, expected_rest)
            params = optax.apply_updates(params, updates)
    assert seen == [START, START + 1, LAST, LAST, LAST]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (transforms.scale_by_adam, optax.scale_by_adam),
        (transforms.scale_by_nadam, functools.partial(optax.scale_by_adam, nesterov=True)),
        (transforms.scale_by_radam, optax.scale_by_radam),
        (transforms.scale_by_amsgrad, optax.scale_by_amsgrad),
    ],
)
def test_saturated_counters_agree_with_optax(
    ours: Callable[[], optax.GradientTransformation],
    theirs: Callable[[], optax.GradientTransformation],
) -> None:
    params = _params()
    pair = [ours(), theirs()]
    states = [_with_counts(tx.init(params), START) for tx in pair]
    for i in range(4):
        steps = [
            tx.update(_grads(i), state, params) for tx, state in zip(pair, states, strict=True)
        ]
        states = [state for _, state in steps]
        assert states[0].count == states[1].count == min(START + i + 1, LAST)
        # A few float32 roundings: optax multiplies in another order inside the square root.
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, 2e-6, 2e-7), steps[0][0], steps[1][0]
        )


@pytest.mark.parametrize("t", [2**30 - 1, 2**30, LAST])
def test_rectification_does_not_overflow_for_a_long_average(t: int) -> None:
    """With b2 = 1 - 2^-27, the term 2 t in rho_t is not negligible and must not overflow."""
    b2 = 1 - 2.0**-27
    a = -np.log1p(-(2.0**-27))
    expected = -2 / np.expm1(-a) - 1 - 2 * t / np.expm1(a * t)
    rho, factor = rectification(b2, jnp.asarray(t))
    # exp(a t) with a t <= 16 is off by up to 16 roundings, in a term below 1% of rho_t.
    np.testing.assert_allclose(rho, expected, rtol=1e-6)
    assert 0.9 < factor <= 1


@pytest.mark.parametrize("period", [1, 2, 3, 6, 2**30 - 1, 2**30, LAST])
def test_lookahead_continues_to_synchronize(period: int) -> None:
    tx = lookahead(sgd(1.0), period, 0.5)
    params = {"x": jnp.zeros(2)}
    state = _with_counts(tx.init(params), START - 3)
    update = jax.jit(tx.update)
    for step in range(START - 2, START + 20):
        updates, after = update({"x": jnp.ones(2)}, state, params)
        params = optax.apply_updates(params, updates)
        assert bool((after.slow["x"] != state.slow["x"]).any()) == (step % period == 0)
        assert 0 < int(after.fast_steps) <= LAST
        assert int(after.fast_steps) % period == step % period
        # The counter must not return to the first period, which some implementations treat
        # differently.
        assert int(after.fast_steps) > period or period > 2**29
        state = after


def _rising(step: jax.Array) -> jax.Array:
    """Returns 1, 2 and 3 at START, START + 1 and LAST, and less than 1 at earlier steps."""
    return jnp.asarray(step - (START - 1), float)


def test_accumulation_continues_when_the_counter_is_saturated() -> None:
    """The schedules of the learning rate and of ``every`` never see an earlier step."""
    tx = accumulation.accumulate(
        sgd(_rising, momentum=0.5), lambda step: jnp.where(step >= START, 2, 1)
    )
    params = {"x": jnp.zeros(2)}
    state = tx.init(params)
    changed = ("steps", "skipped_micro_batches", "inner")
    state = state._replace(**{k: _with_counts(getattr(state, k), START) for k in changed})
    update = jax.jit(tx.update)
    steps, rates, moved = [], [], []
    for i in range(10):
        broken = i % 2 == 1
        grads = {"x": jnp.asarray([1.0, np.nan if broken else 1.0])}
        updates, state = update(grads, state, params)
        steps.append(int(state.steps))
        rates.append(float(metrics.read(state)["learning_rate"]))
        moved.append(bool(np.asarray(updates["x"]).any()))
        assert np.isfinite(updates["x"]).all()
    assert moved == [False, True] * 5
    assert steps == [START, *[START + 1] * 2, *[LAST] * 7]
    assert rates[1::2] == [1, 2, 3, 3, 3]
    assert LAST in jax.tree.leaves(state.skipped_micro_batches)


def test_the_counter_of_skipped_steps_saturates() -> None:
    tx = guards.skip_nonfinite(adam(0.1))
    params = {"x": jnp.zeros(2)}
    state = tx.init(params)
    full = jnp.asarray(START, jnp.int32)
    state = state._replace(skipped_steps=state.skipped_steps._replace(total=full, in_a_row=full))
    update = jax.jit(tx.update)
    for _ in range(4):
        _, state = update({"x": jnp.asarray([1.0, np.nan])}, state, params)
    assert state.skipped_steps.total == state.skipped_steps.in_a_row == LAST
    with pytest.raises(guards.TooManyRefusals):
        guards.check(state)


@pytest.mark.parametrize("window", [3, 4])
def test_spikes_are_compared_with_the_last_steps(window: int) -> None:
    tx = guards.skip_spikes(sgd(0.1), window=window, factor=4.0)
    params = {"x": jnp.zeros(1)}
    state = tx.init(params)
    state = state._replace(
        made=jnp.asarray(START, jnp.int32), norms=jnp.ones(window), values=jnp.ones(window)
    )
    update = jax.jit(tx.update)
    for i in range(4 * window):
        _, state = update({"x": jnp.asarray([1.0 + i / 100])}, state, params, value=1.0)
        assert state.made >= window
    # The window holds the norms of the last steps, each once.
    expected = [1.0 + i / 100 for i in range(3 * window, 4 * window)]
    np.testing.assert_allclose(np.sort(state.norms), expected, rtol=1e-6)
    _, skipped = update({"x": jnp.asarray([100.0])}, state, params, value=1.0)
    assert skipped.skipped_steps.total == 1


class _Constant(NamedTuple):
    nu: jax.Array


def test_the_key_of_random_rounding_keeps_changing() -> None:
    """With a repeated key, a second moment would be rounded the same way in every step."""
    between = jnp.full(1000, 1 + 2**-9)  # a quarter of the way between two bfloat16 numbers
    inner = optax.GradientTransformation(
        lambda params: _Constant(between), lambda g, state, params=None: (g, _Constant(between))
    )
    tx = precision.store_state(inner, {"nu": "bfloat16"})
    params = {"x": jnp.zeros(1)}
    state = tx.init(params)._replace(count=jnp.asarray(START, jnp.int32))
    update = jax.jit(tx.update)
    rounded = []
    for _ in range(12):
        _, state = update(params, state, params)
        rounded.append(np.asarray(state.inner.nu, np.float32))
    assert len({x.tobytes() for x in rounded}) == len(rounded)
    # Five standard errors of the mean of 12,000 draws with standard deviation 2^-7 sqrt(3)/4.
    assert abs(np.mean(rounded) - (1 + 2**-9)) < 5 * 2**-7 * np.sqrt(3) / 4 / np.sqrt(12000)


@pytest.mark.parametrize("every", [2, 3])
def test_norms_are_still_computed_every_so_many_steps(every: int) -> None:
    tx = metrics.with_metrics(sgd(0.1), every=every)
    params = {"x": jnp.ones(2)}
    state = tx.init(params)._replace(count=jnp.asarray(START - START % every, jnp.int32))
    update = jax.jit(tx.update)
    taken = []
    for i in range(12):
        _, state = update({"x": jnp.full(2, float(i + 1))}, state, params)
        taken.append(float(metrics.read(state)["gradient_norm"]))
    expected = [np.sqrt(2) * (i - i % every + 1) for i in range(12)]
    np.testing.assert_allclose(taken, expected, rtol=1e-6)  # float32 roundings


def test_the_first_update_computes_the_norms() -> None:
    """With ``every=2``, the first, third and fifth updates compute the norms."""
    tx = metrics.with_metrics(sgd(0.1), every=2)
    params = {"x": jnp.ones(2)}
    state = tx.init(params)
    taken = []
    for i in range(5):
        _, state = tx.update({"x": jnp.full(2, float(i + 1))}, state, params)
        taken.append(float(metrics.read(state)["gradient_norm"]))
    np.testing.assert_allclose(taken, np.sqrt(2) * np.asarray([1, 1, 3, 3, 5]), rtol=1e-6)
