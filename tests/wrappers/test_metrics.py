import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState

from optim_zoo import (
    accumulation,
    adamw,
    clip_by_global_norm,
    guards,
    lamb,
    lars,
    lazy_adam,
    metrics,
    saved_state,
    sgd,
    stacked,
)
from optim_zoo.rows import SparseRows

pytestmark = pytest.mark.usefixtures("quick_to_compile")

PARAMS = {"stack": jnp.ones((2, 3)), "head": {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.ones(2)}}
GRADS = jax.tree.map(lambda x: 2 * x, PARAMS)


def test_read_returns_the_metrics_of_the_last_step() -> None:
    tx = optax.chain(
        clip_by_global_norm(1.0),
        lamb(
            lambda step: 0.5 / (step + 1),
            exclude_from_layer_adaptation=["bias"],
            layers=[("stack", stacked(0))],
        ),
    )
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    read = metrics.read(state)
    names = ("trust_ratio", "parameter_norm", "update_norm")
    leaves = ("stack", "head/kernel")
    assert set(read) == {"learning_rate", "gradient_norm", "clipped_gradient_norm"} | {
        f"{name}/{leaf}" for name in names for leaf in leaves
    }
    assert read["learning_rate"] == 0.5
    np.testing.assert_allclose(read["clipped_gradient_norm"], 1, rtol=1e-6)
    np.testing.assert_allclose(read["gradient_norm"], 2 * np.sqrt(6 + 16 + 2), rtol=1e-6)
    np.testing.assert_allclose(read["parameter_norm/stack"], np.sqrt([3, 3]), rtol=1e-6)
    np.testing.assert_allclose(read["update_norm/head/kernel"], 2, rtol=1e-5)  # four signs
    for leaf in leaves:
        ratio = read[f"parameter_norm/{leaf}"] / read[f"update_norm/{leaf}"]
        np.testing.assert_allclose(read[f"trust_ratio/{leaf}"], ratio, rtol=1e-6)


def test_read_returns_only_what_the_pieces_store() -> None:
    assert set(metrics.read(adamw(0.1).init(PARAMS))) == {"learning_rate"}
    assert metrics.read(optax.adamw(0.1).init(PARAMS)) == {}
    assert set(metrics.read(lamb(0.1).init({}))) == {"learning_rate"}


def test_the_keys_are_fixed_and_a_traced_state_can_be_read() -> None:
    tx = lamb(0.1)

    @jax.jit
    def step(state: optax.OptState) -> tuple[optax.OptState, dict[str, jax.Array]]:
        _, state = tx.update(GRADS, state, PARAMS)
        return state, metrics.read(state)

    state = tx.init(PARAMS)
    before = metrics.read(state)
    state, read = step(state)
    assert jax.tree.structure(read) == jax.tree.structure(before)
    jax.tree.map(np.testing.assert_array_equal, read, metrics.read(state))


def test_read_works_inside_wrappers_of_optax() -> None:
    tx = optax.apply_if_finite(
        optax.partition({"a": lamb(0.1), "b": optax.sgd(1.0)}, {"stack": "a", "head": "b"}), 3
    )
    _, state = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
    assert set(metrics.read(state)) == {
        "learning_rate", "trust_ratio/stack", "parameter_norm/stack", "update_norm/stack"
    }  # fmt: skip


def test_read_accepts_the_state_of_an_nnx_optimizer() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, lamb(0.1), wrt=nnx.Param)
    read = metrics.read(optimizer.opt_state)
    assert {key for key in read if key.startswith("trust_ratio")} == {
        "trust_ratio/bias",
        "trust_ratio/kernel",
    }
    for value in read.values():
        assert isinstance(value, jax.Array)
        assert value.shape == ()


# Parameter groups.

GROUPS = {"stack": "x", "head": "y"}
ONE = {"stack": True, "head": False}
OTHER = {"stack": False, "head": True}


def _adapted(rate: float) -> optax.GradientTransformationExtraArgs:
    return lamb(rate, exclude_from_layer_adaptation=["bias"], layers=[("stack", stacked(0))])


