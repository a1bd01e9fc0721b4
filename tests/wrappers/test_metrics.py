from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from optim_zoo import (
    accumulation,
    adamw,
    clip_by_global_norm,
    guards,
    lamb,
    lazy_adam,
    metrics,
    sgd,
    stacked,
)
from optim_zoo.rows import SparseRows

pytestmark = pytest.mark.usefixtures("quick_to_compile")

PARAMS = {"stack": jnp.ones((2, 3)), "head": {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.ones(2)}}
GRADS = jax.tree.map(lambda x: 2 * x, PARAMS)


def test_everything_of_the_step_just_made() -> None:
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
    np.testing.assert_allclose(read["update_norm/head/kernel"], 2, rtol=1e-5)  # signs
    for leaf in leaves:
        ratio = read[f"parameter_norm/{leaf}"] / read[f"update_norm/{leaf}"]
        np.testing.assert_allclose(read[f"trust_ratio/{leaf}"], ratio, rtol=1e-6)


def test_only_what_the_pieces_kept() -> None:
    assert set(metrics.read(adamw(0.1).init(PARAMS))) == {"learning_rate"}
    assert metrics.read(optax.adamw(0.1).init(PARAMS)) == {}
    assert set(metrics.read(lamb(0.1).init({}))) == {"learning_rate"}


def test_the_keys_are_fixed_and_traced_state_can_be_read() -> None:
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


def test_below_other_wrappers() -> None:
    tx = optax.apply_if_finite(
        optax.partition({"a": lamb(0.1), "b": optax.sgd(1.0)}, {"stack": "a", "head": "b"}), 3
    )
    _, state = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
    assert set(metrics.read(state)) == {
        "learning_rate", "trust_ratio/stack", "parameter_norm/stack", "update_norm/stack"
    }  # fmt: skip


def test_the_state_of_an_nnx_optimizer() -> None:
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


def test_two_rates_are_an_error() -> None:
    """Rather than one of them, without a word."""
    tx = optax.partition({"a": lamb(0.1), "b": adamw(1e-4)}, {"x": "a", "y": "b"})
    state = tx.init({"x": jnp.ones(2), "y": jnp.ones(2)})
    with pytest.raises(ValueError, match="several values of learning_rate"):
        metrics.read(state)


# Norms that no piece has computed.


def _norm(x: jax.Array) -> float:
    return float(np.sqrt((np.float64(x) ** 2).sum()))


@pytest.mark.parametrize("make", [lambda: adamw(0.1), lambda: optax.adam(0.1)])
def test_norms_of_any_optimizer(make: Callable[[], optax.GradientTransformation]) -> None:
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
    assert set(read) <= {"learning_rate"}  # a foreign one has none to read


def test_what_the_pieces_kept_is_not_computed_again() -> None:
    """Of LAMB behind clipping there is nothing left but the norms of what is excluded."""
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


def test_every_so_many_steps_the_norms_are_taken() -> None:
    tx = metrics.with_metrics(sgd(lambda step: 0.1 * (step + 1)), every=2)
    state, seen = tx.init(PARAMS), []
    for i in range(4):
        gradients = jax.tree.map(lambda g, i=i: (i + 1) * g, GRADS)  # type: ignore[misc]
        _, state = jax.jit(tx.update)(gradients, state, PARAMS)
        read = metrics.read(state)
        seen.append((float(read["gradient_norm"]), float(read["learning_rate"])))
    first = 2 * np.sqrt(24)
    # The norm of the first and third update; the rate of each.
    np.testing.assert_allclose(
        seen, [(first, 0.1), (first, 0.2), (3 * first, 0.3), (3 * first, 0.4)], rtol=1e-6
    )
    jaxpr = jax.make_jaxpr(tx.update)(GRADS, state, PARAMS)
    assert "reduce_sum" not in [eqn.primitive.name for eqn in jaxpr.eqns]  # all in the branch


def test_under_guards_and_accumulation_in_a_scan() -> None:
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
    tx = metrics.with_metrics(adamw(0.1), axis_name=None if check_vma else [("cut", "model")])

    def train(cut: jax.Array, whole: jax.Array) -> dict[str, jax.Array]:
        params = {"cut": cut, "whole": whole}
        _, state = tx.update(params, tx.init(params), params)
        return metrics.read(state)

    mesh = jax.sharding.Mesh(jax.devices()[:4], ("model",))
    cut, whole = jnp.arange(8.0), jnp.ones(3)
    mapped = jax.shard_map(
        train, mesh=mesh, in_specs=(jax.P("model"), jax.P()), out_specs=jax.P(),
        check_vma=check_vma,
    )  # fmt: skip
    read = jax.jit(mapped)(cut, whole)
    np.testing.assert_allclose(read["parameter_norm/cut"], _norm(cut), rtol=1e-6)
    np.testing.assert_allclose(read["parameter_norm/whole"], _norm(whole), rtol=1e-6)
    np.testing.assert_allclose(read["gradient_norm"], np.sqrt(_norm(cut) ** 2 + 3), rtol=1e-6)


def test_norms_of_sparse_rows() -> None:
    """Rows of the same id are one row of the table."""
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


def test_norms_are_not_like_the_parameters() -> None:
    """``optax.tree.map_params``, with which shardings of the state are made, passes them by."""
    tx = metrics.with_metrics(adamw(0.1))
    shapes = optax.tree.map_params(
        tx, lambda x: x.shape, tx.init(PARAMS), transform_non_params=lambda _: None
    )
    assert shapes.update_norm is None
    assert tx.update({}, tx.init({}), {})[0] == {}
    assert set(metrics.read(tx.init({}))) == {"learning_rate", "gradient_norm"}


def test_errors() -> None:
    with pytest.raises(ValueError, match="every must be >= 1, got 0"):
        metrics.with_metrics(sgd(0.1), every=0)
    tx = metrics.with_metrics(sgd(0.1))
    with pytest.raises(ValueError, match="with_metrics needs the parameters"):
        tx.update(GRADS, tx.init(PARAMS))
