from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

from optim_zoo import adam, lamb, layerwise_adaptive, lookahead, stacked
from optim_zoo.errors import ArgumentValueError
from optim_zoo.transforms import (
    add_decayed_weights,
    chain_leaf_by_leaf,
    clip_by_global_norm,
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_trust_ratio,
)
from optim_zoo.transforms.leafwise import Declaration, Leaf, leafwise

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def _pieces(exclude: tuple[str, ...] = (), layers: Any = ()) -> list[optax.GradientTransformation]:
    return [
        scale_by_adam(eps=1e-6),
        add_decayed_weights(0.1, exclude),
        scale_by_trust_ratio(exclude=exclude, layers=layers),
        scale_by_learning_rate(lambda step: 0.1 / (step + 1)),
    ]


def _steps(tx: optax.GradientTransformation, params: Any, gradients: list[Any]) -> Any:
    state = tx.init(params)
    for g in gradients:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def _like(tree: Any, rng: np.random.Generator) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


TREES: dict[str, Any] = {
    "flat": {"a": jnp.ones((3, 4)), "b": jnp.ones(5)},
    "nested": {"a": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}, "a/c": [jnp.ones(()), None]},
    "list": [jnp.ones((2, 3)), (jnp.ones(3), jnp.ones((0, 2)))],
    "numbered": {0: jnp.ones(2), 1: jnp.ones((2, 2))},
    "one": {"a": jnp.ones((3, 4))},
    "array": jnp.ones((3, 4)),
    "bfloat16": {"a": jnp.ones((3, 4), "bfloat16"), "b": jnp.ones(5)},
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("jitted", [True, False])
def test_updates_and_state_agree_with_the_chain(
    rng: np.random.Generator, tree: Any, jitted: bool
) -> None:
    params, gradients = _like(tree, rng), [_like(tree, rng) for _ in range(2)]
    how = jax.jit if jitted else (lambda f: f)
    by_leaf, plain = (
        how(lambda params, gradients, tx=tx: _steps(tx, params, gradients))(params, gradients)
        for tx in (chain_leaf_by_leaf(*_pieces()), optax.chain(*_pieces()))
    )
    assert jax.tree.structure(by_leaf) == jax.tree.structure(plain)
    for x, y in zip(jax.tree.leaves(by_leaf), jax.tree.leaves(plain), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        # XLA may fuse a sum and a product, which changes the rounding by a few times 1e-7.
        np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=2e-6, atol=1e-7)


def test_exclusions_and_layers_use_the_whole_path(rng: np.random.Generator) -> None:
    tree = {"net": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4)), "out": jnp.ones(3)}}
    params, gradients = _like(tree, rng), [_like(tree, rng)] * 2
    arguments = (("net/bias",), [("net/kernel", stacked(0))])
    by_leaf, state = _steps(chain_leaf_by_leaf(*_pieces(*arguments)), params, gradients)
    plain, expected = _steps(optax.chain(*_pieces(*arguments)), params, gradients)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    assert {k: v.shape for k, v in state[2].trust_ratio.items()} == {
        "net/kernel": (2,),
        "net/out": (),
    }
    # Outside of jit XLA fuses nothing, so that the results are bit-identical.
    jax.tree.map(np.testing.assert_array_equal, (by_leaf, state), (plain, expected))


