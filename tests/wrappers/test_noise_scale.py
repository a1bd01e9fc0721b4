import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from optim_zoo import clip_by_global_norm, guards, lamb, metrics, precision, saved_state, sgd
from optim_zoo.wrappers.accumulation import accumulate
from optim_zoo.wrappers.noise_scale import NoiseScaleState, ratio

pytestmark = pytest.mark.usefixtures("quick_to_compile")

PARAMS = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}


def _read(state: Any) -> float:
    return float(metrics.read(state)["gradient_noise_scale"])


def _gradients(rng: np.random.Generator, count: int) -> Any:
    """Returns ``count`` gradients, stacked, with a mean that their noise does not hide."""
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(1, 1, (count, *x.shape)), "float32"), PARAMS
    )


def _scan(
    tx: optax.GradientTransformation, gradients: Any, weights: Any = None
) -> tuple[Any, Any, Any]:
    """Returns parameters, state and all updates after one update for each gradient."""

    def update(carry: Any, now: tuple[Any, Any]) -> tuple[Any, Any]:
        (params, state), (g, w) = carry, now
        extra = {} if w is None else {"weight": w}
        updates, state = tx.update(g, state, params, **extra)
        return (optax.apply_updates(params, updates), state), updates

    @jax.jit
    def run(gradients: Any, weights: Any) -> tuple[Any, Any]:
        return jax.lax.scan(update, (PARAMS, tx.init(PARAMS)), (gradients, weights))

    (params, state), updates = run(gradients, weights)
    return params, state, updates


def _by_definition(gradients: Any, weights: Any, every: int, decay: float) -> tuple[float, float]:
    """Returns the averages of tr(Sigma) and of |G|^2, in float64."""
    g = np.concatenate(
        [np.float64(x).reshape(len(x), -1) for x in jax.tree.leaves(gradients)], axis=1
    )
    averages = np.zeros(2)
    for start in range(0, len(g), every):
        rows = np.arange(start, start + every)
        rows = rows[np.isfinite(g[rows]).all(1) & (weights[rows] > 0)]
        w, own = np.float64(weights[rows]), g[rows]
        if len(rows) < 2:
            continue
        mean = w @ own / w.sum()
        trace = (w @ (own**2).sum(1) - w.sum() * mean @ mean) / (len(rows) - 1)
        estimates = np.array([trace, mean @ mean - trace / w.sum()])
        averages = decay * averages + (1 - decay) * estimates
    return averages[0], averages[1]


def test_the_noise_scale_of_a_noisy_quadratic_is_exact_within_5_percent() -> None:
    """The loss ``sum(h (x - c)^2) / 2`` of an example whose ``c`` is normal with deviation ``s``.

    ``G = h x`` and ``tr(Sigma) = |h s|^2``. Micro-batches have 1 to 4 examples; in each step one is
    padding and one is NaN. With decay 0.999 the standard deviation is about 1 %.
    """
    h, x, s = np.array([1.0, 2.0, 4.0, 0.5]), np.array([2.0, -1.0, 0.5, 1.0]), np.ones(4)
    expected = np.sum((h * s) ** 2) / np.sum((h * x) ** 2)
    sizes = jnp.array([1.0, 4, 2, 3, 4, 3, 0, 2])
    tx = accumulate(sgd(0.0), 8, noise_scale=True, noise_decay=0.999)

    def update(state: Any, number: jax.Array) -> tuple[Any, None]:
        size = sizes[number % 8]
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), number), (4,))
        gradient = h * x - h * s * noise / jnp.sqrt(jnp.maximum(size, 1))
        gradient = jnp.where(number % 8 >= 6, jnp.nan, gradient)
        return tx.update(gradient, state, jnp.zeros(4), weight=size)[1], None

    state, _ = jax.jit(lambda: jax.lax.scan(update, tx.init(jnp.zeros(4)), jnp.arange(8 * 8000)))()
    np.testing.assert_allclose(_read(state), expected, rtol=0.05)
    assert metrics.read(state)["skipped_micro_batches"] == 2 * 8000


