"""Tests norms of float32 and bfloat16 arrays whose squares overflow or underflow in float32.

Each mode is compiled once and then runs with entries of every magnitude.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from optim_zoo import (
    clip_by_global_norm,
    lamb,
    lars,
    lars_ema,
    layers,
    layerwise_adaptive,
    metrics,
    momentum,
    split,
    stacked,
)
from optim_zoo.layers import norms, wide_range
from tests.reference.lamb import lamb as lamb_reference
from tests.reference.lars import lars as lars_reference
from tests.reference.lars_ema import lars_ema as lars_ema_reference
from tests.reference.layerwise_adaptive import layerwise_adaptive as layerwise_reference

pytestmark = pytest.mark.usefixtures("quick_to_compile")

Arrays = dict[str, np.ndarray]
MAGNITUDES = [1e-28, 1e-23, 1e-10, 1.0, 2e19, 1e25]
RATE, DECAY = 0.1, 0.01
AXIS = {"plain": 0, "stacked": 1, "split": 0}  # the axis along which a leaf is sharded
SHAPES = {"plain": (8, 6), "stacked": (2, 8, 3), "split": (8, 6)}
RULES = [("stacked", stacked(0)), ("split", split(1, 2))]
SPEC = {path: layers.assign(RULES, {path: np.zeros(s)})[path] for path, s in SHAPES.items()}
MODES = ["eager", "jit", "sharded", "shard_map", "shard_map by name", "pmap"]


def _arrays(
    magnitude: float, seed: int, dtype: str = "float32", last: float | None = None
) -> Arrays:
    """Returns leaves with entries of one magnitude; ``last`` is that of the last layer."""
    rng = np.random.default_rng(seed)
    arrays = {path: magnitude * rng.normal(size=shape) for path, shape in SHAPES.items()}
    if last is not None:
        arrays["stacked"][1] = last * rng.normal(size=(8, 3))
        arrays["split"][:, 3:] = last * rng.normal(size=(8, 3))
    return {path: np.asarray(x, dtype) for path, x in arrays.items()}


def _layers(arrays: Arrays) -> Arrays:
    """Returns every layer as a separate array, in the order of the norms of its leaf."""
    return {
        "plain/0": arrays["plain"],
        "stacked/0": arrays["stacked"][0],
        "stacked/1": arrays["stacked"][1],
        "split/0": arrays["split"][:, :3],
        "split/1": arrays["split"][:, 3:],
    }


def _norms(arrays: Arrays) -> Arrays:
    """Returns the norm of every layer of every leaf, in float64."""
    found: dict[str, list[float]] = {}
    for name, x in _layers(arrays).items():
        found.setdefault(name[:-2], []).append(np.linalg.norm(np.float64(x)))
    return {path: np.asarray(values) for path, values in found.items()}


def _in_mode(mode: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles ``function(axis_name, *arrays)``, which returns arrays and norms by path.

    All modes but ``eager`` and ``jit`` shard every leaf over eight devices.
    """
    specs = {path: P(*[None] * axis, "data") for path, axis in AXIS.items()}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    if mode == "eager":
        return functools.partial(function, None)
    if mode == "jit":
        return jax.jit(functools.partial(function, None))
    if mode == "sharded":
        placed = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs)

        def run(*arrays: Any) -> Any:
            with jax.set_mesh(mesh):
                return compiled(*(jax.device_put(x, placed) for x in arrays))

        compiled = jax.jit(functools.partial(function, None))
        return run
    if mode == "pmap":
        mapped = jax.pmap(functools.partial(function, "data"), "data")

        def run_pmap(*arrays: Any) -> Any:
            blocks = [
                {k: np.stack(np.split(x, 8, AXIS[k])) for k, x in tree.items()} for tree in arrays
            ]
            made, values = mapped(*blocks)
            made = {k: np.concatenate(list(x), AXIS[k]) for k, x in made.items()}
            return made, jax.tree.map(lambda x: x[0], values)

        return run_pmap
    checked = mode == "shard_map"

    def run_mapped(*arrays: Any) -> Any:
        inner = functools.partial(function, None if checked else "data")
        return jax.shard_map(
            inner,
            mesh=mesh,
            in_specs=(specs,) * len(arrays),
            out_specs=(specs, P()),
            check_vma=checked,
        )(*arrays)

    return jax.jit(run_mapped)


@pytest.mark.diagonal
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_norms_agree_with_float64(mode: str, dtype: str) -> None:
    def found(axis_name: str | None, x: dict[str, jax.Array]) -> Any:
        axes = () if axis_name is None else (axis_name,)
        of_leaves = {path: norms.norm(x[path], SPEC[path], axes) for path in x}
        return x, {"leaves": of_leaves, "global": norms.global_norm(x, axis_name)}

    run = _in_mode(mode, found)
    for magnitude, last in itertools.product(MAGNITUDES, [None, 1.0]):
        x = _arrays(magnitude, 0, dtype, last)
        _, values = run({path: jnp.asarray(array) for path, array in x.items()})
        expected = _norms(x)
        # Sums of at most 48 squares in float32 are off by about 1e-7.
        for path, norm in values["leaves"].items():
            np.testing.assert_allclose(norm.reshape(-1), expected[path], rtol=1e-6)
        total = np.linalg.norm(np.concatenate(list(expected.values())))
        np.testing.assert_allclose(values["global"], total, rtol=1e-6)


