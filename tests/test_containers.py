"""Tests that every optimizer gives the same numbers in whatever containers arrays are stored.

Each optimizer runs on plain dicts and on other containers that hold the same arrays under the same
paths: outside ``jit`` on one device, where leaves are updated one after another, and under a mesh
of eight devices.
"""

import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optim_zoo
from optim_zoo import lamb, lars, sharding, split, stacked, transforms, tree
from tests.test_contract import CONSTRUCTORS, Make, _parameters

Arrays = Mapping[str, Any]  # field name -> array or nested mapping

SHAPES = {
    "attention": {"key": (8, 4), "query": (8, 4), "value": (8, 4)},
    "bias": (8,),
    "value": (8, 3),
}
# Rules match by path alone: if a container changed a path, the numbers would change.
OPTIONS = {
    "weight_decay": 0.1,
    "exclude_from_weight_decay": ["^attention/value$", "^bias$"],
    "exclude_from_layer_adaptation": ["^bias$"],
    "layers": [("^attention/", stacked(0)), ("^value$", split(0, 2))],
    "momentum": 0.9,
    "sync_period": 2,
    "trust_coefficient": 0.1,
}


class AttentionTuple(NamedTuple):
    query: Any  # not in alphabetical order, unlike a flattened dict
    key: Any
    value: Any


class ModelTuple(NamedTuple):
    value: Any
    attention: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class AttentionDataclass:
    query: Any
    key: Any
    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class ModelDataclass:
    value: Any
    attention: Any
    bias: Any


@flax.struct.dataclass
class AttentionStruct:
    query: Any
    key: Any
    value: Any


@flax.struct.dataclass
class ModelStruct:
    value: Any
    attention: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionModule:
    """A module like those of Equinox: a registered dataclass with a static field and a method."""

    query: Any
    key: Any
    value: Any
    heads: int = dataclasses.field(default=2, metadata={"static": True})

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.query


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelModule:
    value: Any
    attention: AttentionModule
    bias: Any


def _fields(inner: Callable[..., Any], outer: Callable[..., Any]) -> Callable[[Arrays], Any]:
    return lambda arrays: outer(**{**arrays, "attention": inner(**arrays["attention"])})


def _in_order(arrays: Arrays) -> Any:
    """Returns an ``OrderedDict`` that is not in alphabetical order."""
    items = [(k, _in_order(x) if isinstance(x, dict) else x) for k, x in arrays.items()]
    return OrderedDict(reversed(items))


def _default(arrays: Arrays) -> Any:
    return defaultdict(list, {k: _default(x) if isinstance(x, dict) else x
                              for k, x in arrays.items()})  # fmt: skip


def _boxed(box: Callable[[Any, tuple[str | None, ...]], Any]) -> Callable[[Arrays], Any]:
    return lambda arrays: jax.tree.map(lambda x: box(x, ("data",) + (None,) * (x.ndim - 1)), arrays)


def _nnx_state(arrays: Arrays) -> Any:
    return nnx.State(jax.tree.map(nnx.Param, dict(arrays)))


CONTAINERS: dict[str, Callable[[Arrays], Any]] = {
    "NamedTuple": _fields(AttentionTuple, ModelTuple),
    "dataclass": _fields(AttentionDataclass, ModelDataclass),
    "flax.struct": _fields(AttentionStruct, ModelStruct),
    "module": _fields(AttentionModule, ModelModule),
    "OrderedDict": _in_order,
    "defaultdict": _default,
    "FrozenDict": lambda arrays: freeze(dict(arrays)),
    "nnx.State": _nnx_state,
    "nn.Partitioned": _boxed(lambda x, names: nn.Partitioned(x, names=names)),
    "nn.LogicallyPartitioned": _boxed(
        lambda x, names: nn.LogicallyPartitioned(x, names=names, rules=(("data", "data"),))
    ),
    "mixed": _fields(AttentionTuple, lambda **fields: OrderedDict(reversed(fields.items()))),
}
pytestmark = pytest.mark.usefixtures("quick_to_compile")
every_container = pytest.mark.parametrize("wrap", CONTAINERS.values(), ids=CONTAINERS)
every_optimizer = pytest.mark.parametrize("make", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
STEPS = 2  # Lookahead synchronizes after the second


def _arrays(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), "float32"),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def _optimizer(make: Make) -> optax.GradientTransformation:
    known = _parameters(make)
    return make(0.1, **{name: value for name, value in OPTIONS.items() if name in known})


def _by_path(x: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in tree.leaves_with_path(x)}


def _run(
    tx: optax.GradientTransformation,
    wrap: Callable[[Arrays], Any],
    place: Callable[[Any], Any] = lambda x: x,
) -> Iterator[tuple[Any, Any, Any]]:
    """Yields (parameters, state, updates) after ``init``, with None as updates, and each step."""
    params = place(wrap(_arrays(0)))
    state = tx.init(params)
    yield params, state, None
    for step in range(STEPS):
        updates, state = tx.update(place(wrap(_arrays(1 + step))), state, params)
        params = optax.apply_updates(params, updates)
        yield params, state, updates


@pytest.fixture(scope="module")
def plain() -> Callable[[Make], list[Any]]:
    """Returns a cached function that runs an optimizer on plain dicts."""
    runs: dict[Make, list[Any]] = {}

    def run(make: Make) -> list[Any]:
        if make not in runs:
            runs[make] = list(_run(_optimizer(make), dict))
        return runs[make]

    return run


