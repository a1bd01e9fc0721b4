import contextlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optim_zoo import clip_by_global_norm, lamb, layers, metrics, split, stacked, tree
from optim_zoo.layers import norms

pytestmark = pytest.mark.usefixtures("quick_to_compile")

SHAPE = (4, 6, 8)
SPECS: list[tuple[layers.LayerAxis, ...]] = [
    (),
    (stacked(0),),
    (split(1, 3),),
    (split(-1, 2), stacked(0)),
    (stacked(0), stacked(1), stacked(2)),
]


def _resolved(spec: Any, shape: tuple[int, ...] = SHAPE) -> layers.Layers:
    return layers.assign([("x", spec)], {"x": np.zeros(shape)})["x"]


def _mesh(*sizes: tuple[str, int], axis_type: AxisType = AxisType.Auto) -> Mesh:
    names = tuple(name for name, _ in sizes)
    shape = tuple(size for _, size in sizes)
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape))


def _numpy_norms(x: np.ndarray, spec: layers.Layers) -> np.ndarray:
    """Returns the norms by splitting the array into one array per layer."""
    pieces = [x]
    for item in spec:
        count = item.count(x.shape)
        pieces = [part for piece in pieces for part in np.split(piece, count, item.axis)]
    norms = [math.sqrt((piece.astype(np.float64) ** 2).sum()) for piece in pieces]
    return np.asarray(norms) if spec else np.asarray(norms[0])


@pytest.mark.parametrize("spec", SPECS)
def test_norm_and_expand_agree_with_numpy(rng: np.random.Generator, spec: Any) -> None:
    x = rng.normal(size=SHAPE).astype(np.float32)
    resolved = _resolved(spec)
    found = norms.norm(jnp.asarray(x), resolved)
    expected = _numpy_norms(x, resolved)
    assert found.shape == expected.shape == norms.norm_shape(SHAPE, resolved)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # Every layer divided by its norm has norm 1.
    unit = jnp.asarray(x) / norms.expand(found, SHAPE, resolved)
    np.testing.assert_allclose(norms.norm(unit, resolved), jnp.ones_like(found), rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "spec", "expected"),
    [
        ((), (), ()),
        ((1,), (), ()),
        ((0,), (), ()),
        ((3, 0), (stacked(0),), (3,)),
        ((0, 3), (stacked(0),), (0,)),
        ((0, 3), (split(0, 3),), (3,)),
        ((4, 1), (stacked(0), split(1, 1)), (4,)),
    ],
)
def test_scalars_and_empty_arrays_have_norms(
    shape: tuple[int, ...], spec: Any, expected: tuple[int, ...]
) -> None:
    resolved = _resolved(spec, shape)
    found = norms.norm(jnp.ones(shape), resolved)
    assert found.shape == norms.norm_shape(shape, resolved) == expected
    assert np.isfinite(found).all()
    factors = norms.expand(found, shape, resolved)
    assert (jnp.ones(shape) * factors).shape == shape
    tx = lamb(0.1, layers=[("x", spec)])
    params = {"x": jnp.zeros(shape)}
    updates, state = jax.jit(tx.update)({"x": jnp.ones(shape)}, tx.init(params), params)
    assert (metrics.read(state)["trust_ratio/x"] == 1).all()
    np.testing.assert_allclose(updates["x"], jnp.full(shape, -0.1), rtol=1e-5)


@pytest.mark.parametrize(("dtype", "wide"), [("float16", "float32"), ("bfloat16", "float32")])
def test_norms_of_half_precision_arrays_are_float32(dtype: str, wide: str) -> None:
    norm = norms.norm(jnp.full((100, 100), 3000.0, dtype))
    assert norm.dtype == wide
    np.testing.assert_allclose(norm, 300_000, rtol=5e-3)  # bfloat16 rounds 3000


def test_norms_of_float64_arrays_are_float64() -> None:
    with jax.enable_x64(True):
        norm = norms.norm(jnp.full(3, 1 + 1e-12, "float64"))
        assert norm.dtype == "float64"
        np.testing.assert_allclose(norm, math.sqrt(3) * (1 + 1e-12), rtol=1e-15)


@pytest.mark.usefixtures("fully_optimized")
@pytest.mark.parametrize("spec", SPECS[:4])
def test_a_norm_reads_the_array_once_and_copies_nothing(spec: Any) -> None:
    shape = (4, 96, 512)
    resolved = _resolved(spec, shape)
    compiled = jax.jit(lambda x: norms.norm(x, resolved)).lower(jnp.zeros(shape)).compile()
    size = 4 * math.prod(shape)
    # One pass, and a second one in the rarely taken branch for squares that overflow.
    assert compiled.cost_analysis()["bytes accessed"] < 2.2 * size
    assert compiled.memory_analysis().temp_size_in_bytes < 0.2 * size


