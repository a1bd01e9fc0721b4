"""Tests that clipped LAMB and LARS make the same steps under every sharding as on one device.

`ROWS` is the table of shardings. Each row trains a small model on a batch that is sharded over all
devices, and compares two things with a run on one device: how far every layer moved, and what
`metrics.read` returns. The other tests cover mistakes: those that can be detected raise, and the
others give other numbers.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optim_zoo import clip_by_global_norm, lamb, lars, metrics, sharding, split, stacked
from tests import cover

# Float32 sums over devices are added in another order, which changes how far a layer moves by about
# 5e-7. Relative to the parameters themselves, an error of the step would not show.
TOLERANCE = 1e-5  # relative to the distance that each layer moves, in the Euclidean norm
METRICS_RTOL = 1e-5  # for the same reason; the difference is about 3e-7 here

DEVICES, STEPS, EXAMPLES = 8, 5, 16
CLIP, PHI_BOUNDS, LARS_EPS = 0.5, (0.05, 5.0), 0.1

Params = dict[str, Any]
Trained = tuple[Params, dict[str, jax.Array]]  # parameters, metrics of the last step
Make = Callable[..., optax.GradientTransformation]
Row = Callable[[Make], Trained]
Specs = Mapping[str, P]  # how some parameters are sharded; the others are replicated


def _of_norms(seed: int, norms: Sequence[float], *shape: int) -> np.ndarray:
    """Returns normal entries, scaled to these norms along a new first axis."""
    x = np.random.default_rng(seed).normal(size=(len(norms), *shape))
    x /= np.sqrt(np.sum(x**2, axis=tuple(range(1, x.ndim)), keepdims=True))
    return np.float32(x * np.reshape(norms, (-1, *[1] * len(shape))))


# The scales of layers differ by a factor of 1,000, within an array and between arrays.
PARAMS: Params = {
    "bias": _of_norms(0, [0.01], 8)[0],
    "kernel": _of_norms(1, [0.01, 1, 0.2, 10], 8, 8),
    "odd": _of_norms(2, [10], 3, 5)[0],
    "qkv": np.concatenate(_of_norms(3, [10, 0.01, 1], 8, 8), axis=1),
    "scale": np.float32(0.5),
    "zero": np.zeros((8, 8), np.float32),
}
NAMES = tuple(PARAMS)
LAYERS = [("kernel", stacked(0)), ("qkv", split(1, 3))]
BATCHES = {
    name: np.float32(np.random.default_rng(seed).normal(size=(STEPS, EXAMPLES, size)))
    for seed, (name, size) in enumerate({"x": 8, "y": 8, "z": 3}.items())
}


def _loss(params: Params, batch: Any) -> jax.Array:
    params = {**PARAMS, **params}  # the other parameters are constant
    x = batch["x"]
    hidden = x + jnp.tanh(jnp.einsum("ni,lij->lnj", x, params["kernel"])).sum(0)
    q, k, v = jnp.split(jnp.tanh(hidden @ params["qkv"]), 3, axis=1)
    hidden = hidden + (1 + q) * (1 + k) + v
    odd = jnp.tanh(batch["z"] @ params["odd"]).mean(1, keepdims=True)
    out = params["scale"] * hidden + hidden @ params["zero"] + params["bias"][None] + odd
    return jnp.mean((out - batch["y"]) ** 2)


def _rate(step: jax.Array) -> jax.Array:
    return 0.1 / (1 + 0.2 * step)


def _lamb(axis_name: Any = None, layers: Any = LAYERS) -> optax.GradientTransformation:
    """Returns LAMB with an eps so large that Adam does not hide the scale of clipped gradients."""
    named = {"axis_name": axis_name, "layers": layers}
    tx = lamb(_rate, eps=1e-3, weight_decay=0.1, phi_bounds=PHI_BOUNDS, **named)
    return optax.chain(clip_by_global_norm(CLIP, axis_name), tx)


def _lars(axis_name: Any = None, layers: Any = LAYERS) -> optax.GradientTransformation:
    named = {"axis_name": axis_name, "layers": layers}
    tx = lars(_rate, weight_decay=0.1, trust_coefficient=0.5, eps=LARS_EPS, **named)
    return optax.chain(clip_by_global_norm(CLIP, axis_name), tx)


pytestmark = pytest.mark.usefixtures("quick_to_compile")
every_optimizer = pytest.mark.parametrize("make", [_lamb, _lars], ids=["lamb", "lars"])


def _train(
    tx: optax.GradientTransformation, gradient: Callable[..., Params], params: Params, batches: Any
) -> Trained:
    def step(carry: Any, batch: Any) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update(gradient(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
    return params, metrics.read(state)


@functools.cache
def _on_one_device(make: Make, names: tuple[str, ...]) -> Trained:
    """Trains the parameters of these names."""
    train = jax.jit(functools.partial(_train, make(), jax.grad(_loss)))
    return jax.device_get(train({name: PARAMS[name] for name in names}, BATCHES))


# The rows of the table.


def _mesh(*axes: str, axis_type: AxisType = AxisType.Auto) -> Mesh:
    shape = {1: (DEVICES,), 2: (2, DEVICES // 2)}[len(axes)]
    return jax.make_mesh(shape, axes, axis_types=(axis_type,) * len(axes))


def _specs(sharded: Specs, names: Sequence[str] = NAMES) -> dict[str, P]:
    return {name: sharded.get(name, P()) for name in names}


def _axes(spec: P) -> tuple[str, ...]:
    """Returns the mesh axes in ``spec``."""
    return tuple(jax.tree.leaves(tuple(spec)))


def _rules(sharded: Specs) -> list[tuple[str, tuple[str, ...]]]:
    return [(name, _axes(spec)) for name, spec in sharded.items()]


def _jit(make: Make, mesh: Mesh, sharded: Specs) -> Trained:
    placed = {name: NamedSharding(mesh, spec) for name, spec in _specs(sharded).items()}
    params = jax.device_put(PARAMS, placed)
    batches = jax.device_put(BATCHES, NamedSharding(mesh, P(None, mesh.axis_names)))

    def loss(params: Params, batch: Any) -> jax.Array:
        if AxisType.Explicit in mesh.axis_types:  # a model must gather its parameters itself
            params = jax.sharding.reshard(params, NamedSharding(mesh, P()))
        return _loss(params, batch)

    train = functools.partial(_train, make(), jax.grad(loss))
    with jax.set_mesh(mesh):
        return jax.jit(train, out_shardings=(placed, None))(params, batches)


@functools.cache
def _zero1(make: Make) -> tuple[Params, dict[str, jax.Array], optax.OptState]:
    step = sharding.data_parallel(_loss, make(), mesh=_mesh("data"), zero1="data")
    params, state = step.init(PARAMS)
    for i in range(STEPS):
        params, state, _ = step(params, state, {name: x[i] for name, x in BATCHES.items()})
    return params, metrics.read(state), state


def _gradient(specs: dict[str, P], axes: tuple[str, ...], *, check_vma: bool) -> Any:
    """Returns the gradient of the mean over the global batch, sharded as the parameters."""

    def gather(x: jax.Array, spec: P) -> jax.Array:
        for axis, names in enumerate(spec):
            if names is not None:
                x = jax.lax.all_gather(x, names, axis=axis, tiled=True)
        return x

    def loss(params: Params, batch: Any) -> jax.Array:
        return _loss(jax.tree.map(gather, params, specs), batch)

    def gradient(params: Params, batch: Any) -> Params:
        if check_vma:  # the types tell JAX which sums over mesh axes are needed
            return jax.grad(lambda *args: jax.lax.pmean(loss(*args), axes))(params, batch)

        def mean(g: jax.Array, spec: P) -> jax.Array:
            """Averages a gradient that is already summed over the axes of its parameter."""
            return jax.lax.psum(g, tuple(set(axes) - set(_axes(spec)))) / DEVICES

        return jax.tree.map(mean, jax.grad(loss)(params, batch), specs)

    return gradient


def _shard_map(
    make: Make, sharded: Specs, *, check_vma: bool, by_name: bool = False, **options: Any
) -> Trained:
    """Trains under shard_map; ``by_name`` shards all trained parameters over one named axis."""
    mesh = _mesh("data") if by_name or not sharded else _mesh("pipe", "model")
    names = tuple(sorted(sharded)) if by_name else NAMES
    if sharded and not check_vma:
        options["axis_name"] = "data" if by_name else _rules(sharded)
    tx = make(**options)
    specs = _specs(sharded, names)
    params = {name: PARAMS[name] for name in names}
    kept = (
        P("pipe") if "layers" in options else P()
    )  # a device has the norms of the layers that it holds
    seen = {k: kept if k.endswith("/kernel") else P() for k in metrics.read(tx.init(params))}
    train = jax.shard_map(
        functools.partial(_train, tx, _gradient(specs, mesh.axis_names, check_vma=check_vma)),
        mesh=mesh,
        in_specs=(specs, P(None, mesh.axis_names)),
        out_specs=(specs, seen),
        check_vma=check_vma,
    )
    return jax.jit(train)(params, BATCHES)


def _pmap(make: Make, sharded: Specs, *, by_name: bool = False) -> Trained:
    """Trains under pmap; sharded arrays have a device axis before their sharded axis."""
    options = {"axis_name": "data" if by_name else _rules(sharded)} if sharded else {}
    specs = _specs(sharded, tuple(sorted(sharded)) if by_name else NAMES)
    axes = {name: spec.index("data") if "data" in spec else None for name, spec in specs.items()}

    def blocks(x: np.ndarray, axis: int | None) -> np.ndarray:
        if axis is None:
            return x
        return x.reshape(*x.shape[:axis], DEVICES, -1, *x.shape[axis + 1 :])

    train = jax.pmap(
        functools.partial(_train, make(**options), _gradient(specs, ("data",), check_vma=False)),
        axis_name="data",
        in_axes=(axes, 1),
        out_axes=(axes, None),
    )
    params = {name: blocks(PARAMS[name], axis) for name, axis in axes.items()}
    return train(params, {name: blocks(x, 1) for name, x in BATCHES.items()})


# Each layer is sharded over one or two axes. Some layers, always "odd" and "scale", are replicated.
FSDP = {"kernel": P(None, None, "data"), "qkv": P("data"), "bias": P("data"), "zero": P("data")}
FSDP_JIT = {**FSDP, "qkv": P(None, "data")}  # shards the axis that is split; works only under jit
ONE_AXIS = {"kernel": P(None, "model"), "qkv": P("model"), "zero": P(None, "pipe")}
TWO_AXES = {"kernel": P(None, "pipe", "model"), "qkv": P(("pipe", "model")), "bias": P("model")}
# Devices hold different layers, and another axis shards each layer.
BETWEEN = {"kernel": P("pipe", None, "model"), "qkv": P("model"), "bias": P("pipe")}
LAYERS_OVER_PIPE = [("kernel", stacked(0, mesh_axis="pipe")), *LAYERS]

ROWS: dict[str, Row] = {
    "jit": lambda make: _jit(make, _mesh("data"), {}),
    "jit, sharded": lambda make: _jit(make, _mesh("data"), FSDP_JIT),
    "jit, between": lambda make: _jit(make, _mesh("pipe", "model"), BETWEEN),
    "explicit": lambda make: _jit(make, _mesh("data", axis_type=AxisType.Explicit), FSDP_JIT),
    "zero1": lambda make: _zero1(make)[:2],
    "shard_map": lambda make: _shard_map(make, {}, check_vma=True),
    "shard_map, one axis": lambda make: _shard_map(make, ONE_AXIS, check_vma=True),
    "shard_map, two axes": lambda make: _shard_map(make, TWO_AXES, check_vma=True),
    "shard_map, between": lambda make: _shard_map(
        make, BETWEEN, check_vma=True, layers=LAYERS_OVER_PIPE
    ),
    "unchecked": lambda make: _shard_map(make, {}, check_vma=False),
    "unchecked, by name": lambda make: _shard_map(make, FSDP, check_vma=False, by_name=True),
    "unchecked, one axis": lambda make: _shard_map(make, ONE_AXIS, check_vma=False),
    "unchecked, two axes": lambda make: _shard_map(make, TWO_AXES, check_vma=False),
    "unchecked, between": lambda make: _shard_map(
        make, BETWEEN, check_vma=False, layers=LAYERS_OVER_PIPE
    ),
    "pmap": lambda make: _pmap(make, {}),
    "pmap, by name": lambda make: _pmap(make, FSDP, by_name=True),
    "pmap, by rules": lambda make: _pmap(make, FSDP),
}


def _layers_of(name: str, x: Any) -> np.ndarray:
    """Returns one row for each layer of an array, which may be in blocks."""
    x = np.asarray(x, np.float64).reshape(PARAMS[name].shape)
    layers = np.split(x, 3, axis=1) if name == "qkv" else x if name == "kernel" else [x]
    return np.stack([layer.reshape(-1) for layer in layers])


def _distances(x: Params, y: Params) -> dict[str, np.ndarray]:
    def distances(name: str) -> np.ndarray:
        return np.linalg.norm(_layers_of(name, x[name]) - _layers_of(name, y[name]), axis=1)

    return {name: distances(name) for name in x}


def _errors(make: Make, params: Params) -> dict[str, np.ndarray]:
    """Returns the error of each layer relative to the distance that it should have moved."""
    expected, _ = _on_one_device(make, tuple(sorted(params)))
    errors, moved = _distances(params, expected), _distances(expected, PARAMS)
    return {name: errors[name] / moved[name] for name in params}


@pytest.mark.diagonal
@every_optimizer
@pytest.mark.parametrize("row", ROWS)
def test_steps_agree_with_one_device(row: str, make: Make) -> None:
    params, seen = ROWS[row](make)
    for x in jax.tree.leaves((params, seen)):  # replicas are bit-identical
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(x)[shard.index])
    for name, errors in _errors(make, params).items():
        assert (errors <= TOLERANCE).all(), (name, errors)
    _, expected = _on_one_device(make, tuple(sorted(params)))
    assert seen.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(seen[key], values, METRICS_RTOL, err_msg=key)


@every_optimizer
def test_the_problem_reveals_a_wrong_scale(make: Make) -> None:
    """The gradient is clipped, phi's bounds apply to some layers, and LARS's eps is not small."""
    params, seen = _on_one_device(make, NAMES)
    assert all((moved > 1e-3).all() for moved in _distances(params, PARAMS).values())
    assert seen["gradient_norm"] > CLIP
    norms = np.hstack([x for key, x in seen.items() if key.startswith("parameter_norm/")])
    low, high = PHI_BOUNDS
    assert (norms < low).any()
    assert (norms > high).any()
    assert ((low < norms) & (norms < high)).any()
    assert norms.max() > 500 * norms.min()  # a factor of 1,000 before the first step
    if make is _lars:
        updates = np.hstack([x for key, x in seen.items() if key.startswith("update_norm/")])
        assert (updates + 0.1 * norms < LARS_EPS).any()


@every_optimizer
def test_zero1_divides_the_state_between_devices(make: Make) -> None:
    """A device holds an eighth of the arrays that can be divided, and all of the others."""
    state = jax.tree.leaves(_zero1(make)[2])
    divided = sum(x.nbytes for x in state if any(size % DEVICES == 0 for size in x.shape))
    replicated = sum(x.nbytes for x in state) - divided
    assert divided > 4 * replicated
    shards = [shard for x in state for shard in x.addressable_shards]
    for device in jax.devices():
        held = sum(shard.data.nbytes for shard in shards if shard.device == device)
        assert held <= divided / DEVICES + replicated


# Mistakes that cannot be detected: the step runs, and its numbers are wrong.

MISSING: dict[str, Any] = {"axis_name": None}
MISTAKES: list[tuple[str, dict[str, Any]]] = [
    ("unchecked, by name", MISSING),
    ("unchecked, one axis", MISSING),
    ("unchecked, two axes", MISSING),
    ("unchecked, between", MISSING),
    ("pmap, by name", MISSING),
    ("pmap, by rules", MISSING),
    # The parameters are replicated, but passed as sharded over the batch axis.
    ("unchecked", {"axis_name": "data"}),
    ("pmap", {"axis_name": "data"}),
    # No rule names the axis that layers are sharded over; types do not name the dimension.
    ("unchecked, between", {"layers": LAYERS}),
    ("shard_map, between", {"layers": LAYERS}),
]


# A plain pytest makes one mistake of each kind.
ONE_OF_EACH_KIND = (MISTAKES[0], MISTAKES[5], MISTAKES[6], MISTAKES[9])


@pytest.mark.parametrize(
    ("row", "wrong"),
    cover.mostly_slow(
        {f"{row}-{' '.join(wrong)}": (row, wrong) for row, wrong in MISTAKES},
        [f"{row}-{' '.join(wrong)}" for row, wrong in ONE_OF_EACH_KIND],
        unpack=True,
    ),
)
def test_undetected_mistakes_give_wrong_numbers(row: str, wrong: dict[str, Any]) -> None:
    """Uses LARS, whose eps reveals gradients that are all too small by the same factor."""
    params, _ = ROWS[row](lambda **options: _lars(**{**options, **wrong}))
    assert (_errors(_lars, params)["kernel"] > TOLERANCE).all()


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_split_along_a_sharded_dimension_gives_wrong_numbers(check_vma: bool) -> None:
    params, _ = _shard_map(_lars, {"qkv": P(None, "model")}, check_vma=check_vma)
    assert (_errors(_lars, params)["qkv"] > TOLERANCE).all()


# Mistakes that are detected.


every_layerwise = pytest.mark.parametrize("make", [lamb, lars])


def _checked_update(tx: optax.GradientTransformation, sharded: P, gradient: Any) -> None:
    """Traces one update of a parameter ``x`` under ``shard_map``; rows are sharded over "pipe"."""

    def update(x: jax.Array, rows: jax.Array) -> jax.Array:
        return tx.update({"x": gradient(x, rows)}, tx.init({"x": x}), {"x": x})[0]["x"]

    mapped = jax.shard_map(
        update, mesh=_mesh("pipe", "model"), in_specs=(sharded, P("pipe")), out_specs=sharded
    )
    jax.eval_shape(mapped, PARAMS["kernel"], BATCHES["x"][0])


@every_layerwise
def test_an_update_that_varies_over_an_axis_of_a_replicated_parameter_raises(make: Make) -> None:
    """The update and the parameter are also sharded over another axis."""
    with pytest.raises(ValueError, match=r"update of x varies over the mesh axes \['pipe'\], wh"):
        _checked_update(make(0.1), P("model"), lambda x, rows: x * jnp.mean(rows))


@pytest.mark.parametrize("make", [lamb, lars, clip_by_global_norm])
def test_an_axis_name_that_contradicts_the_types_raises(make: Make) -> None:
    """The sum over the axis would count one array several times."""
    with pytest.raises(ValueError, match=r"axis_name names .* \['pipe'\] for x, which does not"):
        _checked_update(make(0.1, axis_name="pipe"), P("model"), lambda x, rows: x)


@every_layerwise
def test_axes_that_the_mesh_does_not_have_raise(make: Make) -> None:
    layers = [("x", stacked(0, mesh_axis="pip"))]
    message = r"stacked: mesh_axis must be one of \('pipe', 'model'\), got pip"
    with pytest.raises(ValueError, match=message):
        _checked_update(make(0.1, layers=layers), P("pipe"), lambda x, rows: x)
    with pytest.raises(NameError, match="unbound axis name: pip"):
        _checked_update(make(0.1, axis_name="pip"), P("pipe"), lambda x, rows: x)


@pytest.mark.parametrize("tx", [clip_by_global_norm(1.0, [("absent", "data")]),
                                lars(0.1, axis_name=[("kernel", "data"), ("absent", "data")])],
                         ids=["clip", "lars"])  # fmt: skip
def test_a_rule_that_matches_no_parameter_raises(tx: optax.GradientTransformation) -> None:
    with pytest.raises(ValueError, match="axis_name: 'absent' matches no leaf"):
        tx.init(PARAMS)


@pytest.mark.parametrize("place", [sharding.init, sharding.state_shardings])
def test_zero1_over_an_unknown_axis_raises(place: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"zero1 must be one of \('data',\), got 'model'"):
        place(_lamb(), PARAMS, mesh=_mesh("data"), zero1="model")
