import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization

from optim_zoo import clip_by_global_norm, guards, lamb, metrics, precision, sgd
from optim_zoo.wrappers.accumulation import accumulate, has_updated

pytestmark = pytest.mark.usefixtures("quick_to_compile")

# SGD as well as LAMB, because a trust ratio would hide a mean of the wrong scale.
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
    """Returns the weighted mean, computed in float64."""
    total = sum(weights)

    def mean(*leaves: Any) -> jax.Array:
        added = sum(np.float64(g) * w for g, w in zip(leaves, weights, strict=True))
        return jnp.asarray(added / total, "float32")

    return jax.tree.map(mean, *gradients)


def _assert_close(actual: Any, expected: Any) -> None:
    """Allows the 1e-7 by which float32 sums in another order differ, and more for LAMB's ratios."""
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=3e-6, atol=1e-7)


@each_optimizer
def test_the_weighted_mean_equals_the_gradient_of_the_whole_batch(
    rng: np.random.Generator, params: Any, make: Any
) -> None:
    """The weights are uneven, as with masked tokens, so that the mean of means is far off."""
    gradients, weights = _gradients(rng, params, 6), [1.0, 20.0, 3.0, 100.0, 1.0, 7.0]
    micro = [(g, {"weight": w}) for g, w in zip(gradients, weights, strict=True)]
    trained, state = _run(accumulate(make(), 3), params, micro)
    whole = [(_mean(gradients[i : i + 3], weights[i : i + 3]), {}) for i in (0, 3)]
    expected, inner = _run(make(), params, whole)
    _assert_close((trained, state.inner), (expected, inner))
    unweighted, _ = _run(accumulate(make(), 3), params, [(g, {}) for g in gradients])
    difference = np.abs(np.asarray(unweighted["a"] - expected["a"])).max()
    assert difference > 0.01  # the weights matter


def test_token_counts_as_weights_give_the_mean_over_masked_tokens(rng: np.random.Generator) -> None:
    """The weight of each micro-batch is its number of tokens."""
    x = jnp.asarray(rng.normal(size=(12, 3)), "float32")
    mask = jnp.asarray(rng.random(12) < 0.3, "float32").at[0].set(1).at[4].set(1).at[8].set(1)

    def loss(w: jax.Array, rows: slice) -> jax.Array:
        return jnp.sum((x[rows] @ w) ** 2 * mask[rows]) / jnp.sum(mask[rows])

    w, tx = jnp.ones(3), accumulate(sgd(0.1), 3)

    @jax.jit
    def train(w: jax.Array) -> Any:
        state = tx.init(w)
        for i in range(3):
            rows = slice(4 * i, 4 * i + 4)
            weight = jnp.sum(mask[rows])
            updates, state = tx.update(jax.grad(loss)(w, rows), state, w, weight=weight)
        return updates, -0.1 * jax.grad(loss)(w, slice(None))

    updates, expected = train(w)
    np.testing.assert_allclose(updates, expected, rtol=1e-6)


@each_optimizer
def test_parameters_and_state_are_unchanged_between_steps(
    rng: np.random.Generator, params: Any, make: Any
) -> None:
    tx = accumulate(make(), 3)
    state, update = tx.init(params), jax.jit(tx.update)
    for gradients in _gradients(rng, params, 2):
        updates, after = update(gradients, state, params)
        moved = optax.apply_updates(params, updates)
        for x, y in zip(
            jax.tree.leaves((moved, after.inner)),
            jax.tree.leaves((params, state.inner)),
            strict=True,
        ):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()  # includes -0.0
        state = after
    assert (state.micro_batches, state.steps) == (2, 0)


@pytest.mark.diagonal
@each_optimizer
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nonfinite_micro_batch_is_left_out(
    rng: np.random.Generator, params: Any, make: Any, bad: float
) -> None:
    a, b, c, d = _gradients(rng, params, 4)
    broken = {**b, "a": b["a"].at[1, 2].set(bad)}
    weights = [{"weight": w} for w in (2.0, 50.0, 3.0)]
    micro = list(zip([a, broken, c], weights, strict=True)) + [(d, {})] * 3
    trained, state = _run(accumulate(make(), 3), params, micro)
    expected, _ = _run(make(), params, [(_mean([a, c], [2.0, 3.0]), {}), (d, {})])
    _assert_close(trained, expected)
    assert (state.skipped_micro_batches.total, state.steps) == (1, 2)
    assert metrics.read(state)["skipped_micro_batches"] == 1
    # A micro-batch whose weight is not finite is also left out.
    trained, _ = _run(
        accumulate(make(), 3), params, [(a, weights[0]), (b, {"weight": bad}), (c, weights[2])]
    )
    _assert_close(trained, _run(make(), params, [(_mean([a, c], [2.0, 3.0]), {})])[0])