def test_invalid_layer_specs_raise() -> None:
    for axis in (1.0, "0", None, True):
        with pytest.raises(TypeError, match="stacked: axis must be a whole number"):
            stacked(axis)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mesh_axis must be the name of a mesh axis"):
        stacked(0, mesh_axis=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="split: parts must be >= 1, got 0"):
        split(0, 0)
    with pytest.raises(TypeError, match="split: parts must be a whole number"):
        split(0, 1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (stacked(3), r"layers: x has shape \(4, 6, 8\) and no axis 3"),
        (stacked(-4), r"layers: x has shape \(4, 6, 8\) and no axis -4"),
        (split(1, 4), "layers: x has 6 entries along axis 1, which do not divide into 4 parts"),
        ((stacked(2), split(-1, 2)), "layers: x has two specs for one axis"),
    ],
)
def test_a_spec_that_does_not_fit_its_leaf_raises(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lamb(0.1, layers=[("x", spec)]).init({"x": jnp.zeros(SHAPE)})


def test_invalid_layer_rules_raise() -> None:
    with pytest.raises(TypeError, match="layers: the value of 'x' must be stacked"):
        lamb(0.1, layers=[("x", (stacked(0), 1))])
    with pytest.raises(TypeError, match="layers must be a list of pairs"):
        lamb(0.1, layers={"x": stacked(0)})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers: 'y' matches no leaf; the nearest paths are x"):
        lamb(0.1, layers=[("y", stacked(0))]).init({"x": jnp.zeros(SHAPE)})


# Across devices: one leaf is sharded over the mesh; the other is larger and replicated.

PARAMS = {
    "sharded": np.random.default_rng(1).normal(size=(4, 8, 6)).astype(np.float32),
    "replicated": 100 * np.random.default_rng(2).normal(size=(5,)).astype(np.float32),
}
GRADS = [
    {
        name: np.random.default_rng(i + 3).normal(size=x.shape).astype(np.float32)
        for name, x in PARAMS.items()
    }
    for i in range(3)
]
REPLICATED = P()
RULES = [("sharded", (stacked(0), split(2, 3)))]
# Sums over devices add in another order, which changes a norm by about 1e-7.
RTOL = 1e-6


def _train(
    tx: optax.GradientTransformation, params: Any, grads: list[Any]
) -> tuple[Any, dict[str, jax.Array]]:
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, metrics.read(state)


def _assert_same(actual: Any, expected: Any) -> None:
    def assert_leaf_same(x: Any, y: Any) -> None:
        np.testing.assert_allclose(x, y, RTOL, RTOL * np.abs(y).max())

    jax.tree.map(assert_leaf_same, actual, expected)


@pytest.mark.parametrize(
    "spec",
    [
        P("data"),
        P(None, "data"),
        P(None, None, "model"),
        P("model", "data"),
        P(None, ("data", "model")),
    ],
)
def test_under_jit_every_sharding_gives_the_same_numbers(spec: P) -> None:
    """The leaf is sharded along the stacked axis, the split axis, both or neither."""
    tx = lamb(0.1, weight_decay=0.1, layers=RULES)
    expected = jax.jit(lambda x, g: _train(tx, x, g))(PARAMS, GRADS)
    mesh = _mesh(("data", 4), ("model", 2))
    shardings = {"sharded": NamedSharding(mesh, spec), "replicated": NamedSharding(mesh, P())}
    train = jax.jit(lambda x, g: _train(tx, x, g), in_shardings=(shardings, [shardings] * 3))
    _assert_same(train(PARAMS, GRADS), expected)


@pytest.mark.diagonal
@pytest.mark.parametrize("ambient", [True, False])
@pytest.mark.parametrize("spec", [P("data"), P(None, None, "model"), P("model", "data")])
def test_explicit_sharding_gives_the_same_numbers(spec: P, ambient: bool) -> None:
    """Trains in a scan over Explicit mesh axes, the default of `jax.make_mesh`."""
    expected = _train(lamb(0.1, weight_decay=0.1, layers=RULES), PARAMS, GRADS)[0]
    tx = lamb(0.1, weight_decay=0.1, layers=RULES)
    mesh = _mesh(("data", 4), ("model", 2), axis_type=AxisType.Explicit)

    @jax.jit
    def train(params: Any, grads: Any) -> Any:
        def step(carry: Any, g: Any) -> tuple[Any, None]:
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), grads)[0][0]

    def placed(tree: Any, *before: None) -> Any:
        specs = {"sharded": P(*before, *spec), "replicated": P()}
        return {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in tree.items()}

    with jax.set_mesh(mesh) if ambient else contextlib.nullcontext():
        trained = train(placed(PARAMS), placed(jax.tree.map(lambda *g: np.stack(g), *GRADS), None))
    assert trained["sharded"].sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)
    _assert_same(trained, expected)


