"""One step under every sharding: LAMB and LARS behind clipping, the same as on one device.

`ROWS` is the table of shardings. In each row a small model is trained on a batch that is cut over
all devices, and two things are compared with the run on one device: how far every layer moved, and
what `metrics.read` shows. Behind it stands what cannot be detected, as tests that a wrong call
gives other numbers, and what is refused.
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

# Both runs are float32 and sums over devices add in another order, which is some 5e-7 of how far
# a layer moves here. Not of where it is: in that an error of the step would be lost.
TOLERANCE = 1e-5  # of the movement, in the Euclidean norm of each layer
METRICS_RTOL = 1e-5  # for the same reason; some 3e-7 here

DEVICES, STEPS, EXAMPLES = 8, 5, 16
CLIP, PHI_BOUNDS, LARS_EPS = 0.5, (0.05, 5.0), 0.1

Params = dict[str, Any]
Trained = tuple[Params, dict[str, jax.Array]]  # and the metrics of the last step
Make = Callable[..., optax.GradientTransformation]
Row = Callable[[Make], Trained]
Cut = Mapping[str, P]  # how some parameters are cut; the others are whole on every device


def _of_norms(seed: int, norms: Sequence[float], *shape: int) -> np.ndarray:
    """Normal entries, scaled to these norms along a new first axis."""
    x = np.random.default_rng(seed).normal(size=(len(norms), *shape))
    x /= np.sqrt(np.sum(x**2, axis=tuple(range(1, x.ndim)), keepdims=True))
    return np.float32(x * np.reshape(norms, (-1, *[1] * len(shape))))


# Layers a thousandfold apart in scale, within an array and between arrays.
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
    params = {**PARAMS, **params}  # those that are not trained stay
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
    """With an eps beside which clipped gradients are not large: Adam hides their scale."""
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
    """The parameters of these names are trained."""
    train = jax.jit(functools.partial(_train, make(), jax.grad(_loss)))
    return jax.device_get(train({name: PARAMS[name] for name in names}, BATCHES))


# The rows of the table.


def _mesh(*axes: str, axis_type: AxisType = AxisType.Auto) -> Mesh:
    shape = {1: (DEVICES,), 2: (2, DEVICES // 2)}[len(axes)]
    return jax.make_mesh(shape, axes, axis_types=(axis_type,) * len(axes))


def _specs(cut: Cut, names: Sequence[str] = NAMES) -> dict[str, P]:
    return {name: cut.get(name, P()) for name in names}


def _axes(spec: P) -> tuple[str, ...]:
    """The mesh axes in ``spec``."""
    return tuple(jax.tree.leaves(tuple(spec)))


def _rules(cut: Cut) -> list[tuple[str, tuple[str, ...]]]:
    return [(name, _axes(spec)) for name, spec in cut.items()]


def _jit(make: Make, mesh: Mesh, cut: Cut) -> Trained:
    placed = {name: NamedSharding(mesh, spec) for name, spec in _specs(cut).items()}
    params = jax.device_put(PARAMS, placed)
    batches = jax.device_put(BATCHES, NamedSharding(mesh, P(None, mesh.axis_names)))

    def loss(params: Params, batch: Any) -> jax.Array:
        if AxisType.Explicit in mesh.axis_types:  # where a model has to say what it gathers
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
    """The gradient on one device of many: cut as the parameters, a mean over the whole batch."""

    def gather(x: jax.Array, spec: P) -> jax.Array:
        for axis, names in enumerate(spec):
            if names is not None:
                x = jax.lax.all_gather(x, names, axis=axis, tiled=True)
        return x

    def loss(params: Params, batch: Any) -> jax.Array:
        return _loss(jax.tree.map(gather, params, specs), batch)

    def gradient(params: Params, batch: Any) -> Params:
        if check_vma:  # types tell what is added over which axis
            return jax.grad(lambda *args: jax.lax.pmean(loss(*args), axes))(params, batch)

        def mean(g: jax.Array, spec: P) -> jax.Array:
            """Over the axes a parameter was gathered over, its gradient is added already."""
            return jax.lax.psum(g, tuple(set(axes) - set(_axes(spec)))) / DEVICES

        return jax.tree.map(mean, jax.grad(loss)(params, batch), specs)

    return gradient


def _shard_map(
    make: Make, cut: Cut, *, check_vma: bool, by_name: bool = False, **told: Any
) -> Trained:
    """``by_name``: all parameters that are trained are cut, over an axis told by its name."""
    mesh = _mesh("data") if by_name or not cut else _mesh("pipe", "model")
    names = tuple(sorted(cut)) if by_name else NAMES
    if cut and not check_vma:
        told["axis_name"] = "data" if by_name else _rules(cut)
    tx = make(**told)
    specs = _specs(cut, names)
    params = {name: PARAMS[name] for name in names}
    kept = P("pipe") if "layers" in told else P()  # a device has the norms of its own layers
    seen = {k: kept if k.endswith("/kernel") else P() for k in metrics.read(tx.init(params))}
    train = jax.shard_map(
        functools.partial(_train, tx, _gradient(specs, mesh.axis_names, check_vma=check_vma)),
        mesh=mesh,
        in_specs=(specs, P(None, mesh.axis_names)),
        out_specs=(specs, seen),
        check_vma=check_vma,
    )
    return jax.jit(train)(params, BATCHES)


def _pmap(make: Make, cut: Cut, *, by_name: bool = False) -> Trained:
    """What is cut has an axis of devices before the one it is cut along, in and out."""
    told = {"axis_name": "data" if by_name else _rules(cut)} if cut else {}
    specs = _specs(cut, tuple(sorted(cut)) if by_name else NAMES)
    axes = {name: spec.index("data") if "data" in spec else None for name, spec in specs.items()}

    def blocks(x: np.ndarray, axis: int | None) -> np.ndarray:
        if axis is None:
            return x
        return x.reshape(*x.shape[:axis], DEVICES, -1, *x.shape[axis + 1 :])

    train = jax.pmap(
        functools.partial(_train, make(**told), _gradient(specs, ("data",), check_vma=False)),
        axis_name="data",
        in_axes=(axes, 1),
        out_axes=(axes, None),
    )
    params = {name: blocks(PARAMS[name], axis) for name, axis in axes.items()}
    return train(params, {name: blocks(x, 1) for name, x in BATCHES.items()})


# Through layers: over one axis and over two, some parameters whole; "odd" and "scale" always are.
FSDP = {"kernel": P(None, None, "data"), "qkv": P("data"), "bias": P("data"), "zero": P("data")}
FSDP_JIT = {**FSDP, "qkv": P(None, "data")}  # across the parts of what is split: under jit alone
ONE_AXIS = {"kernel": P(None, "model"), "qkv": P("model"), "zero": P(None, "pipe")}
TWO_AXES = {"kernel": P(None, "pipe", "model"), "qkv": P(("pipe", "model")), "bias": P("model")}
# Between layers, and through them over another axis.
BETWEEN = {"kernel": P("pipe", None, "model"), "qkv": P("model"), "bias": P("pipe")}
SPREAD = [("kernel", stacked(0, mesh_axis="pipe")), *LAYERS]

ROWS: dict[str, Row] = {
    "jit": lambda make: _jit(make, _mesh("data"), {}),
    "jit, cut": lambda make: _jit(make, _mesh("data"), FSDP_JIT),
    "jit, between": lambda make: _jit(make, _mesh("pipe", "model"), BETWEEN),
    "explicit": lambda make: _jit(make, _mesh("data", axis_type=AxisType.Explicit), FSDP_JIT),
    "zero1": lambda make: _zero1(make)[:2],
    "shard_map": lambda make: _shard_map(make, {}, check_vma=True),
    "shard_map, one axis": lambda make: _shard_map(make, ONE_AXIS, check_vma=True),
    "shard_map, two axes": lambda make: _shard_map(make, TWO_AXES, check_vma=True),
    "shard_map, between": lambda make: _shard_map(make, BETWEEN, check_vma=True, layers=SPREAD),
    "unchecked": lambda make: _shard_map(make, {}, check_vma=False),
    "unchecked, by name": lambda make: _shard_map(make, FSDP, check_vma=False, by_name=True),
    "unchecked, one axis": lambda make: _shard_map(make, ONE_AXIS, check_vma=False),
    "unchecked, two axes": lambda make: _shard_map(make, TWO_AXES, check_vma=False),
    "unchecked, between": lambda make: _shard_map(make, BETWEEN, check_vma=False, layers=SPREAD),
    "pmap": lambda make: _pmap(make, {}),
    "pmap, by name": lambda make: _pmap(make, FSDP, by_name=True),
    "pmap, by rules": lambda make: _pmap(make, FSDP),
}


def _layers_of(name: str, x: Any) -> np.ndarray:
    """One row a layer, of an array of any blocks."""
    x = np.asarray(x, np.float64).reshape(PARAMS[name].shape)
    layers = np.split(x, 3, axis=1) if name == "qkv" else x if name == "kernel" else [x]
    return np.stack([layer.reshape(-1) for layer in layers])


def _distances(x: Params, y: Params) -> dict[str, np.ndarray]:
    def distances(name: str) -> np.ndarray:
        return np.linalg.norm(_layers_of(name, x[name]) - _layers_of(name, y[name]), axis=1)

    return {name: distances(name) for name in x}


def _errors(make: Make, params: Params) -> dict[str, np.ndarray]:
    """How far from its place each layer ended, over how far it should have moved."""
    expected, _ = _on_one_device(make, tuple(sorted(params)))
    apart, moved = _distances(params, expected), _distances(expected, PARAMS)
    return {name: apart[name] / moved[name] for name in params}


@every_optimizer
@pytest.mark.parametrize("row", ROWS)
def test_a_step_is_that_of_one_device(row: str, make: Make) -> None:
    params, seen = ROWS[row](make)
    for x in jax.tree.leaves((params, seen)):  # devices that hold the same hold the same numbers
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(x)[shard.index])
    for name, errors in _errors(make, params).items():
        assert (errors <= TOLERANCE).all(), (name, errors)
    _, expected = _on_one_device(make, tuple(sorted(params)))
    assert seen.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(seen[key], values, METRICS_RTOL, err_msg=key)


@every_optimizer
def test_nothing_hides_a_wrong_scale(make: Make) -> None:
    """The gradient is clipped; phi's bounds bind for some layers; LARS's eps is not small."""
    params, seen = _on_one_device(make, NAMES)
    assert all((moved > 1e-3).all() for moved in _distances(params, PARAMS).values())
    assert seen["gradient_norm"] > CLIP
    norms = np.hstack([x for key, x in seen.items() if key.startswith("parameter_norm/")])
    low, high = PHI_BOUNDS
    assert (norms < low).any()
    assert (norms > high).any()
    assert ((low < norms) & (norms < high)).any()
    assert norms.max() > 500 * norms.min()  # a thousandfold before the first step
    if make is _lars:
        updates = np.hstack([x for key, x in seen.items() if key.startswith("update_norm/")])
        assert (updates + 0.1 * norms < LARS_EPS).any()


@every_optimizer
def test_a_device_holds_its_share_of_zero1_state(make: Make) -> None:
    """An eighth of what divides, and the rest whole."""
    state = jax.tree.leaves(_zero1(make)[2])
    divided = sum(x.nbytes for x in state if any(size % DEVICES == 0 for size in x.shape))
    whole = sum(x.nbytes for x in state) - divided
    assert divided > 4 * whole
    shards = [shard for x in state for shard in x.addressable_shards]
    for device in jax.devices():
        held = sum(shard.data.nbytes for shard in shards if shard.device == device)
        assert held <= divided / DEVICES + whole


# What cannot be detected: all of this runs, and gives other numbers.

NOT_TOLD: dict[str, Any] = {"axis_name": None}
MISTOLD: list[tuple[str, dict[str, Any]]] = [
    ("unchecked, by name", NOT_TOLD),
    ("unchecked, one axis", NOT_TOLD),
    ("unchecked, two axes", NOT_TOLD),
    ("unchecked, between", NOT_TOLD),
    ("pmap, by name", NOT_TOLD),
    ("pmap, by rules", NOT_TOLD),
    # Parameters are whole, and the axis of the batch is told as one they are cut over.
    ("unchecked", {"axis_name": "data"}),
    ("pmap", {"axis_name": "data"}),
    # Layers lie apart over an axis that is not told; types do not say which dimension is cut.
    ("unchecked, between", {"layers": LAYERS}),
    ("shard_map, between", {"layers": LAYERS}),
]


@pytest.mark.parametrize(
    ("row", "wrong"), MISTOLD, ids=lambda x: x if isinstance(x, str) else " ".join(x)
)
def test_what_is_told_wrongly_is_wrong(row: str, wrong: dict[str, Any]) -> None:
    """LARS: of its ratio only the eps shows gradients that are all too small alike."""
    params, _ = ROWS[row](lambda **told: _lars(**{**told, **wrong}))
    assert (_errors(_lars, params)["kernel"] > TOLERANCE).all()


@pytest.mark.parametrize("check_vma", [True, False])
def test_parts_along_a_dimension_that_is_cut_are_wrong(check_vma: bool) -> None:
    params, _ = _shard_map(_lars, {"qkv": P(None, "model")}, check_vma=check_vma)
    assert (_errors(_lars, params)["qkv"] > TOLERANCE).all()


# What is detected.


every_layerwise = pytest.mark.parametrize("make", [lamb, lars])


def _checked_update(tx: optax.GradientTransformation, cut: P, gradient: Any) -> None:
    """Traces one update of a parameter ``x`` under ``shard_map``; rows lie over "pipe"."""

    def update(x: jax.Array, rows: jax.Array) -> jax.Array:
        return tx.update({"x": gradient(x, rows)}, tx.init({"x": x}), {"x": x})[0]["x"]

    mapped = jax.shard_map(
        update, mesh=_mesh("pipe", "model"), in_specs=(cut, P("pipe")), out_specs=cut
    )
    jax.eval_shape(mapped, PARAMS["kernel"], BATCHES["x"][0])


@every_layerwise
def test_an_update_that_varies_where_its_parameter_does_not(make: Make) -> None:
    """Beside an axis that both are cut over."""
    with pytest.raises(ValueError, match=r"update of x varies over the mesh axes \['pipe'\], wh"):
        _checked_update(make(0.1), P("model"), lambda x, rows: x * jnp.mean(rows))


@pytest.mark.parametrize("make", [lamb, lars, clip_by_global_norm])
def test_an_axis_name_that_types_contradict(make: Make) -> None:
    """The sum over the axis would count one array several times."""
    with pytest.raises(ValueError, match=r"axis_name: x is told to be cut over .* \['pipe'\]"):
        _checked_update(make(0.1, axis_name="pipe"), P("model"), lambda x, rows: x)


@every_layerwise
def test_axes_that_the_mesh_does_not_have(make: Make) -> None:
    spread = [("x", stacked(0, mesh_axis="pip"))]
    message = r"stacked: mesh_axis must be one of \('pipe', 'model'\), got pip"
    with pytest.raises(ValueError, match=message):
        _checked_update(make(0.1, layers=spread), P("pipe"), lambda x, rows: x)
    with pytest.raises(NameError, match="unbound axis name: pip"):
        _checked_update(make(0.1, axis_name="pip"), P("pipe"), lambda x, rows: x)


@pytest.mark.parametrize("tx", [clip_by_global_norm(1.0, [("absent", "data")]),
                                lars(0.1, axis_name=[("kernel", "data"), ("absent", "data")])],
                         ids=["clip", "lars"])  # fmt: skip
def test_a_rule_for_no_parameter(tx: optax.GradientTransformation) -> None:
    with pytest.raises(ValueError, match="axis_name: 'absent' matches no leaf"):
        tx.init(PARAMS)


@pytest.mark.parametrize("place", [sharding.init, sharding.state_shardings])
def test_zero1_on_an_unknown_axis(place: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"zero1 must be one of \('data',\), got 'model'"):
        place(_lamb(), PARAMS, mesh=_mesh("data"), zero1="model")