@each_optimizer
def test_a_step_without_a_finite_micro_batch_is_skipped(
    rng: np.random.Generator, params: Any, make: Any
) -> None:
    (good,) = _gradients(rng, params, 1)
    broken = jax.tree.map(lambda g: g * jnp.nan, good)
    trained, state = _run(accumulate(make(), 2), params, [(broken, {})] * 2 + [(good, {})] * 2)
    expected, inner = _run(make(), params, [(good, {})])
    _assert_close((trained, state.inner), (expected, inner))
    assert (state.skipped_micro_batches.total, state.steps, state.micro_batches) == (2, 2, 0)
    assert metrics.read(state)["skipped_steps"] == 1


def test_too_many_skipped_steps_raise(params: Any) -> None:
    """The steps are counted by `accumulate`, because a guard inside does not see them."""
    broken = (jax.tree.map(lambda x: x * jnp.nan, params), {})
    tx = accumulate(guards.skip_nonfinite(sgd(0.1)), 2, max_consecutive=2)
    guards.check(_run(tx, params, [broken] * 3)[1])
    guards.check(_run(tx, params, [broken] * 2 + [(params, {})] * 2 + [broken] * 2)[1])
    with pytest.raises(guards.TooManyRefusals, match="2 steps in a row"):
        guards.check(_run(tx, params, [broken] * 4)[1])


def test_a_step_whose_weights_are_zero_is_skipped(rng: np.random.Generator, params: Any) -> None:
    (good,) = _gradients(rng, params, 1)
    trained, _ = _run(accumulate(sgd(0.1), 2), params, [(good, {"weight": 0.0})] * 2)
    jax.tree.map(np.testing.assert_array_equal, trained, params)


def test_nonfinite_gradients_are_added_without_skip_nonfinite(
    rng: np.random.Generator, params: Any
) -> None:
    (good,) = _gradients(rng, params, 1)
    broken = {**good, "a": good["a"] * jnp.nan}
    tx = accumulate(sgd(0.1), 2, skip_nonfinite=False)
    trained, state = _run(tx, params, [(broken, {}), (good, {})])
    assert np.isnan(trained["a"]).all()
    assert np.isfinite(trained["b"]).all()
    # The sums of the last step are still in the state; a NaN in them must not reach the next step.
    update = jax.jit(tx.update)
    updates, _ = update(good, update(good, state, params)[1], params)
    assert np.isfinite(updates["a"]).all()


def test_every_may_be_a_schedule_of_the_step(rng: np.random.Generator, params: Any) -> None:
    tx = accumulate(sgd(0.1), lambda step: jnp.where(step < 2, 1, 3))
    state, moved, update = tx.init(params), [], jax.jit(tx.update)
    for gradients in _gradients(rng, params, 8):
        updates, state = update(gradients, state, params)
        moved.append(bool(jnp.any(updates["a"] != 0)))
    assert moved == [True, True, False, False, True, False, False, True]
    assert state.steps == 4


def _primitives(jaxpr: Any) -> list[str]:
    """Returns the primitives of a jaxpr and of what it calls, except in the branches of a cond."""
    names = []
    for eqn in jaxpr.eqns:
        names.append(eqn.primitive.name)
        if eqn.primitive.name != "cond":
            for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(value, "jaxpr", value)
                names += _primitives(inner) if hasattr(inner, "eqns") else []
    return names


def test_the_inner_transformation_runs_in_one_branch_of_one_cond(params: Any) -> None:
    """The inner transformation computes a tangent, which nothing else does."""
    inner = optax.stateless(lambda updates, _: jax.tree.map(jnp.tan, updates))
    tx = accumulate(inner, 4)
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr
    assert "tan" not in _primitives(jaxpr)
    conds = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "cond"]
    counts = [
        sorted(_primitives(branch.jaxpr).count("tan") for branch in cond.params["branches"])
        for cond in conds
    ]
    # The other conds decide whether to add the micro-batch.
    assert [count for count in counts if any(count)] == [[0, len(params)]]