def test_leafwise_chains_work_with_masks_injected_hyperparameters_and_nnx(
    rng: np.random.Generator,
) -> None:
    tree = TREES["nested"]
    params, gradients = _like(tree, rng), [_like(tree, rng)] * 2
    masked = optax.masked(lamb(0.1), {"a": {"kernel": True, "bias": False}, "a/c": [True, None]})
    assert np.isfinite(_steps(masked, params, gradients)[0]["a"]["kernel"]).all()
    injected = optax.inject_hyperparams(lamb)(0.1)
    expected = _steps(lamb(0.1), params, gradients)[0]
    for x, y in zip(
        jax.tree.leaves(_steps(injected, params, gradients)[0]),
        jax.tree.leaves(expected),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, lamb(0.1), wrt=nnx.Param)
    before = jnp.array(model.kernel[...])
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    np.testing.assert_allclose(
        np.linalg.norm(model.kernel[...] - before), 0.1 * np.linalg.norm(before), rtol=1e-5
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nan_in_one_leaf_does_not_change_other_leaves(
    rng: np.random.Generator, bad: float
) -> None:
    tree = {name: jnp.ones((8, 8)) for name in "abc"}
    params, gradients = _like(tree, rng), _like(tree, rng)
    step = jax.jit(lambda g: _steps(lamb(0.1), params, [g])[0])
    expected = step(gradients)
    for name in tree:
        broken = step({**gradients, name: gradients[name].at[0, 0].set(bad)})
        assert not np.isfinite(broken[name]).all()
        for other in set(tree) - {name}:
            np.testing.assert_array_equal(broken[other], expected[other])


def _compiled(tx: optax.GradientTransformation, leaves: int, size: int) -> Any:
    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = {f"layer_{i}": jnp.zeros((size, size)) for i in range(leaves)}
    state = jax.eval_shape(tx.init, params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()


@pytest.mark.usefixtures("fully_optimized")
def test_memory_holds_one_direction_at_a_time() -> None:
    leaves, size = 12, 256

    def temporaries(tx: optax.GradientTransformation) -> float:
        memory = _compiled(tx, leaves, size).memory_analysis()
        return memory.temp_size_in_bytes / (4 * leaves * size**2)

    assert temporaries(optax.chain(*_pieces())) > 0.99
    assert temporaries(chain_leaf_by_leaf(*_pieces())) < 1.1 / leaves
    assert temporaries(lamb(0.1, weight_decay=0.1)) < 1.1 / leaves
    assert temporaries(layerwise_adaptive(scale_by_adam(), 0.1)) < 1.1 / leaves


def _lowered(platform: str) -> str:
    tx = chain_leaf_by_leaf(*_pieces())
    params = {name: jnp.ones((8, 8)) for name in "abc"}
    step = jax.jit(lambda params, gradients: _steps(tx, params, [gradients]))
    return step.trace(params, params).lower(lowering_platforms=(platform,)).as_text()


def test_leaves_do_not_wait_on_accelerators() -> None:
    """On accelerators the function that waits on a CPU returns the gradient unchanged."""
    assert "is_finite" in _lowered("cpu")
    for platform in ("tpu", "cuda"):
        text = _lowered(platform)
        assert "@_wait" in text
        assert "is_finite" not in text


def test_leaves_do_not_wait_under_a_mesh_of_several_devices() -> None:
    with jax.set_mesh(jax.make_mesh((8,), ("data",))):
        text = _lowered("cpu")
    assert "is_finite" not in text
    assert "@_wait" not in text
    with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])):
        assert "@_wait" in _lowered("cpu")


