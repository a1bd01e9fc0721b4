"""Tests the contract that every optimizer of the registry keeps, whatever its formula."""

import functools
import inspect
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optim_zoo import adam, registry, rules, scale_by_adam, schedules, stacked, transforms
from tests import cover, pieces, quick

pytestmark = pytest.mark.usefixtures("quick_to_compile")
SLOW = pytest.mark.slow
newest = pytest.mark.newest  # the tests that depend most on JAX, optax, Flax and Orbax

Make = Callable[..., optax.GradientTransformation]  # takes at least a learning rate

# Values for the optional arguments of all optimizers, chosen to reach every branch of their code.
OPTIONS = {
    "weight_decay": 0.01,
    "exclude_from_weight_decay": ["bias"],
    "exclude_from_layer_adaptation": ["bias", "norm"],
    "layers": [("stack", stacked(0))],
    "phi_bounds": (0.01, 10.0),
    "ratio_bounds": (0.01, 10.0),
    "momentum": 0.9,
    "nesterov": True,
    "centered": True,
    "trust_coefficient": 0.1,
    "gradient_centralization": True,
    "sync_period": 2,
}


def _by_learning_rate(entry: registry.Entry) -> Make:
    """Returns the constructor; a wrapper is applied to Adam first."""
    if not entry.wraps:
        return entry.constructor
    parameters = inspect.signature(entry.constructor).parameters
    if "learning_rate" in parameters:
        return functools.partial(entry.constructor, scale_by_adam())

    def around_adam(learning_rate: Any, **options: Any) -> optax.GradientTransformation:
        return entry.constructor(adam(learning_rate), **options)

    own = [inspect.Parameter("learning_rate", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    around_adam.__signature__ = inspect.Signature([*own, *list(parameters.values())[1:]])  # type: ignore[attr-defined]
    return around_adam


def _parameters(constructor: Make) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(constructor).parameters)


def _with_options(constructor: Make) -> Make:
    names = set(_parameters(constructor))
    if "momentum" not in names:
        names -= {"nesterov"}  # Adam with Nesterov momentum is Nadam, which the registry has too.
    return functools.partial(constructor, **{k: v for k, v in OPTIONS.items() if k in names})


CONSTRUCTORS = {name: _by_learning_rate(entry) for name, entry in registry.OPTIMIZERS.items()}
PLAIN: dict[str, Make] = dict(CONSTRUCTORS)
FULL: dict[str, Make] = {f"{name}-full": _with_options(f) for name, f in CONSTRUCTORS.items()}
WITH_OPTIONS = {k: f for k, f in FULL.items() if f.keywords}  # type: ignore[attr-defined]
every = pytest.mark.parametrize(
    "make",
    [
        *FULL.values(),
        # The options reach every branch of the code, so that most tests can skip the defaults.
        *(pytest.param(f, marks=pytest.mark.slow) for k, f in PLAIN.items()
          if f"{k}-full" in WITH_OPTIONS),
    ],
    ids=[*FULL, *(k for k in PLAIN if f"{k}-full" in WITH_OPTIONS)],
)  # fmt: skip
plain = pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
full = pytest.mark.parametrize("make", FULL.values(), ids=FULL)
# Whether a state fits into Flax depends on its kind: none, one moment, two, a wrapper's, and the
# layerwise norms, which the registry has with and without a schedule for each leaf.
KINDS = ("sgd-full", "adagrad-full", "lamb-full", "lars-full", "lookahead-full")
each_kind = pytest.mark.parametrize("make", cover.mostly_slow(FULL, KINDS))

DTYPES = [  # (parameters, gradients)
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("bfloat16", "float32"),
    ("float32", "bfloat16"),
]
DTYPES_OF_ONE_TEST = [DTYPES[2], DTYPES[4]]  # other tests compile no step for them


def _params(dtype: str = "float32") -> Any:
    rng = np.random.default_rng(0)
    shapes = {"stack": (2, 4, 3), "dense": {"kernel": (3, 2), "bias": (2,)}, "norm": {"scale": ()}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def _grads(dtype: str = "float32", seed: int = 1) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype), _params())