def _partition(
    x: optax.GradientTransformation, y: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    return optax.partition({"x": x, "y": y}, GROUPS)


RATES = {
    "partition": (_partition(lamb(0.1), adamw(0.2)), {"x": 0.1, "y": 0.2}),
    "multi_transform": (
        optax.multi_transform({1: lamb(0.1), 2: sgd(0.2)}, {"stack": 1, "head": 2}),
        {"1": 0.1, "2": 0.2},
    ),
    "nested partitions": (
        _partition(_partition(lamb(0.1), sgd(0.1)), optax.partition({"z": adamw(0.3)}, "z")),
        {"x/x": 0.1, "x/y": 0.1, "y/z": 0.3},
    ),
    "masked": (
        optax.chain(optax.masked(lamb(0.1), ONE), optax.masked(adamw(0.2), OTHER)),
        {"0": 0.1, "1": 0.2},
    ),
    "masked in a partition": (
        _partition(
            lamb(0.1), optax.chain(optax.masked(sgd(0.2), ONE), optax.masked(sgd(0.3), OTHER))
        ),
        {"x": 0.1, "y/0": 0.2, "y/1": 0.3},
    ),
    "in wrappers": (
        guards.skip_nonfinite(
            accumulation.accumulate(metrics.with_metrics(_partition(lamb(0.1), adamw(0.2))), 1)
        ),
        {"x": 0.1, "y": 0.2},
    ),
    "around wrappers": (
        _partition(metrics.with_metrics(lamb(0.1)), guards.skip_nonfinite(adamw(0.2))),
        {"x": 0.1, "y": 0.2},
    ),
    "next to one for all": (
        optax.chain(_partition(lamb(1.0), optax.identity()), sgd(0.2)),
        {"x": 1.0, "": 0.2},
    ),
}


@pytest.mark.parametrize("name", RATES)
def test_the_learning_rates_of_groups_have_separate_names(name: str) -> None:
    tx, expected = RATES[name]
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    read = metrics.read(state)
    rates = {key: float(value) for key, value in read.items() if key.startswith("learning_rate")}
    assert rates == pytest.approx(
        {f"learning_rate/{group}".rstrip("/"): rate for group, rate in expected.items()}
    )
    assert set(metrics.read(tx.init(PARAMS))) == set(read)


def test_the_paths_of_leaves_do_not_depend_on_groups() -> None:
    alone = _adapted(0.1)
    _, state = alone.update(GRADS, alone.init(PARAMS), PARAMS)
    expected = metrics.read(state)
    del expected["learning_rate"]
    tx = _partition(_adapted(0.1), lamb(0.1, exclude_from_layer_adaptation=["bias"]))
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    read = metrics.read(state)
    assert {key for key in read if not key.startswith("learning_rate")} == set(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(read[key], value)


@pytest.mark.parametrize("group", ["partition", "masked"])
def test_the_gradient_norm_of_a_group_has_a_separate_name(group: str) -> None:
    """`with_metrics` computes the norm of all parameters even if a group computes its own."""
    clipped = optax.chain(clip_by_global_norm(1.0), adamw(0.1))
    inner = _partition(clipped, sgd(0.2)) if group == "partition" else optax.masked(clipped, ONE)
    label = "x" if group == "partition" else "masked"
    tx = metrics.with_metrics(inner)
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    read = metrics.read(state)
    np.testing.assert_allclose(read["gradient_norm"], 2 * np.sqrt(24), rtol=1e-6)
    np.testing.assert_allclose(read[f"gradient_norm/{label}"], 2 * np.sqrt(6), rtol=1e-6)
    np.testing.assert_allclose(read[f"clipped_gradient_norm/{label}"], 1, rtol=1e-6)
    assert "clipped_gradient_norm" not in read


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(lamb(0.1), adamw(0.1)),
        _partition(optax.chain(sgd(0.1), sgd(0.1)), sgd(0.1)),
        optax.chain(clip_by_global_norm(1.0), clip_by_global_norm(1.0)),
    ],
)
def test_two_values_of_one_name_raise(tx: optax.GradientTransformation) -> None:
    """No group distinguishes the two values, and neither may be dropped silently."""
    with pytest.raises(ValueError, match=r"several values of (learning_rate|gradient_norm)"):
        metrics.read(tx.init(PARAMS))


# Numbers for loggers.


def test_flat_metrics_are_python_numbers() -> None:
    tx = guards.skip_nonfinite(_adapted(0.5))
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    read = metrics.read(state)
    numbers = metrics.flat({"loss": jnp.bfloat16(1.5), **read})
    assert {type(value) for value in numbers.values()} == {float, int}
    assert numbers["loss"] == 1.5
    assert numbers["learning_rate"] == 0.5
    assert numbers["skipped_steps"] == 0
    assert [numbers[f"trust_ratio/stack[{i}]"] for i in (0, 1)] == list(read["trust_ratio/stack"])
    assert "trust_ratio/stack" not in numbers
    assert json.loads(json.dumps(numbers)) == numbers
    del numbers["loss"]
    assert metrics.flat(state) == numbers  # `flat` also accepts a state
    replicated = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    both = metrics.flat(replicated)
    assert both["trust_ratio/stack[1,0]"] == numbers["trust_ratio/stack[0]"]
    assert both["learning_rate[1]"] == 0.5
    assert metrics.flat({}) == {}