def _shard_mapped(
    tx: optax.GradientTransformation, spec: P, *, check_vma: bool, kept: P = REPLICATED
) -> tuple[Any, dict[str, jax.Array]]:
    mesh = _mesh(("pipe", 4), ("model", 2))
    specs = {"sharded": spec, "replicated": P()}
    read = {
        "learning_rate": P(),
        **{f"{name}/replicated": P() for name in ("trust_ratio", "parameter_norm", "update_norm")},
        **{f"{name}/sharded": kept for name in ("trust_ratio", "parameter_norm", "update_norm")},
    }
    mapped = jax.shard_map(
        lambda x, g: _train(tx, x, g),
        mesh=mesh,
        in_specs=(specs, [specs] * len(GRADS)),
        out_specs=(specs, read),
        check_vma=check_vma,
    )
    return jax.jit(mapped)(PARAMS, GRADS)


@pytest.mark.diagonal
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    ("spec", "rules"),
    [
        (P(None, "model"), RULES),
        (P(None, ("pipe", "model")), RULES),
        (P("pipe", "model"), ()),
    ],
)
def test_under_shard_map_norms_are_global(spec: P, rules: Any, check_vma: bool) -> None:
    expected = _train(lamb(0.1, weight_decay=0.1, layers=rules), PARAMS, GRADS)
    names = [
        name for entry in spec if entry for name in ([entry] if isinstance(entry, str) else entry)
    ]
    axis_name = None if check_vma else [("sharded", names)]
    tx = lamb(0.1, weight_decay=0.1, layers=rules, axis_name=axis_name)
    _assert_same(_shard_mapped(tx, spec, check_vma=check_vma), expected)


@pytest.mark.parametrize("check_vma", [True, False])
def test_layers_distributed_over_a_mesh_axis_have_separate_norms(check_vma: bool) -> None:
    """Pipeline parallelism over one mesh axis; another axis shards each layer."""
    expected = _train(lamb(0.1, weight_decay=0.1, layers=RULES), PARAMS, GRADS)
    rules = [("sharded", (stacked(0, mesh_axis="pipe"), split(2, 3)))]
    axis_name = None if check_vma else [("sharded", ("pipe", "model"))]
    tx = lamb(0.1, weight_decay=0.1, layers=rules, axis_name=axis_name)
    spec = P("pipe", "model")
    _assert_same(_shard_mapped(tx, spec, check_vma=check_vma, kept=P("pipe")), expected)


@pytest.mark.parametrize("rules", [(), [("sharded", stacked(0, mesh_axis="pipe"))]])
def test_the_state_keeps_its_types_in_a_scan_under_shard_map(rules: Any) -> None:
    """Under shard_map, types say what varies over the mesh; a scan needs the same types."""
    mesh = _mesh(("pipe", 4), ("model", 2))
    tx = optax.chain(clip_by_global_norm(1.0), lamb(0.1, weight_decay=0.1, layers=rules))
    specs = {"sharded": P("pipe", "model"), "replicated": P()}
    grads = jax.tree.map(lambda *g: np.stack(g), *GRADS)

    def train(params: Any, grads: Any) -> Any:
        def step(carry: Any, g: Any) -> tuple[Any, None]:
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), grads)[0][0]

    stepped = {"sharded": P(None, *specs["sharded"]), "replicated": P()}
    mapped = jax.shard_map(train, mesh=mesh, in_specs=(specs, stepped), out_specs=specs)
    plain = optax.chain(clip_by_global_norm(1.0), lamb(0.1, weight_decay=0.1,
                        layers=[("sharded", stacked(0))] if rules else ()))  # fmt: skip
    _assert_same(jax.jit(mapped)(PARAMS, grads), _train(plain, PARAMS, GRADS)[0])