def test_the_averages_are_those_of_the_definition(rng: np.random.Generator) -> None:
    """Micro-batches without weight and NaN ones do not count, nor does a step with one other."""
    gradients = _gradients(rng, 20)
    gradients["a"] = gradients["a"].at[jnp.array([6, 9, 12, 13, 14])].set(jnp.nan)
    weights = jnp.asarray(rng.integers(1, 9, 20), "float32").at[jnp.array([2, 9])].set(0)
    tx = accumulate(sgd(0.1), 4, noise_scale=True, noise_decay=0.7)
    _, state, _ = _scan(tx, gradients, weights)
    expected = _by_definition(gradients, np.asarray(weights), 4, 0.7)
    averages = (state.inner.trace, state.inner.squared_norm)
    # A difference of sums of squares, in float32: their rounding, 1e-7, times a few.
    np.testing.assert_allclose(averages, expected, rtol=1e-5)
    np.testing.assert_allclose(_read(state), expected[0] / expected[1], rtol=1e-5)


def test_micro_batches_are_the_unit_without_weights(rng: np.random.Generator) -> None:
    gradients = _gradients(rng, 8)
    _, state, _ = _scan(accumulate(sgd(0.1), 4, noise_scale=True), gradients)
    trace, squared_norm = _by_definition(gradients, np.ones(8), 4, 0.99)
    np.testing.assert_allclose(_read(state), trace / squared_norm, rtol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.chain(clip_by_global_norm(1.0), lamb(0.1)),
        lambda: guards.skip_nonfinite(precision.master_weights(sgd(0.1))),
    ],
    ids=["clipped", "guarded"],
)
def test_nothing_else_changes(rng: np.random.Generator, make: Any) -> None:
    """To the last bit, and the state of the optimizer is that without the noise scale."""
    gradients = _gradients(rng, 9)
    gradients["b"] = gradients["b"].at[4].set(jnp.inf)
    params, state, updates = _scan(accumulate(make(), 3, noise_scale=True), gradients)
    plain = _scan(accumulate(make(), 3), gradients)
    actual = (params, state._replace(inner=state.inner.inner), updates)
    assert jax.tree.structure(actual) == jax.tree.structure(plain)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.isfinite(_read(state))


def test_a_guard_outside_leaves_its_micro_batches_out(rng: np.random.Generator) -> None:
    gradients = _gradients(rng, 5)
    guarded = jax.tree.map(lambda g: g.at[1].set(jnp.nan), gradients)
    kept = jax.tree.map(lambda g: g[jnp.array([0, 2, 3, 4])], gradients)
    make = accumulate(sgd(0.1), 4, noise_scale=True)
    _, state, _ = _scan(guards.skip_nonfinite(make), guarded)
    _, expected, _ = _scan(make, kept)
    assert _read(state) == _read(expected)


def test_the_averages_of_a_step_that_cannot_be_measured_are_kept(rng: np.random.Generator) -> None:
    """Squares that overflow, and a schedule that begins with a single micro-batch."""
    tx = accumulate(sgd(0.1), lambda step: jnp.where(step == 0, 1, 2), noise_scale=True)
    state = tx.init(PARAMS)
    update = jax.jit(tx.update)
    seen = []
    for scale in (1.0, 1.0, 1.0, 1e25, 1.0, 1e25, 1e25):
        gradients = jax.tree.map(lambda g: scale * g[0], _gradients(rng, 1))  # noqa: B023
        _, state = update(gradients, state, PARAMS)
        seen.append(_read(state))
    assert np.isnan(seen[:2]).all()  # nothing is measured yet
    assert seen[2] > 0
    assert seen[3:] == seen[2:3] * 4