NARROW = ("bfloat16", "float16", "float32")
EVERY_PAIR = list(itertools.product(NARROW, repeat=2))  # (parameters, gradients)
# Arguments that change the fields of a piece's state, or its arithmetic.
VARIANTS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "chain_leaf_by_leaf": lambda: transforms.chain_leaf_by_leaf(
        scale_by_adam(), transforms.scale_by_trust_ratio()
    ),
    "scale_by_learning_rate-schedule": lambda: transforms.scale_by_learning_rate(
        schedules.constant(0.1), last=False
    ),
    "scale_by_rms-centered": lambda: transforms.scale_by_rms(centered=True, eps_in_sqrt=False),
    "trace_momentum-nesterov": lambda: transforms.trace_momentum(nesterov=True),
    "trace_momentum-dampening": lambda: transforms.trace_momentum(dampening=0.1),
    "trace_momentum-ema": lambda: transforms.trace_momentum(ema=True),
}
ALL_PIECES = {name: functools.partial(pieces.make, name) for name in pieces.PIECES} | VARIANTS


def _types(tree: Any) -> Any:
    """Returns structure, shapes, dtypes and weak types."""
    avals = jax.tree.map(lambda x: (jnp.shape(x), x.dtype, x.weak_type), tree)
    return jax.tree.structure(tree), jax.tree.leaves(avals, is_leaf=lambda x: isinstance(x, tuple))


def _step(tx: optax.GradientTransformation, params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@functools.cache
def _compiled(make: Make, rate: Any = 0.1) -> tuple[optax.GradientTransformation, Any]:
    """Returns the optimizer and its step: (params, state, grads) -> (params, state), updates.

    All tests share the step, which is compiled once for each combination of types.
    """
    tx = make(rate)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), updates

    return tx, quick.jit(step)


def _eagerly(tx: optax.GradientTransformation) -> Callable[..., Any]:
    """Returns the same step as `_compiled`, run one operation at a time.

    All optimizers share the compiled operations. With ``disable_jit`` a ``cond`` is not compiled
    anew in every call.
    """

    def step(params: Any, state: Any, grads: Any) -> Any:
        with jax.disable_jit():
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), updates

    return step