def test_under_pmap_norms_are_global() -> None:
    expected, expected_metrics = _train(lamb(0.1, layers=RULES), PARAMS, GRADS)
    tx = lamb(0.1, layers=RULES, axis_name=[("sharded", "model")])

    def blocks(tree: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Splits ``sharded`` in two along its middle axis and copies ``replicated``."""
        sharded = np.stack(np.split(tree["sharded"], 2, axis=1))
        return {"sharded": sharded, "replicated": np.stack([tree["replicated"]] * 2)}

    train = jax.pmap(lambda x, g: _train(tx, x, g), axis_name="model", devices=jax.devices()[:2])
    params, seen = train(blocks(PARAMS), [blocks(g) for g in GRADS])
    _assert_same(params, blocks({k: np.asarray(x) for k, x in expected.items()}))
    for device in range(2):
        _assert_same({k: x[device] for k, x in seen.items()}, expected_metrics)


def test_one_axis_name_for_all_leaves() -> None:
    mesh = _mesh(("model", 8))
    x = {"x": PARAMS["sharded"].reshape(8, -1)}
    g = {"x": GRADS[0]["sharded"].reshape(8, -1)}
    tx = lamb(0.1, axis_name="model")
    mapped = jax.shard_map(
        lambda x, g: _train(tx, x, [g])[0],
        mesh=mesh,
        in_specs=P("model"),
        out_specs=P("model"),
        check_vma=False,
    )
    _assert_same(jax.jit(mapped)(x, g), _train(lamb(0.1), x, [g])[0])


def test_a_gradient_that_varies_over_devices_raises() -> None:
    mesh = _mesh(("data", 8))
    tx = lamb(0.1)
    params = {"x": jnp.ones(3)}

    def step(batch: jax.Array) -> Any:
        grads = {"x": batch.sum(0)}  # not averaged over the devices
        return _train(tx, params, [grads])[0]

    mapped = jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=True)
    with pytest.raises(ValueError, match=r"update of x varies over the mesh axes \['data'\]"):
        jax.jit(mapped)(jnp.ones((8, 3)))


def test_invalid_axis_names_raise() -> None:
    with pytest.raises(TypeError, match="axis_name must be a list of pairs"):
        lamb(0.1, axis_name=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="axis_name: 'absent' matches no leaf"):
        lamb(0.1, axis_name=[("absent", "data")]).init(PARAMS)


# Scanned models.


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return nn.LayerNorm()(nn.Dense(4)(x)), None


class _Scanned(nn.Module):
    axis: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scanned = nn.scan(
            _Block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3
        )
        x, _ = scanned(name="layers")(nn.Dense(4, name="layers_in")(x), None)
        return x


@pytest.mark.parametrize("axis", [0, -1])
def test_from_scan_stacks_the_leaves_of_the_scanned_module(axis: int) -> None:
    """Stacks every leaf of ``layers``, including biases, and no leaf of ``layers_in``."""
    params = _Scanned(axis).init(jax.random.key(0), jnp.ones((2, 4)))["params"]
    found = layers.assign(layers.from_scan(params, "layers", axis), params)
    has_layers = tree.map_with_path(lambda path, _, spec: (path, bool(spec)), params, found)
    for path, stacked_here in jax.tree.leaves(has_layers, is_leaf=lambda x: isinstance(x, tuple)):
        assert stacked_here == path.startswith("layers/")
    kernel = params["layers"]["Dense_0"]["kernel"]
    (spec,) = found["layers"]["Dense_0"]["kernel"]
    assert kernel.shape[spec.axis] == 3
    tx = lamb(0.1, layers=layers.from_scan(params, "layers", axis))
    ratios = optax.tree.get(tx.init(params), "ScaleByTrustRatioState").trust_ratio
    assert ratios["layers/Dense_0/bias"].shape == (3,)
    assert ratios["layers_in/kernel"].shape == ()


def test_ranks_leave_out_the_stacked_axis() -> None:
    params = _Scanned().init(jax.random.key(0), jnp.ones((2, 4)))["params"]
    stack = layers.from_scan(params, "layers")
    ranks = layers.ranks(params, [("Dense_0/kernel", (stacked(0), split(1, 2))), *stack])
    assert ranks["layers"]["Dense_0"] == {"kernel": 2, "bias": 1}
    assert ranks["layers"]["LayerNorm_0"] == {"scale": 1, "bias": 1}
    assert ranks["layers_in"] == {"kernel": 2, "bias": 1}
    assert layers.ranks(params)["layers"]["Dense_0"]["bias"] == 2


def test_from_scan_raises_for_leaves_that_are_not_stacked() -> None:
    params = {"layers": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "head": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"layers along axis 0, got layers/bias \(2\), .*\(3\)"):
        layers.from_scan(params, "layers")
    with pytest.raises(ValueError, match=r"from_scan: .* matches no leaf; the nearest paths"):
        layers.from_scan(params, "layer")
    with pytest.raises(ValueError, match=r"layers: layers/bias has shape .* and no axis 1"):
        layers.from_scan(params, "layers", 1)