@pytest.mark.parametrize("devices", [1, 8])
def test_leaves_do_not_wait_in_a_mapped_context(devices: int) -> None:
    tx = chain_leaf_by_leaf(*_pieces())
    params = {name: jnp.ones((8, 8)) for name in "abc"}

    def step(params: Any) -> Any:
        return _steps(tx, params, [params])[0]

    mesh = jax.sharding.Mesh(jax.devices()[:devices], ("data",))
    replicated = jax.P()
    for check_vma in (True, False):
        mapped = jax.shard_map(
            step, mesh=mesh, in_specs=(replicated,), out_specs=replicated, check_vma=check_vma
        )
        assert "@_wait" not in jax.jit(mapped).lower(params).as_text()
    copies = jax.tree.map(lambda x: jnp.stack([x] * devices), params)
    text = jax.pmap(step, devices=jax.devices()[:devices]).lower(copies).as_text()
    assert "@_wait" not in text


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([scale_by_adam(), scale_by_learning_rate(0.1)], id="no trust ratio"),
        pytest.param([scale_by_adam(), scale_by_trust_ratio()], id="ends with the trust ratio"),
        pytest.param([scale_by_trust_ratio()], id="only the trust ratio"),
        pytest.param([scale_by_trust_ratio(), scale_by_trust_ratio()], id="two trust ratios"),
        pytest.param([clip_by_global_norm(0.1), *_pieces()], id="clipping in front"),
        pytest.param(
            [scale_by_adam(), optax.scale(2.0), scale_by_trust_ratio(), optax.clip(0.1)],
            id="pieces of optax",
        ),
        pytest.param([optax.scale(2.0)], id="only a piece of optax"),
        pytest.param([lookahead(lamb(0.1), 1), scale_by_trust_ratio()], id="a wrapper"),
    ],
)
def test_any_pieces_agree_with_the_chain(
    rng: np.random.Generator, pieces: list[optax.GradientTransformation]
) -> None:
    params = _like(TREES["nested"], rng)
    gradients = [_like(TREES["nested"], rng) for _ in range(2)]
    trained = _steps(chain_leaf_by_leaf(*pieces), params, gradients)
    expected = _steps(optax.chain(*pieces), params, gradients)
    assert jax.tree.structure(trained) == jax.tree.structure(expected)
    # Outside of jit XLA fuses nothing, so that the results are bit-identical.
    jax.tree.map(np.testing.assert_array_equal, trained, expected)


def test_derivatives_agree_with_the_chain() -> None:
    """The norm of a layer of zeros has no derivative, which must not affect other layers."""
    params = {"a": jnp.zeros(3), "b": jnp.array([1.0, 2.0]), "c": jnp.array([3.0, 4.0])}
    gradients = {"a": jnp.ones(3), "b": jnp.array([0.1, 0.2]), "c": jnp.array([0.3, 0.1])}

    def loss(params: Any, tx: optax.GradientTransformation) -> jax.Array:
        return _steps(tx, params, [gradients])[0]["c"].sum()

    chains = (chain_leaf_by_leaf(*_pieces()), optax.chain(*_pieces()))
    by_leaf, plain = (jax.grad(loss)(params, tx) for tx in chains)
    jax.tree.map(np.testing.assert_array_equal, by_leaf, plain)


def test_outside_of_jit_leaves_may_be_on_different_devices() -> None:
    first, second = jax.devices()[:2]
    params = {"a": jax.device_put(jnp.ones(3), first), "b": jax.device_put(jnp.ones(2), second)}
    tx = lamb(0.1)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["a"].devices() == {first}
    assert updates["b"].devices() == {second}


def test_a_replaced_function_is_called() -> None:
    """A piece changed by ``_replace`` no longer does what its declaration says."""
    tx = scale_by_adam()
    doubled = tx._replace(
        update=lambda u, state, params=None: tx.update(jax.tree.map(lambda x: 2 * x, u), state)
    )
    pieces = [doubled, scale_by_trust_ratio(), scale_by_learning_rate(0.1)]
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    trained = _steps(chain_leaf_by_leaf(*pieces), params, [params])
    jax.tree.map(
        np.testing.assert_array_equal, trained, _steps(optax.chain(*pieces), params, [params])
    )
    assert trained[1][0].mu["a"][0] == np.float32(0.2)


def test_a_piece_that_does_not_need_the_parameters_does_not_check_them() -> None:
    gradients = {"a": jnp.ones(2), "b": None}
    tx = scale_by_adam()
    for other in ({"a": jnp.ones(2), "b": jnp.ones(1)}, freeze(gradients), {"z": 1}):
        updates, _ = tx.update(gradients, tx.init(gradients), other)
        np.testing.assert_allclose(updates["a"], 1.0, rtol=1e-6)
    for optimizer in (adam(0.1), lamb(0.1)):
        with pytest.raises(ArgumentValueError, match="must be a tree like the parameters; they"):
            optimizer.update(gradients, optimizer.init(gradients), {"z": jnp.ones(2)})