@pytest.mark.usefixtures("fully_optimized")
def test_no_copy_of_the_state_is_made() -> None:
    """The only temporaries are the updates and the directions of one or two leaves."""
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
def test_low_precision_gradients_are_summed_in_float32(dtype: str) -> None:
    seen = []

    def remember(updates: Any, _: Any) -> Any:
        seen.append(updates["a"].dtype)
        return updates

    tx = accumulate(optax.stateless(remember), 3)
    params = {"a": jnp.ones(4, dtype)}
    state, update = tx.init(params), jax.jit(tx.update)
    for g in (1.0, 2**-9, 2**-9):
        updates, state = update({"a": jnp.full(4, g, dtype)}, state, params)
    assert set(seen) == {jnp.dtype("float32")}
    # A sum in bfloat16 would lose the small gradients. 1/3 is rounded in float32.
    np.testing.assert_allclose(updates["a"], (1 + 2**-8) / 3, rtol=1e-6)


# Transformations whose state has the dtype of the parameters.

_SAM = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
SPECIAL: dict[str, Callable[[], optax.GradientTransformation]] = {
    "lbfgs": lambda: optax.lbfgs(0.1, linesearch=None),
    "noisy_sgd": lambda: optax.noisy_sgd(0.1, key=0),
    "mechanize": lambda: optax.contrib.mechanize(optax.adamw(0.1)),
    "sam": lambda: optax.contrib.sam(optax.sgd(0.1), _SAM, sync_period=2),
    "schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
    "cocob": optax.contrib.cocob,
}
ALIASES = (
    "adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad fromage lamb lars "
    "lion nadam nadamw novograd optimistic_adam_v2 optimistic_gradient_descent polyak_sgd radam "
    "rmsprop rprop sgd sign_sgd signum sm3 yogi"
)
CONTRIB = (
    "acprop ademamix adopt dadapt_adamw dog dowg galore momo momo_adam muon prodigy "
    "schedule_free_adamw schedule_free_sgd simplified_ademamix"
)
OPTAX: dict[str, Callable[[], optax.GradientTransformation]] = {
    **{name: lambda name=name: getattr(optax, name)(0.1) for name in ALIASES.split()},
    **{name: lambda name=name: getattr(optax.contrib, name)(0.1) for name in CONTRIB.split()},
    **SPECIAL,
}
TYPES = {"all": ("bfloat16", "bfloat16"), "mixed": ("float16", "float32")}


@pytest.mark.parametrize("kinds", TYPES)
@pytest.mark.parametrize("name", OPTAX)
def test_every_transformation_of_optax_runs_in_low_precision(name: str, kinds: str) -> None:
    """The state keeps the dtypes of ``init``, which ``lax.scan`` and donation require."""
    params = {
        key: jax.ShapeDtypeStruct(shape, dtype)
        for key, shape, dtype in zip("ab", ((4, 3), (3,)), TYPES[kinds], strict=True)
    }
    tx = accumulate(guards.skip_nonfinite(OPTAX[name]()), 2)
    state = jax.eval_shape(tx.init, params)
    extra = {"value": 1.0} if name in ("momo", "momo_adam", "polyak_sgd") else {}
    update = functools.partial(tx.update, **extra)
    updates, after = jax.eval_shape(update, params, state, params)
    assert jax.tree.structure((updates, after)) == jax.tree.structure((params, state))
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(after)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(state)
    ]


@pytest.mark.parametrize("name", ["adamw", "novograd", "mechanize"])
def test_the_arithmetic_is_float32_and_the_state_is_rounded(
    rng: np.random.Generator, name: str
) -> None:
    """The first step equals that of float32 parameters, because zeros are exact in bfloat16."""
    (gradients,) = _gradients(rng, {"a": jnp.ones((3, 4))}, 1)
    wide = {"a": jnp.asarray(rng.normal(size=(3, 4)), "bfloat16").astype("float32")}
    low = jax.tree.map(lambda x: x.astype("bfloat16"), wide)
    inner, tx = OPTAX[name](), accumulate(OPTAX[name](), 1)
    expected, expected_state = jax.jit(inner.update)(gradients, inner.init(wide), wide)
    updates, state = jax.jit(tx.update)(gradients, tx.init(low), low)
    # XLA fuses the two programs differently, which changes the rounding.
    np.testing.assert_allclose(updates["a"], expected["a"], rtol=1e-5)
    found = list(zip(*map(jax.tree.leaves, (state.inner, expected_state)), strict=True))
    assert any(x.dtype == "bfloat16" for x, _ in found)
    for x, y in found:
        np.testing.assert_allclose(np.float64(x), np.float64(y), rtol=2**-8)  # one rounding