def _assert_equal(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def _assert_close(actual: Any, expected: Any, rtol: float = 2e-6, atol: float = 2e-7) -> None:
    """Compares within a few float32 roundings, because compiled code fuses products and sums."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), actual, expected)


# Types.


@pytest.mark.diagonal
@newest
@full
@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
def test_updates_match_the_parameters_and_state_keeps_its_types(
    make: Make, dtypes: tuple[str, str]
) -> None:
    params, grads = _params(dtypes[0]), _grads(dtypes[1])
    tx, step = _compiled(make)
    if dtypes in DTYPES_OF_ONE_TEST:  # the next test covers the types of compiled steps
        step = _eagerly(tx)
    state = tx.init(params)
    expected = _types(state)
    for _ in range(2):
        (params, state), updates = step(params, state, grads)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        for u, x in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            assert (u.shape, u.dtype) == (x.shape, x.dtype)
            assert np.isfinite(u).all()
        assert _types(state) == expected
        assert all(x.dtype == dtypes[0] for x in jax.tree.leaves(params))


def _mixed() -> tuple[Any, Any]:
    """Returns parameters and gradients with every pair of dtypes, in one tree."""
    pairs = {"-".join(pair): pair for pair in EVERY_PAIR}
    params = {name: _params(pair[0]) for name, pair in pairs.items()}
    return params, {name: _grads(pair[1]) for name, pair in pairs.items()}


def _check_types_stay(tx: optax.GradientTransformation, params: Any, grads: Any) -> Any:
    """Checks the types of a traced update and returns the shapes and dtypes of the updates."""
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, grads, state, params)
    assert _types(after) == _types(state)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    return updates


@full
def test_types_stay_in_any_mix_of_dtypes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tx = make(0.1)
    mixes = [(_params(x), _grads(g)) for x, g in EVERY_PAIR] + [_mixed()]
    for params, grads in mixes:
        updates = _check_types_stay(tx, params, grads)
        assert [u.dtype for u in jax.tree.leaves(updates)] == [
            x.dtype for x in jax.tree.leaves(params)
        ]
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # LAMB then runs leaf by leaf
    _check_types_stay(tx, *_mixed())


@pytest.mark.parametrize("piece", ALL_PIECES.values(), ids=ALL_PIECES)
def test_a_piece_keeps_its_types_in_any_mix_of_dtypes(
    piece: Callable[[], optax.GradientTransformation], monkeypatch: pytest.MonkeyPatch
) -> None:
    tx = piece()
    for x, g in EVERY_PAIR:
        updates = _check_types_stay(tx, _params(x), _grads(g))
        # A piece that changes nothing keeps the dtype of the gradients. Others use the dtype of the
        # parameters or of their arithmetic, and never a third one.
        assert {u.dtype.name for u in jax.tree.leaves(updates)} <= {x, g, "float32"}
    _check_types_stay(tx, *_mixed())
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    _check_types_stay(tx, *_mixed())


WITH_EPS = {  # a wrapper uses the eps of its inner optimizer, 1e-8
    name: make
    for name, make in CONSTRUCTORS.items()
    if "eps" in _parameters(make) or registry.OPTIMIZERS[name].wraps
}


@pytest.mark.diagonal
@pytest.mark.parametrize("make", WITH_EPS.values(), ids=WITH_EPS)
@pytest.mark.parametrize("eps", [1e-8, None], ids=["1e-8", "default"])
def test_eps_does_not_vanish_in_float16(make: Make, eps: float | None) -> None:
    """Compares the steps with float32 steps; in float16 arithmetic they would be 0 / 0.

    Float16 rounds 1e-8 and the squares of gradients below 1.7e-4 to 0. The steps may differ by the
    final rounding to float16: 2^-11 of the step, or 2^-25 for subnormal numbers.
    """
    # AdaGrad's initial accumulator would hide squares that are rounded to 0.
    options = {"initial_accumulator_value": 0.0} | ({} if eps is None else {"eps": eps})
    tx = make(0.1, **{k: v for k, v in options.items() if k in _parameters(make)})
    shapes = {"kernel": (2, 3), "bias": (3,)}
    rng = np.random.default_rng(0)
    narrow = {k: jnp.asarray(rng.normal(size=shape), "float16") for k, shape in shapes.items()}
    params = jax.tree.map(lambda x: x.astype("float32"), narrow)
    states = (tx.init(narrow), tx.init(params))
    _assert_equal(*states)
    for size in (0.0, 1e-7, 1e-7, 0.0):
        grads = {k: jnp.full(shape, size, "float16") for k, shape in shapes.items()}
        widened = jax.tree.map(lambda g: g.astype("float32"), grads)
        assert all((g > 0).all() for g in jax.tree.leaves(grads)) or size == 0.0
        with jax.disable_jit():
            updates, low = tx.update(grads, states[0], narrow)
            expected, high = tx.update(widened, states[1], params)
        for u, e in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
            assert u.dtype == "float16"
            assert np.isfinite(u).all()
            np.testing.assert_allclose(np.float64(u), np.float64(e), 2**-11, 2**-25)
        _assert_equal(low, high)
        states = (low, high)


@pytest.mark.diagonal
@newest
@full
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[3]], ids="-".join)
def test_a_scan_makes_the_same_steps_as_a_loop(make: Make, dtypes: tuple[str, str]) -> None:
    params, grads = _params(dtypes[0]), _grads(dtypes[1])
    tx, step = _compiled(make)

    @quick.jit
    def train(params: Any) -> Any:
        def body(carry: Any, _: None) -> tuple[Any, None]:
            return _step(tx, *carry, grads), None

        return jax.lax.scan(body, (params, tx.init(params)), length=3)[0]

    scanned = train(params)
    looped = (params, tx.init(params))
    for _ in range(3):
        looped, _ = step(*looped, grads)
    rtol = {"float32": 2e-6, "bfloat16": 2**-7}[dtypes[0]]  # bfloat16: one rounding
    _assert_close(scanned[0], looped[0], rtol, rtol / 10)
    assert _types(scanned[1]) == _types(looped[1])


@newest
@full
def test_float64_stays_float64(make: Make) -> None:
    with jax.enable_x64(True):
        tx = make(0.1)
        params, grads = _params("float64"), _grads("float64")
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, grads, state, params)
        assert _types(after) == _types(state)
        assert all(u.dtype == "float64" for u in jax.tree.leaves(updates))
        params, grads = _params(), _grads()
        low, _ = jax.eval_shape(tx.update, grads, jax.eval_shape(tx.init, params), params)
        assert all(u.dtype == "float32" for u in jax.tree.leaves(low))


# Compiled.


@newest
@full
def test_update_is_traced_once(make: Make) -> None:
    tx = make(schedules.warmup_cosine(0.1, 2, 10))
    traces = []

    @quick.jit
    def step(params: Any, state: Any, grads: Any) -> Any:
        traces.append(1)
        return _step(tx, params, state, grads)

    params = _params()
    state = tx.init(params)
    for seed in range(3):
        params, state = step(params, state, _grads(seed=seed))
    assert len(traces) == step._cache_size() == 1


@newest
@full
def test_compiled_equals_eager(make: Make) -> None:
    """Compiles with the default options, as users do."""
    tx = make(0.1)
    compiled_step = jax.jit(functools.partial(_step, tx))
    eager = compiled = (_params(), tx.init(_params()))
    for seed in range(4):
        eager, _ = _eagerly(tx)(*eager, _grads(seed=seed))
        compiled = compiled_step(*compiled, _grads(seed=seed))
        assert _types(eager[1]) == _types(compiled[1])
    # Ratios of norms add a few roundings to the default tolerance.
    _assert_close(compiled, eager, rtol=5e-6, atol=5e-7)


@pytest.mark.diagonal
@full
@pytest.mark.parametrize("compiled", [False, True])
def test_a_number_equals_a_constant_schedule(make: Make, compiled: bool) -> None:
    """The results are bit-identical."""
    results = []
    for rate in (0.1, schedules.constant(0.1)):
        tx, step = _compiled(make, rate)
        step = step if compiled else _eagerly(tx)
        carry = (_params(), tx.init(_params()))
        for seed in range(2):
            carry, _ = step(*carry, _grads(seed=seed))
        results.append(carry)
    _assert_equal(*results)


@every
def test_a_schedule_is_first_called_with_step_0(make: Make) -> None:
    """Uses a learning rate that is 0 at step 0 only: the first step must change nothing."""
    tx = make(lambda step: jnp.where(step == 0, 0.0, 0.1))
    carry = (_params(), tx.init(_params()))
    carry, _ = _eagerly(tx)(*carry, _grads())
    _assert_equal(carry[0], _params())
    (moved, _), _ = _eagerly(tx)(*carry, _grads())
    for x, y in zip(jax.tree.leaves(moved), jax.tree.leaves(_params()), strict=True):
        assert (x != y).any()


@pytest.mark.diagonal
@newest
@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_and_state_can_be_donated_right_after_init(make: Make, dtype: str) -> None:
    """No two arrays of the parameters and the state share a buffer.

    A learning rate passed as an array is copied: donating the state must not delete it.
    """
    rate = jnp.asarray(0.1)
    tx = make(rate if dtype == "float32" else 0.1)
    params = _params(dtype)
    carry = (params, tx.init(params))
    step = quick.jit(functools.partial(_step, tx), donate_argnums=(0, 1))
    for _ in range(3):
        pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(carry)]
        assert len(set(pointers)) == len(pointers)
        carry = step(*carry, _grads(dtype))
    assert all(x.is_deleted() for x in jax.tree.leaves(params))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(carry))
    assert rate == np.float32(0.1)


# Hyperparameters.


def _numeric(constructor: Make) -> dict[str, float]:
    """Returns the numeric hyperparameters with their defaults, and a learning rate."""
    values = {"learning_rate": 0.1}
    for name, parameter in _parameters(constructor).items():
        if isinstance(parameter.default, float):
            values[name] = parameter.default
    return values


HYPERPARAMETERS = [
    pytest.param(constructor, name, value, id=f"{optimizer}-{name}")
    for optimizer, constructor in CONSTRUCTORS.items()
    for name, value in _numeric(constructor).items()
]


@functools.cache
def _injected(make: Make) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns compiled ``init`` and ``update`` with injected hyperparameters, for all tests."""
    injected = optax.inject_hyperparams(make)(**_numeric(make))
    return quick.jit(injected.init), quick.jit(injected.update)


@newest
@plain
def test_injected_hyperparameters_give_the_same_steps(make: Make) -> None:
    values = _numeric(make)
    init, update = _injected(make)
    tx = make(**values)
    ours = (_params(), tx.init(_params()))
    params, state = _params(), init(_params())
    assert set(state.hyperparams) >= set(values)
    expected_types = _types(state)
    for seed in range(3):
        with jax.disable_jit():  # a `cond` is compiled anew for every call outside jit
            ours = _step(tx, *ours, _grads(seed=seed))
        updates, state = update(_grads(seed=seed), state, params)
        params = optax.apply_updates(params, updates)
        assert _types(state) == expected_types
    assert update._cache_size() == 1
    # 1 - 0.999 from a float32 array is off by 3e-5, and by half of that after a square root.
    _assert_close(params, ours[0], rtol=5e-5, atol=5e-6)


@plain
def test_an_injected_rate_can_be_changed(make: Make) -> None:
    init, update = _injected(make)
    state = init(_params())
    state.hyperparams["learning_rate"] = jnp.zeros_like(state.hyperparams["learning_rate"])
    updates, _ = update(_grads(), state, _params())
    assert not any(np.asarray(u).any() for u in jax.tree.leaves(updates))


def _some_of_each(hyperparameters: list[Any]) -> list[Any]:
    """Marks all slow but the last of each optimizer and the first of each name."""
    last = {case.values[0]: case.id for case in hyperparameters}
    first = {case.values[1]: case.id for case in reversed(hyperparameters)}
    quick_ids = {*last.values(), *first.values()}
    return [
        case if case.id in quick_ids else pytest.param(*case.values, id=case.id, marks=SLOW)
        for case in hyperparameters
    ]


@pytest.mark.parametrize(("constructor", "name", "value"), _some_of_each(HYPERPARAMETERS))
def test_vmap_over_a_hyperparameter_equals_separate_runs(
    constructor: Make, name: str, value: float
) -> None:
    # A default of 0 may take another branch than other values.
    values = np.float32([value, 0.85 * value or 0.1, 0.9 * value or 0.05])
    options = {k: 2 for k in _parameters(constructor) if k == "sync_period"}
    params = _params()["dense"]  # two leaves are enough, because no option here names a path

    def moved(value: Any) -> Any:
        tx = constructor(**{"learning_rate": 0.1, name: value, **options})
        # Before step 5, RAdam depends on b1 alone. Lookahead synchronizes within these steps.
        state = jax.tree.map(lambda x: x + 5 if x.dtype == "int32" else x, tx.init(params))
        carry = (params, state)
        for seed in range(2):
            carry = _step(tx, *carry, _grads(seed=seed)["dense"])
        return carry[0]

    together = quick.jit(jax.vmap(moved))(values)
    for i, value in enumerate(values):
        with jax.disable_jit():  # a `cond` is compiled anew for every call outside jit
            alone = moved(value)
        # As above: 1 - 0.999 from a float32 array is off by 3e-5.
        _assert_close(jax.tree.map(lambda x, i=i: x[i], together), alone, 5e-5, 5e-6)


@pytest.mark.parametrize(("constructor", "name", "value"), HYPERPARAMETERS)
@pytest.mark.parametrize("wrong", [-1.0, float("nan")])
def test_hyperparameters_out_of_range_raise(
    constructor: Make, name: str, value: float, wrong: float
) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be "):
        constructor(**{"learning_rate": 0.1, name: wrong})
    with pytest.raises(TypeError, match=f"^{name} must be a number"):
        constructor(**{"learning_rate": 0.1, name: "0.1"})


# Trees.


ODD = {
    "empty": {},
    "empty tuple": (),
    "no leaf": {"stack": None, "dense": {}},
    "none": {
        "stack": jnp.ones((2, 3)),
        "bias": [None, jnp.ones(2)],
        "norm": jnp.ones(2),
        "no": None,
    },
    "no entries": {"stack": jnp.ones((2, 0)), "bias": jnp.ones(0), "norm": jnp.ones((0, 3))},
    "one entry": {"stack": jnp.ones((1, 1)), "bias": jnp.asarray(2.0), "norm": jnp.asarray([3.0])},
}


@full
def test_empty_trees_and_none_are_accepted(make: Make) -> None:
    """Updates each tree separately, in one compiled program."""
    tx = make(0.1)
    states = {name: tx.init(params) for name, params in ODD.items()}

    @quick.jit
    def step(states: Any) -> Any:
        grads = jax.tree.map(lambda x: 0.5 * x, ODD)
        return {name: tx.update(grads[name], states[name], ODD[name]) for name in ODD}

    for name, (updates, after) in step(states).items():
        assert _types(after) == _types(states[name]), name
        assert jax.tree.structure(updates) == jax.tree.structure(ODD[name]), name
        assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates)), name