def test_flat_refuses_tracers_and_other_objects() -> None:
    state = lamb(0.1).init(PARAMS)
    with pytest.raises(TypeError, match="call it outside jit"):
        jax.jit(lambda state: metrics.flat(metrics.read(state)))(state)
    with pytest.raises(TypeError, match=r"got tuple as optimizer: pass what metrics\.read"):
        metrics.flat({"optimizer": state})


# States in the containers of other libraries.


@pytest.mark.parametrize(
    "tx",
    [
        lamb(0.1),
        lars(0.1),
        sgd(0.1),
        metrics.with_metrics(optax.sgd(0.1)),
        guards.skip_nonfinite(optax.adam(0.1)),
        optax.chain(clip_by_global_norm(1.0), optax.adam(0.1)),
        _partition(lamb(0.1), optax.sgd(0.2)),
    ],
)
def test_a_state_whose_types_were_lost_is_refused(tx: optax.GradientTransformation) -> None:
    """It must not be mistaken for a state without metrics."""
    state = tx.init(PARAMS)
    for whole in (state, [state]):
        restored = serialization.to_state_dict(whole)
        with pytest.raises(TypeError, match=r"metrics\.read.*saved_state\.rebuild\(tx\.init"):
            metrics.read(restored)
        rebuilt = saved_state.rebuild(whole, restored)
        assert set(metrics.read(rebuilt)) == set(metrics.read(state))
    model = nnx.Dict({k: nnx.Param(v) for k, v in PARAMS.items() if k == "stack"})
    if not isinstance(state, optax.transforms.PartitionState):
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        with pytest.raises(TypeError, match=r"pass optimizer\.opt_state instead of nnx\.state"):
            metrics.read(nnx.state(optimizer))
        assert metrics.read(optimizer).keys() == metrics.read(optimizer.opt_state).keys() != set()


def test_a_state_of_optax_has_no_metrics() -> None:
    state = optax.adam(0.1).init(PARAMS)
    assert metrics.read(state) == metrics.read(serialization.to_state_dict(state)) == {}


def test_a_train_state_can_be_read() -> None:
    tx = guards.skip_nonfinite(lamb(0.1))
    train = TrainState.create(apply_fn=lambda: None, params=PARAMS, tx=tx)
    train = train.apply_gradients(grads=GRADS)
    assert metrics.flat(train) == metrics.flat(train.opt_state)
    assert metrics.flat(train)["learning_rate"] == pytest.approx(0.1)


# Norms that no piece computes.


def _norm(x: jax.Array) -> float:
    return float(np.sqrt((np.float64(x) ** 2).sum()))


@pytest.mark.parametrize("make", [lambda: adamw(0.1), lambda: optax.adam(0.1)])
def test_with_metrics_adds_norms_to_any_optimizer(
    make: Callable[[], optax.GradientTransformation],
) -> None:
    tx, plain = metrics.with_metrics(make()), make()
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    expected, inner = plain.update(GRADS, plain.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, (updates, state.inner), (expected, inner))
    read = metrics.read(state)
    leaves = {
        "stack": (PARAMS["stack"], updates["stack"]),
        "head/kernel": (PARAMS["head"]["kernel"], updates["head"]["kernel"]),
        "head/bias": (PARAMS["head"]["bias"], updates["head"]["bias"]),
    }
    for path, (x, u) in leaves.items():
        np.testing.assert_allclose(read.pop(f"parameter_norm/{path}"), _norm(x), rtol=1e-6)
        np.testing.assert_allclose(read.pop(f"update_norm/{path}"), _norm(u), rtol=1e-6)
    np.testing.assert_allclose(read.pop("gradient_norm"), 2 * np.sqrt(6 + 16 + 2), rtol=1e-6)
    assert set(read) <= {"learning_rate"}  # optax stores no learning rate


def test_stored_norms_are_not_computed_again() -> None:
    """LAMB with clipping lacks only the norms of excluded leaves, which are added."""
    inner = optax.chain(
        clip_by_global_norm(1.0),
        lamb(0.1, exclude_from_layer_adaptation=["bias"], layers=[("stack", stacked(0))]),
    )
    tx = metrics.with_metrics(inner)
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    assert state.gradient_norm is None
    assert set(state.update_norm) == set(state.parameter_norm) == {"head/bias"}
    read = metrics.read(state)
    assert set(metrics.read(state.inner)) | {"parameter_norm/head/bias", "update_norm/head/bias"} \
        == set(read)  # fmt: skip
    assert read["trust_ratio/stack"].shape == (2,)
    np.testing.assert_allclose(
        read["update_norm/head/bias"], _norm(updates["head"]["bias"]), rtol=1e-6
    )