def _with_narrow_state(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Adds a state in bfloat16 that has no effect on the steps."""
    return optax.chain(optax.trace(0.0, accumulator_dtype="bfloat16"), tx)


CHOSEN: dict[str, Callable[[], optax.GradientTransformation]] = {
    "store_state": lambda: precision.store_state(sgd(0.1, momentum=0.9), {"momentum": "bfloat16"}),
    "master_weights": lambda: precision.master_weights(_with_narrow_state(sgd(0.1))),
    "stochastic_rounding": lambda: precision.stochastic_rounding(
        _with_narrow_state(sgd(0.1)), jax.random.key(0)
    ),
    "inside a chain": lambda: _with_narrow_state(precision.master_weights(sgd(0.1))),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_wrappers_that_choose_a_precision_make_the_same_steps(
    rng: np.random.Generator, name: str
) -> None:
    """These wrappers must receive low-precision parameters, or they would not round them."""
    params = {"a": jnp.asarray(rng.normal(size=(3, 4)), "bfloat16")}
    steps = [(g, {}) for g in _gradients(rng, params, 3)]
    trained, state = _run(accumulate(CHOSEN[name](), 1), params, steps)
    expected, inner = _run(CHOSEN[name](), params, steps)
    assert trained["a"].dtype == "bfloat16"
    pairs = zip(*map(jax.tree.leaves, ((trained, state.inner), (expected, inner))), strict=True)
    for x, y in pairs:
        # XLA fuses the two programs differently, so that a bfloat16 number may be rounded to its
        # neighbour.
        rtol = 2**-8 if x.dtype == "bfloat16" else 1e-5
        np.testing.assert_allclose(np.float64(x), np.float64(y), rtol=rtol)


@pytest.mark.parametrize("changed", ["shape", "structure", "kind"])
def test_a_state_that_changes_its_types_raises(changed: str) -> None:
    after = {"shape": jnp.ones(3), "structure": (jnp.ones(2),), "kind": jnp.ones(2, int)}
    inner = optax.GradientTransformation(
        lambda params: jnp.ones(2), lambda g, state, params=None: (g, after[changed])
    )
    params = {"a": jnp.ones(4, "bfloat16")}
    tx = accumulate(inner, 1)
    with pytest.raises(TypeError, match=r"inner transformation must keep the (structure|shapes)"):
        jax.jit(tx.update)(params, tx.init(params), params)


# has_updated.


@pytest.mark.parametrize("every", [1, 3])
def test_has_updated_is_true_after_a_step(params: Any, every: int) -> None:
    tx = accumulate(sgd(0.1), every)
    steps = optax.MultiSteps(optax.sgd(0.1), every)
    state, other = tx.init(params), steps.init(params)
    update, update_other = jax.jit(tx.update), jax.jit(steps.update)
    assert not has_updated(state)
    for _ in range(2 * every + 1):
        updates, state = update(params, state, params)
        _, other = update_other(params, other, params)
        made = has_updated(state)
        assert (made.shape, made.dtype) == ((), bool)
        assert bool(made) == bool(jnp.any(updates["a"] != 0)) == bool(steps.has_updated(other))


def test_a_skipped_step_has_not_updated(params: Any) -> None:
    nothing = jax.tree.map(lambda x: x * jnp.nan, params)
    for tx in (
        accumulate(sgd(0.1), 1),
        guards.skip_nonfinite(accumulate(sgd(0.1), 1)),
        guards.skip_spikes(guards.skip_nonfinite(accumulate(sgd(0.1), 1))),
    ):
        update = jax.jit(functools.partial(tx.update, value=1.0))
        _, state = update(params, tx.init(params), params)
        assert has_updated(state)
        _, state = update(nothing, state, params)
        assert not has_updated(state)
        _, state = update(params, state, params)
        assert has_updated(state)


def test_has_updated_accepts_states_in_other_containers(params: Any) -> None:
    tx = optax.chain(clip_by_global_norm(1.0), accumulate(guards.skip_nonfinite(sgd(0.1)), 1))
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert has_updated(state)
    assert jax.jit(has_updated)(state)
    np.testing.assert_array_equal(
        has_updated(jax.tree.map(lambda x: jnp.stack([x, x]), state)), [True, True]
    )
    groups = optax.partition({"x": accumulate(sgd(0.1), 1), "y": sgd(0.1)}, {"a": "x", "b": "y"})
    assert has_updated(jax.jit(groups.update)(params, groups.init(params), params)[1])
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    assert not has_updated(optimizer.opt_state)
    optimizer.update(model, nnx.state(model, nnx.Param))
    assert has_updated(optimizer.opt_state)
    with pytest.raises(TypeError, match=r"accumulation\.has_updated.*saved_state\.rebuild"):
        has_updated(serialization.to_state_dict(state))
    with pytest.raises(TypeError, match="state must hold the state of accumulate, got 'tuple'"):
        has_updated(sgd(0.1).init(params))


@each_optimizer
def test_padding_with_weight_zero_does_not_change_the_step(
    rng: np.random.Generator, params: Any, make: Any
) -> None:
    """The third micro-batch is padding, and the gradient of an empty one is 0 / 0."""
    a, b, c = _gradients(rng, params, 3)
    empty = jax.tree.map(lambda x: x * jnp.nan, params)
    expected, inner = _run(make(), params, [(_mean([a, b], [2.0, 3.0]), {})])
    for padding in (c, empty):
        micro = [(a, {"weight": 2.0}), (b, {"weight": 3.0}), (padding, {"weight": 0.0})]
        trained, state = _run(accumulate(make(), 3), params, micro)
        _assert_close((trained, state.inner), (expected, inner))
        assert has_updated(state)
        assert metrics.read(state)["skipped_steps"] == 0


def test_clipping_inside_accumulation_in_a_scan(rng: np.random.Generator, params: Any) -> None:
    """Clipping inside `accumulate` sees the mean gradient instead of the micro-batches."""
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


def test_the_loss_is_averaged_over_the_finite_micro_batches(params: Any) -> None:
    """Otherwise a guard inside would use only the loss of the last micro-batch."""
    seen = []

    def update(updates: Any, state: Any, params: Any = None, *, value: Any, **_: Any) -> Any:
        jax.debug.callback(lambda value: seen.append(float(value)), value)
        return updates, state

    recorder = optax.GradientTransformationExtraArgs(lambda _: (), update)
    tx = accumulate(guards.skip_nonfinite(recorder), 3)
    state, step = tx.init(params), jax.jit(tx.update)
    for value, weight in ((1.0, 1.0), (4.0, 3.0), (jnp.inf, 2.0)):
        updates, state = step(params, state, params, value=value, weight=weight)
    jax.effects_barrier()
    assert seen == [3.25]
    np.testing.assert_allclose(updates["a"], params["a"], rtol=1e-6)
    assert metrics.read(state) == {"skipped_steps": 0, "skipped_micro_batches": 1}


def test_extra_arguments_reach_the_inner_transformation(params: Any) -> None:
    def update(updates: Any, state: Any, params: Any = None, *, value: Any, **_: Any) -> Any:
        return jax.tree.map(lambda g: g * value, updates), state

    tx = accumulate(optax.GradientTransformationExtraArgs(lambda _: (), update), 1)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params, value=3.0)
    np.testing.assert_allclose(updates["a"], 3 * params["a"], rtol=1e-6)


def test_float64_gradients_of_float32_parameters_are_summed_in_float32() -> None:
    with jax.enable_x64(True):
        params = {"a": jnp.ones(3, "float32")}
        tx = accumulate(sgd(0.1), 2)
        state = tx.init(params)
        _, after = jax.eval_shape(tx.update, {"a": jnp.ones(3, "float64")}, state, params)
        assert after.sums["a"].dtype == state.sums["a"].dtype == "float32"


def test_a_weight_that_differs_between_devices_is_refused() -> None:
    """Otherwise devices would make different steps; the types of shard_map reveal it."""
    tx = accumulate(sgd(0.1), 1)

    def step(x: jax.Array, weight: jax.Array) -> Any:
        return tx.update(x, tx.init(x), x, weight=weight[0])[0]

    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(jax.P(), jax.P("data")), out_specs=jax.P())
    weights = jax.device_put(jnp.ones(2), jax.NamedSharding(mesh, jax.P("data")))
    with pytest.raises(ValueError, match=r"weight varies over the mesh axes \['data'\]: add it up"):
        jax.jit(mapped)(jnp.ones(3), weights)


def test_invalid_arguments_raise(params: Any) -> None:
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