@full
@pytest.mark.parametrize(
    "wrap", [freeze, lambda tree: tuple(tree.values())], ids=["frozen", "tuple"]
)
def test_updates_keep_the_container_of_the_parameters(
    make: Make, wrap: Callable[[Any], Any]
) -> None:
    tx = _without_path_options(make)(0.1)
    params, grads = wrap(_params()), wrap(_grads())
    state = tx.init(params)
    updates, after = jax.eval_shape(tx.update, grads, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert _types(after) == _types(state)


def _without_path_options(make: Make) -> Make:
    """Returns the constructor with only the options that do not name paths."""
    if not isinstance(make, functools.partial):
        return make
    kept = {k: v for k, v in make.keywords.items() if not isinstance(v, list)}
    return functools.partial(make.func, *make.args, **kept)


@full
def test_a_bare_array_is_a_tree(make: Make) -> None:
    tx = _without_path_options(make)(0.1)
    updates, _ = tx.update(jnp.ones(3), tx.init(jnp.ones(3)), jnp.ones(3))
    assert updates.shape == (3,)


@newest
@full
def test_masked_and_partition_update_their_part_alone(make: Make) -> None:
    """Each part is updated like a whole tree; a pattern may match only in another part."""
    params, grads = _params(), _grads()
    labels = {"stack": "ours", "dense": {"kernel": "ours", "bias": "sgd"}, "norm": {"scale": "sgd"}}
    part = {"stack": params["stack"], "dense": {"kernel": params["dense"]["kernel"]}}
    part_grads = {"stack": grads["stack"], "dense": {"kernel": grads["dense"]["kernel"]}}
    alone_options = {
        k: [v for v in value if (v if isinstance(v, str) else v[0]) in ("stack", "kernel")]
        if isinstance(value, list) else value
        for k, value in getattr(make, "keywords", {}).items()
    }  # fmt: skip
    alone = functools.partial(getattr(make, "func", make), *getattr(make, "args", ()))
    alone = alone(0.1, **alone_options)
    expected, _ = alone.update(part_grads, alone.init(part), part)

    mask = jax.tree.map(lambda label: label == "ours", labels)
    masked = optax.chain(
        optax.masked(make(0.1), mask),
        optax.masked(optax.sgd(1.0), jax.tree.map(lambda m: not m, mask)),
    )
    partition = optax.partition({"ours": make(0.1), "sgd": optax.sgd(1.0)}, labels)
    wrapped = (masked, partition)
    states = [tx.init(params) for tx in wrapped]
    both = quick.jit(
        lambda s: [tx.update(grads, x, params) for tx, x in zip(wrapped, s, strict=True)]
    )
    for state, (updates, after) in zip(states, both(states), strict=True):
        assert _types(after) == _types(state)
        _assert_close(updates["stack"], expected["stack"])
        _assert_close(updates["dense"]["kernel"], expected["dense"]["kernel"])
        _assert_equal(updates["dense"]["bias"], -grads["dense"]["bias"])


# In the wrappers of optax.


@newest
@full
def test_multi_steps_applies_the_mean_gradient(make: Make) -> None:
    """The first of two micro-batches changes nothing; the second makes a step with their mean."""
    tx = optax.MultiSteps(make(0.1), every_k_schedule=2)
    params = _params()
    state = tx.init(params)
    update = quick.jit(tx.update)
    halves = (_grads(seed=1), _grads(seed=2))
    first, state = update(halves[0], state, params)
    assert not any(np.asarray(u).any() for u in jax.tree.leaves(first))
    updates, state = update(halves[1], state, params)
    whole = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    inner, step = _compiled(make)
    _, expected = step(params, inner.init(params), whole)
    _assert_close(updates, expected, rtol=1e-5, atol=1e-6)


@newest
@full
def test_apply_if_finite_skips_a_nan_step(make: Make) -> None:
    """A skipped step changes neither the parameters nor the state."""
    tx = optax.apply_if_finite(make(0.1), 5)
    params = _params()
    start = tx.init(params)
    broken = _grads()
    broken["dense"]["bias"] = jnp.asarray([1.0, np.nan])
    update = quick.jit(tx.update)
    updates, refused = update(broken, start, params)
    assert not any(np.asarray(u).any() for u in jax.tree.leaves(updates))
    _assert_equal(refused.inner_state, start.inner_state)
    after_refusal, _ = update(_grads(), refused, params)
    without, _ = update(_grads(), start, params)
    _assert_equal(after_refusal, without)


@newest
@full
def test_tree_map_params_finds_the_state_shaped_like_the_parameters(make: Make) -> None:
    """The sharding of a state is derived from the parameters with `tree_map_params`."""
    tx = make(0.1)
    params = _params()
    state = tx.init(params)
    shapes = optax.tree.map_params(
        tx,
        lambda x, like: f"{x.shape} like {like.shape}",
        state,
        params,
        transform_non_params=lambda _: None,
    )
    for pair in jax.tree.leaves(shapes):
        ours, like = pair.split(" like ")
        assert ours == like
    assert jax.tree.leaves(shapes) or all(x.ndim == 0 for x in jax.tree.leaves(state))


# With Flax.


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.LayerNorm(name="norm")(nn.Dense(6, name="dense")(x))
        return nn.Dense(2, name="stack")(x)


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, axes: tuple[str | None, ...] = (None, None)) -> None:
        kernel_init = nnx.initializers.lecun_normal()
        if any(axes):
            kernel_init = nnx.with_partitioning(kernel_init, axes)
        self.dense = nnx.Linear(4, 6, rngs=rngs, kernel_init=kernel_init)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.stack = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.stack(self.norm(self.dense(x)))