def test_norms_are_computed_every_so_many_steps() -> None:
    tx = metrics.with_metrics(sgd(lambda step: 0.1 * (step + 1)), every=2)
    state, seen = tx.init(PARAMS), []
    for i in range(4):
        gradients = jax.tree.map(lambda g, i=i: (i + 1) * g, GRADS)  # type: ignore[misc]
        _, state = jax.jit(tx.update)(gradients, state, PARAMS)
        read = metrics.read(state)
        seen.append((float(read["gradient_norm"]), float(read["learning_rate"])))
    first = 2 * np.sqrt(24)
    # Norms are from the first and third update, learning rates from every update.
    np.testing.assert_allclose(
        seen, [(first, 0.1), (first, 0.2), (3 * first, 0.3), (3 * first, 0.4)], rtol=1e-6
    )
    jaxpr = jax.make_jaxpr(tx.update)(GRADS, state, PARAMS)
    assert "reduce_sum" not in [eqn.primitive.name for eqn in jaxpr.eqns]  # all are in the branch


def test_metrics_under_guards_and_accumulation_in_a_scan() -> None:
    tx = guards.skip_nonfinite(accumulation.accumulate(metrics.with_metrics(adamw(0.1)), 2))
    bad = jax.tree.map(lambda g: g * jnp.nan, GRADS)
    steps = jax.tree.map(lambda *g: jnp.stack(g), GRADS, bad, GRADS)

    def step(state: optax.OptState, g: optax.Updates) -> tuple[optax.OptState, dict]:
        _, state = tx.update(g, state, PARAMS)
        return state, metrics.read(state)

    _, read = jax.jit(lambda s: jax.lax.scan(step, s, steps))(tx.init(PARAMS))
    np.testing.assert_array_equal(read["skipped_steps"], [0, 1, 1])
    np.testing.assert_allclose(read["gradient_norm"], [0, 0, 2 * np.sqrt(24)], rtol=1e-6)
    np.testing.assert_array_equal(read["update_norm/stack"] > 0, [False, False, True])


@pytest.mark.parametrize("check_vma", [True, False])
def test_norms_are_global_under_shard_map(check_vma: bool) -> None:
    tx = metrics.with_metrics(adamw(0.1), axis_name=None if check_vma else [("sharded", "model")])

    def train(sharded: jax.Array, replicated: jax.Array) -> dict[str, jax.Array]:
        params = {"sharded": sharded, "replicated": replicated}
        _, state = tx.update(params, tx.init(params), params)
        return metrics.read(state)

    mesh = jax.sharding.Mesh(jax.devices()[:4], ("model",))
    sharded, replicated = jnp.arange(8.0), jnp.ones(3)
    mapped = jax.shard_map(
        train, mesh=mesh, in_specs=(jax.P("model"), jax.P()), out_specs=jax.P(),
        check_vma=check_vma,
    )  # fmt: skip
    read = jax.jit(mapped)(sharded, replicated)
    np.testing.assert_allclose(read["parameter_norm/sharded"], _norm(sharded), rtol=1e-6)
    np.testing.assert_allclose(read["parameter_norm/replicated"], _norm(replicated), rtol=1e-6)
    np.testing.assert_allclose(read["gradient_norm"], np.sqrt(_norm(sharded) ** 2 + 3), rtol=1e-6)


def test_norms_of_sparse_rows_sum_repeated_ids() -> None:
    """Rows with the same id are summed before the norm is computed."""
    params = {"embed": jnp.ones((5, 2)), "bias": jnp.ones(3)}
    rows = SparseRows(jnp.array([1, 1, 5]), jnp.ones((3, 2)), 5)
    tx = metrics.with_metrics(lazy_adam(0.1))
    updates, state = jax.jit(tx.update)(
        {"embed": rows, "bias": jnp.ones(3)}, tx.init(params), params
    )
    read = metrics.read(state)
    np.testing.assert_allclose(read["gradient_norm"], np.sqrt(8 + 3), rtol=1e-6)
    norm = _norm(updates["embed"].to_dense())
    np.testing.assert_allclose(read["update_norm/embed"], norm, rtol=1e-6)
    assert norm > 0


def test_norms_are_not_mapped_as_parameters() -> None:
    """``optax.tree.map_params`` must leave them out, because shardings are derived with it."""
    tx = metrics.with_metrics(adamw(0.1))
    shapes = optax.tree.map_params(
        tx, lambda x: x.shape, tx.init(PARAMS), transform_non_params=lambda _: None
    )
    assert shapes.update_norm is None
    assert tx.update({}, tx.init({}), {})[0] == {}
    assert set(metrics.read(tx.init({}))) == {"learning_rate", "gradient_norm"}


def test_invalid_calls_raise() -> None:
    with pytest.raises(ValueError, match="every must be >= 1, got 0"):
        metrics.with_metrics(sgd(0.1), every=0)
    tx = metrics.with_metrics(sgd(0.1))
    with pytest.raises(ValueError, match="with_metrics needs the parameters"):
        tx.update(GRADS, tx.init(PARAMS))