def test_a_boxed_parameter_needs_a_boxed_gradient() -> None:
    params = {"a": nn.Partitioned(jnp.ones(3), names=(None,))}
    tx = lamb(0.1)
    with pytest.raises(ArgumentValueError, match="that of a is an array, its parameter is in"):
        tx.update({"a": jnp.ones(3)}, tx.init(params), params)


def test_a_trust_ratio_accepts_leaves_added_after_init() -> None:
    tx, params = scale_by_trust_ratio(), {"a": jnp.ones(2)}
    updates, state = tx.update(params, tx.init({}), params)
    np.testing.assert_array_equal(updates["a"], params["a"])
    assert state.trust_ratio == {"a": 1}


def test_a_chain_without_pieces_raises() -> None:
    with pytest.raises(ValueError, match=r"pieces must be at least one transformation, got \(\)"):
        chain_leaf_by_leaf()


def test_extra_arguments_reach_the_pieces_that_accept_them() -> None:
    def update(u: Any, state: Any, params: Any = None, *, factor: float, **_: Any) -> Any:
        return jax.tree.map(lambda x: factor * x, u), state

    scale = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = chain_leaf_by_leaf(scale_by_adam(), scale, scale_by_trust_ratio())
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    updates, _ = tx.update(params, tx.init(params), params, factor=0.0, other=1.0)
    assert not updates["a"].any()
    # LAMB ignores extra arguments, because none of its pieces uses them.
    tx = lamb(0.1)
    given, _ = tx.update(params, tx.init(params), params, value=1.0)
    plain, _ = tx.update(params, tx.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, given, plain)


def test_leafwise_makes_a_transformation_from_a_declaration() -> None:
    """The piece counts the steps of leaves that are not excluded and keeps the largest update."""

    class State(NamedTuple):
        count: Any
        largest: Any
        steps: Any

    def update(u: Any, state: State, leaf: Leaf) -> tuple[Any, State]:
        assert leaf.shared == "shared"
        largest = jnp.maximum(state.largest, jnp.abs(u))
        steps = None if state.steps is None else state.steps + 1
        return u * state.count, state._replace(largest=largest, steps=steps)

    tx = leafwise(
        Declaration(
            name="piece",
            update=update,
            state=State,
            like_params=("largest",),
            by_path=("steps",),
            init=lambda path, x: (
                {"largest": jnp.zeros_like(x)} | ({} if path == "b" else {"steps": jnp.zeros(())})
            ),
            init_shared=lambda: {"count": jnp.zeros(())},
            begin=lambda state: (state._replace(count=state.count + 1), "shared"),
        )
    )
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state)
    assert updates["a"].tolist() == [2, 2]
    assert state.count == 2
    assert jax.tree.structure(state.largest) == jax.tree.structure(params)
    assert state.steps == {"a": 2}
    with pytest.raises(ValueError, match="several leaves have the path a/b"):
        tx.init({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}})


def test_types_are_kept_under_shard_map_and_pmap() -> None:
    """Only the ratios of layers distributed over a mesh axis vary over that axis."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("pipe",))
    params = {"a": jnp.ones((2, 4)), "b": jnp.ones(4)}
    tx = lamb(0.1, layers=[("a", stacked(0, mesh_axis="pipe"))])
    specs = {"a": jax.P("pipe"), "b": jax.P()}
    step = jax.shard_map(
        lambda params: _steps(tx, params, [params])[0],
        mesh=mesh,
        in_specs=(specs,),
        out_specs=specs,
    )
    plain = lamb(0.1, layers=[("a", stacked(0))])
    one_each = jax.tree.map(lambda x: x[None], params)
    mapped = jax.pmap(lambda params: _steps(plain, params, [params])[0])(one_each)
    expected = _steps(plain, params, [params])[0]
    for name, x in jax.jit(step)(params).items():
        np.testing.assert_allclose(x, expected[name], rtol=1e-6)
        np.testing.assert_allclose(mapped[name][0], expected[name], rtol=1e-6)