X, Y = np.random.default_rng(5).normal(size=(2, 8, 4)).astype(np.float32)


def _loss(out: jax.Array) -> jax.Array:
    return jnp.mean((out - Y[:, :2]) ** 2)


_linen_gradients = quick.jit(jax.grad(lambda p: _loss(LinenModel().apply({"params": p}, X))))
_nnx_gradients = nnx.jit(nnx.value_and_grad(lambda model: _loss(model(X))))


def _flax_make(make: Make) -> Make:
    """Returns the constructor with layer rules that fit the parameters of these models."""
    if "layers" in getattr(make, "keywords", {}):
        return functools.partial(make, layers=[("stack/kernel", stacked(1))])
    return make


@newest
@each_kind
def test_linen_and_nnx_give_the_same_parameters(make: Make) -> None:
    model = NnxModel(nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert rules.leaf_paths(params) == rules.leaf_paths(nnx.state(model, nnx.Param))
    tx = _flax_make(make)(0.05)
    train_state = TrainState.create(apply_fn=LinenModel().apply, params=params, tx=tx)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @quick.jit
    def linen_step(state: TrainState, grads: Any) -> TrainState:
        return state.apply_gradients(grads=grads)

    @nnx.jit
    def nnx_step(model: NnxModel, optimizer: nnx.Optimizer, grads: Any) -> None:
        optimizer.update(model, grads)

    for _ in range(3):
        train_state = linen_step(train_state, _linen_gradients(train_state.params))
        nnx_step(model, optimizer, _nnx_gradients(model)[1])
    _assert_close(
        nnx.to_pure_dict(nnx.state(model, nnx.Param)), train_state.params, rtol=1e-5, atol=1e-6
    )
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), train_state.params, params)
    assert all(jax.tree.leaves(moved))