def test_norms_without_a_branch_agree_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the code without a branch, which TPUs and GPUs use, on a CPU."""
    monkeypatch.setattr(wide_range, "_with_branch", wide_range._at_once)
    run = jax.jit(lambda x, spec: norms._norms_of([x], spec, ())[0], static_argnums=1)
    for magnitude, last in itertools.product(MAGNITUDES, [None, 1.0]):
        x = _arrays(magnitude, 0, last=last)
        for path, expected in _norms(x).items():
            found = run(x[path], SPEC[path]).reshape(-1)
            np.testing.assert_allclose(found, expected, rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: run(x, ())))
    for magnitude in (
        1e-28,
        1e-12,
        1.0,
        1e12,
    ):  # at the ends, one of the two sums is zero or infinite
        x = _arrays(magnitude, 0)["plain"]
        expected = np.float64(x) / np.linalg.norm(np.float64(x))
        np.testing.assert_allclose(gradient(x), expected, rtol=1e-5)
    for bad in (np.nan, np.inf, 0.0):
        np.testing.assert_equal(float(run(np.float32([bad, 0.0]), ())), bad)


# (constructor, reference, whether gradients of every magnitude are possible). LAMB squares the
# gradient in Adam's second moment.
OPTIMIZERS: dict[str, tuple[Callable[..., optax.GradientTransformation], Any, bool]] = {
    "lamb": (
        functools.partial(lamb, weight_decay=DECAY),
        functools.partial(lamb_reference, weight_decay=DECAY),
        False,
    ),
    "lars": (
        functools.partial(lars, weight_decay=DECAY, trust_coefficient=1.0),
        functools.partial(lars_reference, weight_decay=DECAY, trust_coefficient=1.0),
        True,
    ),
    "lars_ema": (
        functools.partial(lars_ema, weight_decay=DECAY),
        functools.partial(lars_ema_reference, weight_decay=DECAY),
        True,
    ),
    "layerwise_adaptive": (
        functools.partial(layerwise_adaptive, optax.identity()),
        functools.partial(layerwise_reference, base=lambda name, g, t: g),
        True,
    ),
}


@pytest.mark.diagonal
@pytest.mark.parametrize("mode", ["jit", "shard_map", "pmap"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_follow_their_references(name: str, mode: str) -> None:
    make, follow, any_gradient = OPTIMIZERS[name]

    def two_steps(axis_name: str | None, params: Any, *gradients: Any) -> Any:
        tx = make(RATE, layers=RULES, axis_name=axis_name)
        state = tx.init(params)
        for g in gradients:
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
        read = metrics.read(state)
        return params, {path: read[f"parameter_norm/{path}"] for path in params}

    run = _in_mode(mode, two_steps)
    for magnitude in MAGNITUDES:
        params = _arrays(magnitude, 0, last=1.0)
        for size in {1.0, magnitude if any_gradient else 1.0}:
            gradients = [_arrays(size, seed, last=1.0) for seed in (1, 2)]
            after, parameter_norms = run(params, *gradients)
            trajectory = follow(
                _layers(params), map(_layers, gradients), learning_rate=lambda step: RATE
            )
            for layer, x in _layers(jax.tree.map(np.asarray, after)).items():
                # Each step moves a layer by a tenth of its norm, so that a wrong ratio shows.
                largest = np.abs(trajectory[-1][layer]).max()
                np.testing.assert_allclose(
                    x, trajectory[-1][layer], rtol=0, atol=2e-6 * largest, err_msg=layer
                )
                path, number = layer.split("/")
                found = parameter_norms[path].reshape(-1)[int(number)]
                np.testing.assert_allclose(found, np.linalg.norm(trajectory[0][layer]), rtol=2e-6)


@pytest.mark.parametrize("mode", ["jit", "shard_map", "pmap"])
def test_metrics_of_leaves_without_a_trust_ratio_agree_with_float64(mode: str) -> None:
    def step(axis_name: str | None, params: Any, g: Any) -> Any:
        tx = metrics.with_metrics(momentum(RATE), axis_name=axis_name)
        updates, state = tx.update(g, tx.init(params), params)
        return updates, metrics.read(state)

    run = _in_mode(mode, step)
    for magnitude in MAGNITUDES:
        params, g = _arrays(magnitude, 0), _arrays(magnitude, 1)
        _, values = run(params, g)
        for path in SHAPES:
            np.testing.assert_allclose(
                values[f"parameter_norm/{path}"],
                np.linalg.norm(np.float64(params[path]).ravel()),
                rtol=1e-6,
            )
            np.testing.assert_allclose(
                values[f"update_norm/{path}"],
                np.linalg.norm(RATE * np.float64(g[path]).ravel()),
                rtol=1e-6,
            )


@pytest.mark.parametrize("mode", MODES)
def test_clipping_agrees_with_float64(mode: str) -> None:
    limits = (1e-27, 1e-3)

    def clipped(axis_name: str | None, g: Any) -> Any:
        values = {}
        for limit in limits:
            tx = clip_by_global_norm(limit, axis_name)
            updates, values[str(limit)] = tx.update(g, tx.init(g))
        return updates, values

    run = _in_mode(mode, clipped)
    for magnitude in MAGNITUDES:
        g = _arrays(magnitude, 0)
        updates, values = run({path: jnp.asarray(x) for path, x in g.items()})
        size = np.linalg.norm(np.concatenate([np.float64(x).ravel() for x in g.values()]))
        for limit in limits:
            state = values[str(limit)]
            np.testing.assert_allclose(state.gradient_norm, size, rtol=1e-6)
            if limit / size > 1e-37:  # a smaller factor underflows in float32
                np.testing.assert_allclose(state.clipped_norm, min(limit, size), rtol=1e-6)
        factor = min(1, limits[1] / size)
        for path, x in g.items():
            np.testing.assert_allclose(updates[path], factor * np.float64(x), rtol=1e-6)


@pytest.mark.parametrize("how", [jax.jit, lambda function: function], ids=["jit", "eager"])
def test_norms_of_nan_infinity_and_zero(how: Callable[..., Any]) -> None:
    spec = layers.assign([("x", stacked(0))], {"x": np.zeros((5, 2))})["x"]
    x = np.float32([[np.nan, 1e30], [np.inf, 1e-30], [0, 0], [3, 4], [3e-28, 4e-28]])
    found = how(lambda x: norms.norm(x, spec))(jnp.asarray(x))
    np.testing.assert_allclose(found, np.float32([np.nan, np.inf, 0, 5, 5e-28]), rtol=1e-6)
    for bad, size in [(0, np.nan), (1, np.inf), (2, 0)]:
        found = how(lambda x: norms.global_norm({"x": x}))(jnp.asarray(x[bad]))
        np.testing.assert_equal(float(found), size)


@pytest.mark.parametrize("how", [jax.jit, lambda function: function], ids=["jit", "eager"])
def test_layers_of_ordinary_size_keep_their_bits(how: Callable[..., Any]) -> None:
    """This includes layers next to a layer or an array whose squares overflow."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 7, 96)), "float32")
    spec = layers.assign([("x", stacked(0))], {"x": x})["x"]
    plain = how(lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2))))(x)
    run = how(lambda arrays: norms.norms_of(arrays, spec)[0])
    for factor in (1.0, 0.0, 2e19):
        mixed = x.at[1].multiply(factor)
        for others in ([mixed, x], [mixed, mixed], [x, 0 * x]):
            found = run(others)
            np.testing.assert_array_equal(found[jnp.array([0, 2])], plain[jnp.array([0, 2])])


