import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim_zoo import clip_by_global_norm, guards, lamb, metrics, sgd
from optim_zoo.wrappers.accumulation import accumulate

# SGD beside LAMB: a trust ratio would hide a mean of the wrong scale.
OPTIMIZERS = {"sgd": lambda: sgd(0.1), "lamb": lambda: lamb(0.1, weight_decay=0.1)}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


@pytest.fixture
def params(rng: np.random.Generator) -> Any:
    return {
        "a": jnp.asarray(rng.normal(size=(3, 4)), "float32"),
        "b": jnp.array([-0.0, 1.0, 2.0, 3.0]),
    }


def _gradients(rng: np.random.Generator, params: Any, count: int) -> list[Any]:
    return [
        jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), "float32"), params)
        for _ in range(count)
    ]


def _run(
    tx: optax.GradientTransformation, params: Any, steps: list[tuple[Any, dict[str, Any]]]
) -> tuple[Any, Any]:
    state, update = tx.init(params), jax.jit(tx.update)
    for gradients, extra in steps:
        updates, state = update(gradients, state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


def _mean(gradients: list[Any], weights: list[float]) -> Any:
    """In float64."""
    total = sum(weights)

    def mean(*leaves: Any) -> jax.Array:
        added = sum(np.float64(g) * w for g, w in zip(leaves, weights, strict=True))
        return jnp.asarray(added / total, "float32")

    return jax.tree.map(mean, *gradients)


def _assert_close(actual: Any, expected: Any) -> None:
    """Float32 sums in another order: some 1e-7, through LAMB's quotients."""
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=3e-6, atol=1e-7)


@each_optimizer
def test_the_weighted_mean_is_the_whole_batch(
    rng: np.random.Generator, params: Any, make: Any
) -> None:
    """With masked tokens: weights so uneven that the mean of means is far off."""
    gradients, weights = _gradients(rng, params, 6), [1.0, 20.0, 3.0, 100.0, 1.0, 7.0]
    micro = [(g, {"weight": w}) for g, w in zip(gradients, weights, strict=True)]
    trained, state = _run(accumulate(make(), 3), params, micro)
    whole = [(_mean(gradients[i : i + 3], weights[i : i + 3]), {}) for i in (0, 3)]
    expected, inner = _run(make(), params, whole)
    _assert_close((trained, state.inner), (expected, inner))
    unweighted, _ = _run(accumulate(make(), 3), params, [(g, {}) for g in gradients])
    apart = np.abs(np.asarray(unweighted["a"] - expected["a"])).max()
    assert apart > 0.01  # the weights matter


def test_the_mean_of_a_loss_over_masked_tokens(rng: np.random.Generator) -> None:
    """Each micro-batch gives the gradient of its own mean, and its number of tokens."""
    x = jnp.asarray(rng.normal(size=(12, 3)), "float32")
    mask = jnp.asarray(rng.random(12) < 0.3, "float32").at[0].set(1).at[4].set(1).at[8].set(1)

    def loss(w: jax.Array, rows: slice) -> jax.Array:
        return jnp.sum((x[rows] @ w) ** 2 * mask[rows]) / jnp.sum(mask[rows])

    w, tx = jnp.ones(3), accumulate(sgd(0.1), 3)
    state = tx.init(w)
    for i in range(3):
        rows = slice(4 * i, 4 * i + 4)
        updates, state = tx.update(jax.grad(loss)(w, rows), state, w, weight=jnp.sum(mask[rows]))
    expected = -0.1 * jax.grad(loss)(w, slice(None))
    np.testing.assert_allclose(updates, expected, rtol=1e-6)


@each_optimizer
def test_between_steps_nothing_changes(rng: np.random.Generator, params: Any, make: Any) -> None:
    tx = accumulate(make(), 3)
    state = tx.init(params)
    for gradients in _gradients(rng, params, 2):
        updates, after = tx.update(gradients, state, params)
        moved = optax.apply_updates(params, updates)
        for x, y in zip(
            jax.tree.leaves((moved, after.inner)),
            jax.tree.leaves((params, state.inner)),
            strict=True,
        ):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()  # the negative zero too
        state = after
    assert (state.micro_batches, state.steps) == (2, 0)


@each_optimizer
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_micro_batch_that_is_not_finite_is_left_out(
    rng: np.random.Generator, params: Any, make: Any, bad: float
) -> None:
    a, b, c, d = _gradients(rng, params, 4)
    broken = {**b, "a": b["a"].at[1, 2].set(bad)}
    weights = [{"weight": w} for w in (2.0, 50.0, 3.0)]
    micro = list(zip([a, broken, c], weights, strict=True)) + [(d, {})] * 3
    trained, state = _run(accumulate(make(), 3), params, micro)
    expected, _ = _run(make(), params, [(_mean([a, c], [2.0, 3.0]), {}), (d, {})])
    _assert_close(trained, expected)
    assert (state.skipped.micro_batches, state.steps) == (1, 2)
    assert metrics.read(state)["skipped_micro_batches"] == 1
    # A weight that is not finite is as bad.
    weighed, _ = _run(
        accumulate(make(), 3), params, [(a, weights[0]), (b, {"weight": bad}), (c, weights[2])]
    )
    _assert_close(weighed, _run(make(), params, [(_mean([a, c], [2.0, 3.0]), {})])[0])