@newest
@each_kind
def test_nnx_models_with_sharding_annotations_can_be_trained(make: Make) -> None:
    """Scalars of the state must not inherit the annotations of the parameters."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        model = NnxModel(nnx.Rngs(0), axes=(None, "model"))
        optimizer = nnx.Optimizer(model, _flax_make(make)(0.005), wrt=nnx.Param)

        @nnx.jit
        def step(model: NnxModel, optimizer: nnx.Optimizer, grads: Any) -> None:
            optimizer.update(model, grads)

        loss, grads = _nnx_gradients(model)
        step(model, optimizer, grads)
        assert _nnx_gradients(model)[0] < loss
        assert model.dense.kernel[...].sharding.spec == P(None, "model")


@newest
@each_kind
def test_linen_sharding_annotations_apply_to_the_state(make: Make) -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model = nn.Dense(6, kernel_init=kernel_init)

    def create() -> TrainState:
        params = {"dense": model.init(jax.random.key(0), X)["params"],
                  "norm": jnp.ones(2), "stack": jnp.ones((2, 2))}  # fmt: skip
        return TrainState.create(apply_fn=model.apply, params=params, tx=make(0.05))

    shardings = nn.get_sharding(jax.eval_shape(create), mesh)
    state = quick.jit(create, out_shardings=shardings)()
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (4, 6)]
    assert moments
    assert all(x.sharding == NamedSharding(mesh, P(None, "model")) for x in moments)
    assert state.apply_gradients(grads=state.params).step == 1


# On disk.


@pytest.mark.diagonal
@newest
@full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_orbax_checkpoint_restores_every_bit(make: Make, dtype: str, tmp_path: Path) -> None:
    tx, step = _compiled(make)
    (params, state), _ = step(_params(dtype), tx.init(_params(dtype)), _grads(dtype))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"params": params, "opt_state": state})
        checkpointer.wait_until_finished()
        like = jax.eval_shape(lambda: {"params": _params(dtype), "opt_state": tx.init(params)})
        restored = checkpointer.restore(tmp_path / "state", like)
    _assert_equal(restored, {"params": params, "opt_state": state})
    assert _types(restored["opt_state"]) == _types(state)
    _assert_equal(
        step(restored["params"], restored["opt_state"], _grads(dtype)),
        step(params, state, _grads(dtype)),
    )


@newest
@full
def test_flax_serialization_restores_every_bit(make: Make) -> None:
    tx, step = _compiled(make)
    fresh = tx.init(_params())
    (_, state), _ = step(_params(), fresh, _grads())
    _assert_equal(flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state)), state)
    as_dict = flax.serialization.to_state_dict(state)
    _assert_equal(flax.serialization.from_state_dict(fresh, as_dict), state)


# Training.


@full
def test_training_lowers_a_quadratic_loss(make: Make) -> None:
    """Halves |x - target|^2 with one of three learning rates, because their scales differ.

    The loss cannot reach 0 with centralized gradients, which keep the mean weight of each output.
    """
    target = jax.tree.map(jnp.add, _params(), _grads(seed=7))

    def loss(params: Any) -> jax.Array:
        terms = jax.tree.map(lambda x, y: jnp.sum((x - y) ** 2), params, target)
        return sum(jax.tree.leaves(terms))

    @quick.jit
    def train(rate: jax.Array, params: Any) -> Any:
        tx = make(lambda step: rate * schedules.warmup_cosine(1.0, 5, 300)(step))

        def body(carry: Any, _: None) -> tuple[Any, None]:
            return _step(tx, *carry, jax.grad(loss)(carry[0])), None

        return jax.lax.scan(body, (params, tx.init(params)), length=300)[0][0]

    start = _params()
    # nanmin, because the loss may overflow if the learning rate is too large.
    assert np.nanmin([loss(train(r, start)) for r in (0.1, 2.0, 50.0)]) < loss(start) / 2


@full
@pytest.mark.parametrize("zero", ["grads", "params", "both"])
def test_zero_gradients_and_parameters_make_no_nan(make: Make, zero: str) -> None:
    zeros = jax.tree.map(jnp.zeros_like, _params())
    params = _params() if zero == "grads" else zeros
    grads = _grads() if zero == "params" else zeros
    tx, step = _compiled(make)
    state = tx.init(params)
    for _ in range(3):
        (params, state), _ = step(params, state, grads)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, state)))
    if zero == "both":
        _assert_equal(params, zeros)


@full
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_gradients_of_extreme_size_make_no_nan(make: Make, scale: float) -> None:
    """The squares, from 1e-30 to 1e30, are within the range of float32."""
    tx, step = _compiled(make)
    grads = jax.tree.map(lambda g: scale * g, _grads())
    _, updates = step(_params(), tx.init(_params()), grads)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


# Path patterns.

PATTERNS = [
    pytest.param(constructor, name, id=f"{optimizer}-{name}")
    for optimizer, constructor in CONSTRUCTORS.items()
    for name in _parameters(constructor)
    if name.startswith("exclude_")
]


@pytest.mark.parametrize(("constructor", "name"), PATTERNS)
def test_wrong_path_patterns_raise(constructor: Make, name: str) -> None:
    params = _params()
    with pytest.raises(TypeError, match=f"{name} must be a list of path patterns.*'bias'"):
        constructor(0.1, **{name: "bias"})
    with pytest.raises(ValueError, match=rf"{name}: '\(' is not a regular expression"):
        constructor(0.1, **{name: ["("]})
    tx = constructor(0.1, **{name: ["bias", "kernle"]})
    message = f"{name}: 'kernle' matches no leaf; the nearest paths are dense/kernel"
    with pytest.raises(ValueError, match=re.escape(message)):
        tx.init(params)
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(tx.init, params)
    # Under a mask, the pattern may match a leaf that is masked out.
    mask = {"stack": True, "dense": True, "norm": False}
    optax.masked(tx, mask).init(params)


@plain
def test_default_patterns_need_not_match(make: Make) -> None:
    params = {"w": jnp.ones(2)}
    tx = make(0.1)
    tx.update(params, tx.init(params), params)


@newest
@full
def test_init_can_be_traced_with_shapes(make: Make) -> None:
    """A sharded initialization derives the shapes of the state from those of the parameters."""
    tx = make(0.1)
    planned = jax.eval_shape(tx.init, jax.eval_shape(_params))
    real = tx.init(_params())
    assert jax.tree.structure(planned) == jax.tree.structure(real)
    for x, y in zip(jax.tree.leaves(planned), jax.tree.leaves(real), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