@pytest.mark.parametrize(
    ("dtype", "branches"),
    # One for each leaf and one for the global norm; float16 needs none for the global norm, and
    # clipping converts its gradients to float32.
    [("float32", 4), ("bfloat16", 4), ("float16", 3)],
)
def test_only_programs_for_cpus_branch_and_only_if_a_square_can_overflow(
    dtype: str, branches: int
) -> None:
    tx = optax.chain(clip_by_global_norm(1.0), lamb(0.1, layers=RULES))
    params = {path: jnp.ones(shape, dtype) for path, shape in SHAPES.items()}
    step = jax.jit(lambda params, state: tx.update(params, state, params))
    traced = step.trace(params, jax.eval_shape(tx.init, params))
    assert traced.lower().compile().as_text().count(" conditional(") == branches
    enlarge = f"{wide_range.ENLARGE:.8E}"
    assert enlarge in traced.lower().as_text()
    for platform in ("tpu", "cuda", "rocm"):
        assert enlarge not in traced.lower(lowering_platforms=(platform,)).as_text()


def test_a_square_of_float64_does_not_overflow() -> None:
    with jax.enable_x64(True):
        run = jax.jit(norms.norm)
        assert " conditional(" not in run.lower(jnp.ones(3)).compile().as_text()
        for magnitude in MAGNITUDES:
            np.testing.assert_allclose(run(jnp.full(4, magnitude)), 2 * magnitude, rtol=1e-15)
        mixed = {"a": jnp.full(2, 2e19, "float32"), "b": jnp.full(2, 2e19)}
        np.testing.assert_allclose(jax.jit(norms.global_norm)(mixed), 4e19, rtol=1e-7)


def test_norms_of_constants_inside_jit() -> None:
    x = jnp.full(4, 2e19)
    found = jax.jit(lambda: (norms.norm(x), norms.global_norm({"x": x})))()
    np.testing.assert_allclose(found, 4e19, rtol=1e-6)
