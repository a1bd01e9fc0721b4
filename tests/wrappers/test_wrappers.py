"""Tests the contract of the wrappers in any order, around any optimizer of the registry."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from optim_zoo import (
    accumulation,
    adamw,
    averaging,
    guards,
    lamb,
    lazy_adam,
    lookahead,
    metrics,
    precision,
    sharding,
)
from optim_zoo.rows import SparseRows
from tests import cover
from tests.test_contract import CONSTRUCTORS

pytestmark = pytest.mark.usefixtures("quick_to_compile")

Wrap = Callable[[optax.GradientTransformation], optax.GradientTransformationExtraArgs]


def _rounding(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    return precision.stochastic_rounding(tx, jax.random.key(0))


def _stored(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Stores the moments in bfloat16, where the state has any."""
    state = jax.eval_shape(tx.init, {"x": jnp.zeros(3)})
    paths = [path for path, _ in jax.tree.leaves_with_path(state)]
    names = {key.name for path in paths for key in path if hasattr(key, "name")}
    fields = {"mu", "nu", "momentum"} & names
    return precision.store_state(tx, dict.fromkeys(fields, "bfloat16"))


WRAPPERS: dict[str, Wrap] = {
    "accumulate": lambda tx: accumulation.accumulate(tx, 2),
    "accumulate-1": lambda tx: accumulation.accumulate(tx, 1),
    "skip_nonfinite": guards.skip_nonfinite,
    "skip_spikes": lambda tx: guards.skip_spikes(tx, window=2, factor=1e6),
    "average_parameters": averaging.average_parameters,
    "master_weights": precision.master_weights,
    "stochastic_rounding": _rounding,
    "store_state": _stored,
    "with_metrics": lambda tx: metrics.with_metrics(tx, every=2),
}
GUARDS = ("skip_nonfinite", "skip_spikes")
TREES = {
    # Several dtypes, empty arrays and scalars.
    "mixed": {
        "kernel": ((2, 3), "bfloat16"),
        "bias": ((3,), "float32"),
        "scale": [((), "float16"), ((0, 3), "bfloat16")],
    },
    "array": ((3,), "bfloat16"),
    "scalar": ((), "float16"),
    "wide": {"kernel": ((2, 2), "float32"), "none": None},
    "empty": {},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A stack of wrappers around an optimizer, with its parameters and gradients."""

    wrappers: tuple[str, ...]  # outermost first
    optimizer: str
    tree: str
    gradient_dtype: str | None  # None: the dtypes of the parameters

    def tx(self) -> optax.GradientTransformation:
        tx = CONSTRUCTORS[self.optimizer](0.1)
        for name in reversed(self.wrappers):
            tx = WRAPPERS[name](tx)
        return tx

    def params(self) -> Any:
        """Returns parameters; the first entry of each leaf is -0.0."""

        def parameter(leaf: tuple[tuple[int, ...], str]) -> jax.Array:
            x = np.arange(np.prod(leaf[0], dtype=int)).reshape(leaf[0])
            return jnp.asarray(np.where(x == 0, -0.0, x / 8), leaf[1])

        return jax.tree.map(parameter, TREES[self.tree], is_leaf=_is_leaf)

    def gradients(self, value: float = 0.5) -> Any:
        return jax.tree.map(
            lambda leaf: jnp.full(leaf[0], value, self.gradient_dtype or leaf[1]),
            TREES[self.tree],
            is_leaf=_is_leaf,
        )


def _is_leaf(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], str)


def cases(trees: tuple[str, ...] = tuple(TREES), most: int = 3) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        st.lists(st.sampled_from(list(WRAPPERS)), min_size=1, max_size=most).map(tuple),
        st.sampled_from(list(CONSTRUCTORS)),
        st.sampled_from(trees),
        st.sampled_from([None, "float32", "bfloat16", "float16"]),
    )


def _few_or_many(few: int, many: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a property on a few examples, and on many in a slow test."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.parametrize(
            "examples", [few, pytest.param(many, marks=pytest.mark.slow)], ids=["few", "many"]
        )
        @functools.wraps(test, assigned=("__name__", "__doc__", "__module__"), updated=())
        def run(examples: int) -> None:
            settings = hypothesis.settings(
                max_examples=examples,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(hypothesis.HealthCheck),
                # No shrinking: it would compile every smaller example, and examples are small.
                phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
            )
            settings(test)()

        del run.__wrapped__  # or pytest would use the wrapped signature
        return run

    return decorate


def _types(tree: Any) -> Any:
    """Returns the structure, shapes, dtypes and weak types; keys have no weak type."""
    leaves = jax.tree.leaves(tree)
    return jax.tree.structure(tree), [
        (x.shape, x.dtype, getattr(x, "weak_type", False)) for x in leaves
    ]


def _shapes(tree: Any) -> Any:
    return jax.tree.structure(tree), [x.shape for x in jax.tree.leaves(tree)]


def _bits(tree: Any) -> list[bytes]:
    def plain(x: jax.Array) -> Any:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return [plain(x).tobytes() for x in jax.tree.leaves(tree)]


def _pointers(tree: Any) -> list[int]:
    """Returns the addresses of all arrays that are not empty."""
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(tree)
    ]
    return [x.unsafe_buffer_pointer() for x in leaves if x.size]


def _step(tx: optax.GradientTransformation, carry: Any, gradients: Any) -> Any:
    params, state = carry
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


@_few_or_many(6, 120)
@hypothesis.given(cases())
def test_a_donated_scan_keeps_every_type(case: Case) -> None:
    """Makes two donated runs of two steps, and reads the metrics of each."""
    tx, params = case.tx(), case.params()
    carry = (params, tx.init(params))
    expected, keys = _types(carry), _types(metrics.read(carry[1]))
    assert len(set(_pointers(carry))) == len(_pointers(carry))
    updates = jax.eval_shape(tx.update, case.gradients(), carry[1], params)[0]
    assert _shapes(updates) == _shapes(params)

    @functools.partial(jax.jit, donate_argnums=0)
    def train(carry: Any, gradients: Any) -> Any:
        def body(carry: Any, _: None) -> Any:
            carry = _step(tx, carry, gradients)
            return carry, metrics.read(carry[1])

        return jax.lax.scan(body, carry, length=2)

    for _ in range(2):
        carry, read = train(carry, case.gradients())
        assert _types(carry) == expected
        assert len(set(_pointers(carry))) == len(_pointers(carry))
    assert _types(metrics.read(carry[1])) == keys
    assert set(read) == set(metrics.read(carry[1]))
    assert all(np.isfinite(np.float64(x)).all() for x in jax.tree.leaves(carry[0]))
    assert train._cache_size() == 1


def _inside_guards(state: Any) -> Any:
    """Returns the inner states of all guards in a state."""
    kinds = (guards.SkipNonfiniteState, guards.SkipSpikesState)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    return [node.inner for node in nodes if isinstance(node, kinds)]


@_few_or_many(5, 100)
@hypothesis.given(
    cases(("mixed", "array", "scalar", "wide"), most=2),
    st.sampled_from(GUARDS),
    st.integers(0, 2),
    st.sampled_from([np.nan, np.inf, -np.inf]),
)
def test_a_guard_at_any_depth_skips_nonfinite_steps(
    case: Case, guard: str, place: int, bad: float
) -> None:
    """No bit of the parameters or of the state inside the guard changes, including -0.0.

    If `accumulate` is outside the guard, it leaves the gradient out before the guard sees it.
    """
    wrappers = list(case.wrappers)
    wrappers.insert(place, guard)
    case = dataclasses.replace(case, wrappers=tuple(wrappers))
    tx, params = case.tx(), case.params()
    step = jax.jit(functools.partial(_step, tx))
    outside = wrappers[: min(map(wrappers.index, set(wrappers) & set(GUARDS)))]
    carry = (params, tx.init(params))
    for skipped in (1, 2):
        after = step(carry, case.gradients(bad))
        if not any(name.startswith("accumulate") for name in outside):
            assert _bits(after[0]) == _bits(carry[0])
            assert _bits(_inside_guards(after[1])) == _bits(_inside_guards(carry[1]))
            assert metrics.read(after[1])["skipped_steps"] == skipped
        carry = step(after, case.gradients())
        assert all(np.isfinite(np.float64(x)).all() for x in jax.tree.leaves(carry[0]))


@_few_or_many(6, 150)
@hypothesis.given(cases())
def test_every_array_of_the_state_has_a_sharding(case: Case) -> None:
    """A state is sharded like its parameter, and by ZeRO-1 if its shape can be divided."""
    tx, params = case.tx(), case.params()
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    state = jax.eval_shape(tx.init, params)
    shardings = sharding.state_shardings(tx, params, mesh=mesh, zero1="data")
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    for x, where in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert isinstance(where, jax.NamedSharding)
        where.shard_shape(x.shape)  # raises if the sharding does not fit


def _assert_initialized_on_shapes(tx: optax.GradientTransformation) -> None:
    params = {
        "kernel": jax.ShapeDtypeStruct((2, 3), "bfloat16"),
        "bias": [jax.ShapeDtypeStruct((3,), "float32")],
    }
    state, expected = tx.init(params), jax.eval_shape(tx.init, params)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(state)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(expected)
    ]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_is_initialized_on_shapes(wrapper: str) -> None:
    """A state that copies parameters holds shapes if the parameters are shapes."""
    for inner in (lamb(0.1), optax.adamw(0.1), WRAPPERS["master_weights"](lookahead(adamw(0.1)))):
        _assert_initialized_on_shapes(WRAPPERS[wrapper](inner))


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_every_optimizer_is_initialized_on_shapes_inside_all_wrappers(name: str) -> None:
    tx = CONSTRUCTORS[name](0.1)
    for wrap in WRAPPERS.values():
        tx = wrap(tx)
    _assert_initialized_on_shapes(tx)


def test_shapes_of_master_weights_keep_their_sharding() -> None:
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    sharded = jax.NamedSharding(mesh, jax.P("data"))
    params = {"x": jax.ShapeDtypeStruct((4,), "bfloat16", sharding=sharded)}
    (master,) = jax.tree.leaves(precision.master_weights(optax.sgd(0.1)).init(params))
    assert master == jax.ShapeDtypeStruct((4,), "float32", sharding=sharded)


def test_store_state_accepts_fields_that_hold_shapes() -> None:
    tx = precision.store_state(precision.master_weights(adamw(0.1)), {"master": "bfloat16"})
    params = {"x": jax.ShapeDtypeStruct((4,), "bfloat16")}
    assert tx.init(params).inner.master["x"].dtype == "bfloat16"


STACKS = {
    "float32-accumulate": ("skip_nonfinite", "accumulate-1", "with_metrics"),
    "low-precision": ("skip_spikes", "master_weights", "store_state"),
    "rounding": ("stochastic_rounding", "skip_nonfinite"),
}
stacks = pytest.mark.parametrize(
    "wrappers",
    [
        pytest.param(stack, id=name, marks=pytest.mark.slow if name == "rounding" else ())
        for name, stack in STACKS.items()
    ],
)


# Each of them compiles for several seconds.
one_stack = pytest.mark.parametrize("wrappers", cover.mostly_slow(STACKS, ["float32-accumulate"]))
low_stack = pytest.mark.parametrize("wrappers", cover.mostly_slow(STACKS, ["low-precision"]))


def _stack(wrappers: tuple[str, ...]) -> optax.GradientTransformation:
    tx: optax.GradientTransformation = lamb(0.1, weight_decay=0.1)
    for name in reversed(wrappers):
        tx = WRAPPERS[name](tx)
    return tx


@pytest.fixture
def params(rng: np.random.Generator) -> Any:
    return {
        "kernel": jnp.asarray(rng.normal(size=(4, 3)), "bfloat16"),
        "bias": jnp.asarray(rng.normal(size=4), "float32"),
    }


def _assert_close(actual: Any, expected: Any) -> None:
    """Allows one rounding of each dtype, because sums over devices add in another order."""
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        rtol = 2**-7 if x.dtype == "bfloat16" else 2e-6
        np.testing.assert_allclose(np.float64(x), np.float64(y), rtol=rtol, atol=1e-6)


@one_stack
def test_zero1_makes_the_same_steps_as_one_device(params: Any, wrappers: tuple[str, ...]) -> None:
    tx = _stack(wrappers)
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])

    def loss(params: Any, batch: Any) -> jax.Array:
        hidden = batch @ params["kernel"].astype("float32")
        return jnp.mean(hidden**2) + jnp.mean(params["bias"] ** 2)

    batch = np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4)
    step = sharding.data_parallel(loss, tx, mesh=mesh, zero1="data")
    x, state = step.init(params)
    expected = (params, tx.init(params))
    for _ in range(2):
        x, state, _ = step(x, state, batch)
        expected = jax.jit(functools.partial(_step, tx))(
            expected, jax.grad(loss)(expected[0], batch)
        )
    _assert_close(step.params(x), expected[0])
    sharded = [leaf for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
    assert len(sharded) >= 4  # two moments of two parameters


@low_stack
def test_vmap_and_pmap_make_independent_steps(params: Any, wrappers: tuple[str, ...]) -> None:
    """Trains two models under `vmap` and on two devices, one of them with a NaN."""
    tx = _stack(wrappers)
    gradients = jax.tree.map(lambda x: 0.1 * x, params)
    broken = jax.tree.map(lambda g: g * jnp.nan, gradients)
    both = jax.tree.map(lambda *x: jnp.stack(x), gradients, broken)

    def train(params: Any, gradients: Any) -> Any:
        return _step(tx, (params, tx.init(params)), gradients)

    together = jax.jit(jax.vmap(train, in_axes=(None, 0)))(params, both)
    on_devices = jax.pmap(train, in_axes=(None, 0), devices=jax.devices()[:2])(params, both)
    alone = jax.jit(train)
    for i, g in enumerate((gradients, broken)):
        expected, _ = alone(params, g)
        for result in (together, on_devices):
            if "stochastic_rounding" not in wrappers or i:  # the noise differs
                _assert_close(jax.tree.map(lambda x, i=i: x[i], result[0]), expected)
    for result in (together, on_devices):
        np.testing.assert_array_equal(metrics.read(result[1])["skipped_steps"], [0, 1])
        guards.check(result[1])
        assert _bits(jax.tree.map(lambda x: x[1], result[0])) == _bits(params)


@low_stack
def test_wrappers_work_around_and_inside_those_of_optax(
    params: Any, wrappers: tuple[str, ...]
) -> None:
    """Tests `chain`, `masked`, `partition` and `inject_hyperparams`, around and inside."""
    tx = _stack(wrappers)
    gradients = jax.tree.map(lambda x: 0.1 * x, params)
    alone = {"kernel": params["kernel"]}
    expected, _ = tx.update({"kernel": gradients["kernel"]}, tx.init(alone), alone)
    labels = {"kernel": "ours", "bias": "theirs"}
    inject = optax.inject_hyperparams(lamb, hyperparam_dtype=jnp.float32)(0.1, weight_decay=0.1)
    for name in reversed(wrappers):
        inject = WRAPPERS[name](inject) if name != "store_state" else inject
    around = {
        "chain": optax.chain(optax.identity(), tx),
        "masked": optax.masked(tx, {"kernel": True, "bias": False}),
        "partition": optax.partition({"ours": tx, "theirs": optax.sgd(1.0)}, labels),
        "inject_hyperparams": optax.inject_hyperparams(lambda rate: _stack(wrappers))(rate=0.1),
        "inside": inject,
    }
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    for name, wrapped in around.items():
        state = wrapped.init(params)
        updates, after = jax.eval_shape(wrapped.update, gradients, state, params)
        assert _types(after) == _types(state), name
        assert _shapes(updates) == _shapes(params), name
        # The noise of stochastic rounding depends on the whole tree.
        if name in ("masked", "partition") and "stochastic_rounding" not in wrappers:
            updates, _ = wrapped.update(gradients, state, params)
            _assert_close(updates["kernel"], expected["kernel"])
        where = sharding.state_shardings(wrapped, params, mesh=mesh, zero1="data")
        assert jax.tree.structure(where) == jax.tree.structure(state), name


@pytest.mark.parametrize("name", WRAPPERS)
def test_sparse_rows_are_accepted_or_refused_by_name(name: str) -> None:
    params = {"embed": jnp.ones((5, 2)), "bias": jnp.ones(3)}
    rows = SparseRows(jnp.array([1, 3]), jnp.ones((2, 2)), 5)
    gradients = {"embed": rows, "bias": jnp.ones(3)}
    tx = WRAPPERS[name](lazy_adam(0.1))
    state = tx.init(params)
    if name.startswith("accumulate") or name in ("master_weights", "stochastic_rounding"):
        with pytest.raises(TypeError, match=r"takes no SparseRows, .* use lazy_adam for it"):
            tx.update(gradients, state, params)
        # As the message advises:
        parts = {"table": lazy_adam(0.1), "rest": WRAPPERS[name](adamw(0.1))}
        tx = optax.partition(parts, {"embed": "table", "bias": "rest"})
        state = tx.init(params)
    updates, after = jax.jit(tx.update)(gradients, state, params)
    assert _types(after) == _types(state)
    touched = np.asarray(updates["embed"].to_dense()).any(axis=1)
    np.testing.assert_array_equal(touched, [False, True, False, True, False])


@pytest.mark.parametrize("name", WRAPPERS)
def test_applying_a_wrapper_twice_equals_applying_it_once(name: str, params: Any) -> None:
    """Nested accumulation needs four micro-batches; nested rounding draws other noise."""
    once, twice = WRAPPERS[name](adamw(0.1)), WRAPPERS[name](WRAPPERS[name](adamw(0.1)))
    gradients = jax.tree.map(lambda x: 0.1 * x, params)
    results = []
    for tx, steps in ((once, 2), (twice, 4 if name == "accumulate" else 2)):
        carry, step = (params, tx.init(params)), jax.jit(functools.partial(_step, tx))
        for _ in range(steps):
            carry = step(carry, gradients)
        results.append((carry[0], metrics.read(carry[1])))
    (x, read), (y, again) = results
    assert set(read) == set(again)
    if name != "stochastic_rounding":
        _assert_close(x, y)


@pytest.mark.parametrize("name", WRAPPERS)
def test_state_keeps_its_types_with_float64(name: str) -> None:
    """The state keeps its types for any mix of float64 with narrower dtypes."""
    with jax.enable_x64(True):
        for dtype, gradient_dtype in [("float64", "float64"), ("float32", "float64"),
                                      ("float64", "float32"), ("bfloat16", "float64")]:  # fmt: skip
            params = {"x": jnp.ones(3, dtype)}
            tx = WRAPPERS[name](adamw(0.1))
            state = tx.init(params)
            gradients = {"x": jnp.ones(3, gradient_dtype)}
            updates, after = jax.eval_shape(tx.update, gradients, state, params)
            assert _types(after) == _types(state)
            moved = jax.eval_shape(optax.apply_updates, params, updates)
            assert moved["x"].dtype == dtype