@each_optimizer
def test_without_a_finite_micro_batch_there_is_no_step(
    rng: np.random.Generator, params: Any, make: Any
) -> None:
    (good,) = _gradients(rng, params, 1)
    broken = jax.tree.map(lambda g: g * jnp.nan, good)
    trained, state = _run(accumulate(make(), 2), params, [(broken, {})] * 2 + [(good, {})] * 2)
    expected, inner = _run(make(), params, [(good, {})])
    _assert_close((trained, state.inner), (expected, inner))
    assert (state.skipped.micro_batches, state.steps, state.micro_batches) == (2, 2, 0)
    assert metrics.read(state)["skipped_steps"] == 1


def test_too_many_times_without_a_step_are_told(params: Any) -> None:
    """A guard inside sees none of them."""
    broken = (jax.tree.map(lambda x: x * jnp.nan, params), {})
    tx = accumulate(guards.skip_nonfinite(sgd(0.1)), 2, max_consecutive=2)
    guards.check(_run(tx, params, [broken] * 3)[1])
    guards.check(_run(tx, params, [broken] * 2 + [(params, {})] * 2 + [broken] * 2)[1])
    with pytest.raises(guards.TooManyRefusals, match="2 steps in a row"):
        guards.check(_run(tx, params, [broken] * 4)[1])


def test_no_weight_is_no_step(rng: np.random.Generator, params: Any) -> None:
    (good,) = _gradients(rng, params, 1)
    trained, _ = _run(accumulate(sgd(0.1), 2), params, [(good, {"weight": 0.0})] * 2)
    jax.tree.map(np.testing.assert_array_equal, trained, params)


def test_taken_as_they_come(rng: np.random.Generator, params: Any) -> None:
    (good,) = _gradients(rng, params, 1)
    broken = {**good, "a": good["a"] * jnp.nan}
    tx = accumulate(sgd(0.1), 2, skip_nonfinite=False)
    trained, state = _run(tx, params, [(broken, {}), (good, {})])
    assert np.isnan(trained["a"]).all()
    assert np.isfinite(trained["b"]).all()
    # What was summed is of the step before, and a NaN in it harms no other.
    updates, _ = tx.update(good, tx.update(good, state, params)[1], params)
    assert np.isfinite(updates["a"]).all()


def test_every_may_be_a_schedule_of_the_step(rng: np.random.Generator, params: Any) -> None:
    tx = accumulate(sgd(0.1), lambda step: jnp.where(step < 2, 1, 3))
    state, moved = tx.init(params), []
    for gradients in _gradients(rng, params, 8):
        updates, state = jax.jit(tx.update)(gradients, state, params)
        moved.append(bool(jnp.any(updates["a"] != 0)))
    assert moved == [True, True, False, False, True, False, False, True]
    assert state.steps == 4


def _primitives(jaxpr: Any) -> list[str]:
    """Of a jaxpr and all it calls, but not of the branches of a cond."""
    names = []
    for eqn in jaxpr.eqns:
        names.append(eqn.primitive.name)
        if eqn.primitive.name != "cond":
            for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(value, "jaxpr", value)
                names += _primitives(inner) if hasattr(inner, "eqns") else []
    return names


def test_the_inner_transformation_is_in_one_branch_of_one_cond(params: Any) -> None:
    """A stand-in whose tangent is found nowhere else."""
    inner = optax.stateless(lambda updates, _: jax.tree.map(jnp.tan, updates))
    tx = accumulate(inner, 4)
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr
    assert "tan" not in _primitives(jaxpr)
    conds = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "cond"]
    counts = [
        sorted(_primitives(branch.jaxpr).count("tan") for branch in cond.params["branches"])
        for cond in conds
    ]
    # The others hold the decision whether to take the micro-batch.
    assert [count for count in counts if any(count)] == [[0, len(params)]]