@every_container
def test_paths_are_the_same_in_every_container(wrap: Callable[[Arrays], Any]) -> None:
    assert sorted(tree.leaf_paths(wrap(_arrays(0)))) == tree.leaf_paths(_arrays(0))


@pytest.mark.diagonal
@every_container
@every_optimizer
def test_containers_give_the_same_numbers_on_one_device(
    make: Make, wrap: Callable[[Arrays], Any], plain: Callable[[Make], list[Any]]
) -> None:
    """The results are bit-identical, because XLA fuses nothing outside of ``jit``."""
    tx = _optimizer(make)
    run = list(_run(tx, wrap))
    for (params, state, updates), expected in zip(run, plain(make), strict=True):
        _assert_same(params, expected[0])
        _assert_same(state, expected[1])
        # Containers do not change from ``init`` on.
        assert jax.tree.structure(params) == jax.tree.structure(run[0][0])
        assert jax.tree.structure(state) == jax.tree.structure(run[0][1])
        if updates is not None:
            _assert_same(updates, expected[2])
            assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert _like_params(tx, run[0][1]) == _like_params(_optimizer(make), plain(make)[0][1])


@every_optimizer
def test_numbers_and_numpy_arrays_are_treated_as_arrays(make: Make) -> None:
    """Parameters and gradients may also be Python floats, which ``jax.grad`` never returns."""

    def run(numbers: Any) -> Any:
        tx = make(0.1)
        state = tx.init(numbers)
        structure = jax.tree.map(jnp.result_type, state)
        for _ in range(2):
            updates, state = tx.update(jax.tree.map(lambda x: x / 4, numbers), state, numbers)
            numbers = optim_zoo.apply_updates(numbers, updates)
            assert jax.tree.map(jnp.result_type, state) == structure
        return numbers, state

    numbers = {"float": 1.5, "scalar": np.float64(0.5), "array": np.float32([1, 2])}
    arrays = jax.tree.map(lambda x: jnp.asarray(x, "float32"), numbers)
    jax.tree.map(np.testing.assert_array_equal, run(numbers), run(arrays))


def _like_params(tx: optax.GradientTransformation, state: Any) -> dict[str, int]:
    """Returns 1 for each array of the state that optax treats like a parameter, else 0."""
    like = optax.tree.map_params(tx, lambda _: 1, state, transform_non_params=lambda _: 0)
    return dict(tree.leaves_with_path(like))


@pytest.mark.slow
@every_container
@every_optimizer
def test_containers_give_the_same_numbers_under_a_mesh_of_eight_devices(
    make: Make, wrap: Callable[[Arrays], Any], plain: Callable[[Make], list[Any]]
) -> None:
    mesh = Mesh(jax.devices(), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))

    def place(x: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.device_put(leaf, rows), x)

    tx = _optimizer(make)
    with jax.set_mesh(mesh):
        placed = sharding.init(tx, place(wrap(_arrays(0))), mesh=mesh)
        runs = list(_run(tx, wrap, place))
    assert jax.tree.structure(placed) == jax.tree.structure(runs[0][1])
    for (params, state, _), expected in zip(runs, plain(make), strict=True):
        # Sums of squares over devices are added in another order: a few roundings of 6e-8.
        _assert_same(params, expected[0], rtol=2e-6)
        _assert_same(state, expected[1], rtol=2e-6)


def _assert_same(actual: Any, expected: Any, rtol: float = 0.0) -> None:
    actual, expected = _by_path(actual), _by_path(expected)
    assert actual.keys() == expected.keys()
    for path, x in expected.items():
        assert actual[path].dtype == x.dtype
        np.testing.assert_allclose(actual[path], x, rtol, atol=rtol, err_msg=path)


def test_lamb_and_lars_accept_partitioned_parameters() -> None:
    """A linen model with ``nn.with_partitioning`` returns boxed parameters."""
    kernel_init = nn.with_partitioning(nn.initializers.ones, (None, "m"))
    model = nn.Dense(2, kernel_init=kernel_init)
    variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
    params = variables["params"]
    gradients = jax.tree.map(jnp.ones_like, params)
    for make in (lamb, lars):
        tx = make(0.1)
        state = tx.init(params)
        updates, after = tx.update(gradients, state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        expected, _ = tx.update(nn.unbox(gradients), tx.init(nn.unbox(params)), nn.unbox(params))
        jax.tree.map(np.testing.assert_array_equal, nn.unbox(updates), expected)


def test_a_field_named_value_is_part_of_the_path() -> None:
    params = {"attn": AttentionTuple(*(jnp.ones((2, 3)) for _ in range(3)))}
    gradients = jax.tree.map(lambda x: x / 7, params)
    rule = {"exclude_from_weight_decay": ["^attn/"], "layers": [("^attn/", stacked(0))]}
    tx = lamb(0.1, weight_decay=10.0, **rule)
    updates, state = tx.update(gradients, tx.init(params), params)
    (ratio,) = [piece for piece in state if isinstance(piece, transforms.ScaleByTrustRatioState)]
    assert {path: x.shape for path, x in ratio.trust_ratio.items()} == {
        "attn/query": (2,),
        "attn/key": (2,),
        "attn/value": (2,),
    }
    # The pattern excludes every leaf, so that the numbers are those without weight decay.
    undecayed = lamb(0.1, layers=rule["layers"])
    expected, _ = undecayed.update(gradients, undecayed.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