def test_a_gradient_that_is_lost_in_its_noise_has_an_infinite_noise_scale() -> None:
    """Two opposite gradients: their mean is 0, and the estimate of |G|^2 is negative."""
    tx = accumulate(sgd(0.1), 2, noise_scale=True)
    _, state, _ = _scan(tx, jax.tree.map(lambda x: jnp.stack([x, -x]), PARAMS))
    assert state.inner.squared_norm < 0
    assert _read(state) == np.inf
    zero = jnp.zeros(())
    assert np.isnan(ratio(zero, zero))
    assert ratio(zero, zero + 1) == 0


@pytest.mark.parametrize("mapping", ["pmap", "unchecked", "shard_map"])
def test_leaves_that_are_sharded_in_a_mapped_function(
    rng: np.random.Generator, mapping: str
) -> None:
    """A leaf has a block on each device, the other leaf is replicated."""
    gradients = jnp.asarray(rng.normal(1, 1, (4, 4)), "float32")
    axis_name = None if mapping == "shard_map" else [("sharded", "model")]

    def run(sharded: Any, replicated: Any, axis_name: Any = axis_name) -> jax.Array:
        tx = accumulate(sgd(0.1), 4, noise_scale=True, axis_name=axis_name)
        like = {"sharded": sharded[0], "replicated": replicated[0]}
        state = tx.init(like)
        for i in range(4):
            now = {"sharded": sharded[i], "replicated": replicated[i]}
            _, state = tx.update(now, state, like)
        return metrics.read(state)["gradient_noise_scale"]

    expected = jax.jit(lambda g: run(g, g, None))(gradients)
    if mapping == "pmap":
        devices = jax.devices()[:2]
        mapped = jax.pmap(run, "model", in_axes=(0, None), devices=devices)
        blocks = gradients.reshape(4, 2, 2).swapaxes(0, 1)
        actual = mapped(blocks, gradients)
    else:
        mesh = jax.make_mesh(
            (2,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]
        )
        specs = (P(None, "model"), P())
        checked = mapping == "shard_map"
        mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=checked)
        actual = jax.jit(mapped)(gradients, gradients)
    np.testing.assert_allclose(actual, jnp.broadcast_to(expected, actual.shape), rtol=1e-5)


def test_a_gradient_that_is_not_averaged_over_devices_is_refused() -> None:
    tx = accumulate(sgd(0.1), 2, noise_scale=True)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def update(gradient: jax.Array) -> Any:
        params = jnp.ones(1)
        return tx.update(gradient, tx.init(params), params)[0]

    mapped = jax.shard_map(update, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    with pytest.raises(ValueError, match=r"varies over the mesh axes \['data'\]"):
        jax.eval_shape(mapped, jnp.ones(2))


def test_groups_have_their_own() -> None:
    tx = optax.partition(
        {name: accumulate(sgd(0.1), 2, noise_scale=True) for name in "ab"}, {"a": "a", "b": "b"}
    )
    found = metrics.read(tx.init(PARAMS))
    assert {"gradient_noise_scale/a", "gradient_noise_scale/b"} <= found.keys()


def test_a_checkpoint_without_it_is_told_apart() -> None:
    with_it, without = (
        accumulate(sgd(0.1), 2, noise_scale=on).init(PARAMS) for on in (True, False)
    )
    assert isinstance(with_it.inner, NoiseScaleState)
    saved_state.check(saved_state.describe(with_it), with_it)
    for saved, now in ((with_it, without), (without, with_it)):
        with pytest.raises(ValueError, match="inner"):
            saved_state.check(saved_state.describe(saved), now)
    with pytest.raises(TypeError, match=re.escape("saved_state.rebuild")):
        metrics.read(serialization.to_state_dict(with_it))


def test_invalid_arguments_raise() -> None:
    with pytest.raises(ValueError, match=r"noise_scale must be False unless .* every=2 or more"):
        accumulate(sgd(0.1), 1, noise_scale=True)
    with pytest.raises(ValueError, match="noise_decay"):
        accumulate(sgd(0.1), 2, noise_scale=True, noise_decay=1.0)