def test_no_copy_of_the_state_is_made() -> None:
    """The temporaries are the updates, and one leaf's direction or two."""
    tx = accumulate(lamb(0.1, weight_decay=0.1), 4)
    params = {f"layer_{i}": jnp.zeros((256, 256)) for i in range(8)}

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    assert not re.findall(r"= f32\[256,256\]\S* copy\(", compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < 1.2 * 4 * 8 * 256**2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_summed_and_handed_on_in_float32(dtype: str) -> None:
    seen = []

    def remember(updates: Any, _: Any) -> Any:
        seen.append(updates["a"].dtype)
        return updates

    tx = accumulate(optax.stateless(remember), 3)
    params = {"a": jnp.ones(4, dtype)}
    state = tx.init(params)
    for g in (1.0, 2**-9, 2**-9):
        updates, state = tx.update({"a": jnp.full(4, g, dtype)}, state, params)
    assert set(seen) == {jnp.dtype("float32")}
    # Added in bfloat16 the small ones would be lost; a third is exact to float32.
    np.testing.assert_allclose(updates["a"], (1 + 2**-8) / 3, rtol=1e-6)


def test_in_a_scan_around_clipping_with_metrics(rng: np.random.Generator, params: Any) -> None:
    """Clipping inside sees the mean; outside it would see micro-batches."""
    tx = accumulate(optax.chain(clip_by_global_norm(0.5), lamb(0.1)), 2)
    gradients = _gradients(rng, params, 4)

    def step(carry: Any, g: Any) -> tuple[Any, jax.Array]:
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), metrics.read(state)["gradient_norm"]

    stacked = jax.tree.map(lambda *g: jnp.stack(g), *gradients)
    (trained, _), norms = jax.jit(lambda c: jax.lax.scan(step, c, stacked))(
        (params, tx.init(params))
    )
    means = [_mean(gradients[i : i + 2], [1, 1]) for i in (0, 2)]
    expected, _ = _run(
        optax.chain(clip_by_global_norm(0.5), lamb(0.1)), params, [(g, {}) for g in means]
    )
    _assert_close(trained, expected)
    first, second = (float(optax.tree.norm(g)) for g in means)
    np.testing.assert_allclose(norms, [0, first, first, second], rtol=1e-6)


def test_a_loss_is_averaged_and_one_that_is_not_finite_leaves_its_batch_out(params: Any) -> None:
    """Else a guard inside would judge a step by the loss of its last micro-batch."""
    seen = []

    def update(updates: Any, state: Any, params: Any = None, *, value: Any, **_: Any) -> Any:
        jax.debug.callback(lambda value: seen.append(float(value)), value)
        return updates, state

    recorder = optax.GradientTransformationExtraArgs(lambda _: (), update)
    tx = accumulate(guards.skip_nonfinite(recorder), 3)
    state = tx.init(params)
    for value, weight in ((1.0, 1.0), (4.0, 3.0), (jnp.inf, 2.0)):
        updates, state = tx.update(params, state, params, value=value, weight=weight)
    jax.effects_barrier()
    assert seen == [3.25]
    np.testing.assert_allclose(updates["a"], params["a"], rtol=1e-6)
    assert metrics.read(state) == {"skipped_steps": 0, "skipped_micro_batches": 1}


def test_extra_arguments_reach_the_inner_transformation(params: Any) -> None:
    def update(updates: Any, state: Any, params: Any = None, *, value: Any, **_: Any) -> Any:
        return jax.tree.map(lambda g: g * value, updates), state

    tx = accumulate(optax.GradientTransformationExtraArgs(lambda _: (), update), 1)
    updates, _ = tx.update(params, tx.init(params), params, value=3.0)
    np.testing.assert_allclose(updates["a"], 3 * params["a"], rtol=1e-6)


def test_float64_gradients_of_float32_parameters_are_summed_in_float32() -> None:
    with jax.enable_x64(True):
        params = {"a": jnp.ones(3, "float32")}
        tx = accumulate(sgd(0.1), 2)
        state = tx.init(params)
        _, after = tx.update({"a": jnp.ones(3, "float64")}, state, params)
        assert after.sums["a"].dtype == state.sums["a"].dtype == "float32"


def test_a_weight_that_differs_between_devices_is_refused() -> None:
    """Where types tell: each device would hold a sum, and take its steps, of its own."""
    tx = accumulate(sgd(0.1), 1)

    def step(x: jax.Array, weight: jax.Array) -> Any:
        return tx.update(x, tx.init(x), x, weight=weight[0])[0]

    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(jax.P(), jax.P("data")), out_specs=jax.P())
    weights = jax.device_put(jnp.ones(2), jax.NamedSharding(mesh, jax.P("data")))
    with pytest.raises(ValueError, match=r"weight varies over the mesh axes \['data'\]: add it up"):
        jax.jit(mapped)(jnp.ones(3), weights)


def test_errors(params: Any) -> None:
    with pytest.raises(ValueError, match=r"weight must be one number, got .* shape \(1,\)"):
        one = accumulate(sgd(0.1), 2)
        one.update(params, one.init(params), params, weight=jnp.ones(1))
    with pytest.raises(ValueError, match=r"every must give one number, got .* shape \(1,\)"):
        odd = accumulate(sgd(0.1), lambda step: jnp.ones(1, int))
        odd.update(params, odd.init(params), params)
    with pytest.raises(ValueError, match="max_consecutive must be >= 1, got 0"):
        accumulate(sgd(0.1), 2, max_consecutive=0)
    with pytest.raises(ValueError, match="every must be >= 1, got 0"):
        accumulate(sgd(0.1), 0)
    with pytest.raises(TypeError, match="every must be a whole number"):
        accumulate(sgd(0.1), 1.5)  # type: ignore[arg-type]
    tx = accumulate(sgd(0.1), 2)
    with pytest.raises(ValueError, match=r"accumulate: the gradient of a has shape \(2,\)"):
        tx.update({**params, "a": jnp.ones(2)}, tx.init(params), params)
