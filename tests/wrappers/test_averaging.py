import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from optim_zoo import (
    accumulation,
    adam,
    averaging,
    guards,
    lamb,
    lazy_adam,
    lookahead,
    precision,
    scale_by_rules,
    sgd,
    sharding,
)
from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.rows import SparseRows, apply_updates
from tests.sharding.problem import RTOL, data_mesh, many_loss, many_params

pytestmark = pytest.mark.usefixtures("quick_to_compile")

PARAMS = {"kernel": jnp.asarray([[1.0, -2.0], [0.5, 3.0]]), "bias": [jnp.asarray([0.25, 4.0])]}
NAN = float("nan")


def _exponential(xs: list[Any], decay: float, start: int = 0, debias: bool = False) -> Any:
    """Returns the average of x_0, x_1, ... by its definition as a weighted mean, in float64."""
    after = len(xs) - 1 - start
    if after <= 0:
        return xs[-1]
    weights = [(1 - decay) * decay ** (after - i) for i in range(1, after + 1)]
    weights.insert(0, decay**after)
    if debias:
        weights[0] = 0
    return np.average(xs[start:], axis=0, weights=weights)


def _uniform(xs: list[Any], start: int = 1, every: int = 1) -> Any:
    return xs[-1] if len(xs) <= start else np.mean(xs[start::every], axis=0)


def _steps(tx: Any, gradients: list[float], params: Any = PARAMS) -> tuple[list[Any], list[Any]]:
    """Returns the parameters and the state before the first step and after each step."""

    @jax.jit
    def step(params: Any, state: Any, size: jax.Array) -> Any:
        g = jax.tree.map(lambda x: (size * (1 + x)).astype(x.dtype), params)
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    seen, states = [params], [tx.init(params)]
    for size in gradients:
        params, state = step(seen[-1], states[-1], size)
        seen.append(params)
        states.append(state)
    return seen, states


def _assert_average(state: Any, seen: list[Any], mean: Callable[..., Any]) -> None:
    averages = jax.tree.leaves(averaging.read(state))
    histories = zip(*map(jax.tree.leaves, seen), strict=True)
    for average, xs in zip(averages, histories, strict=True):
        assert average.dtype == "float32"
        expected = mean([np.float64(x) for x in xs])
        # Each of at most ten steps rounds in float32, 6e-8 of the largest parameter, which is 4.
        np.testing.assert_allclose(average, expected, rtol=1e-6, atol=1e-6)


GRADIENTS = [1.0, -0.5, 0.25, 2.0, 0.5, -1.0, 0.1]
MEANS: dict[str, tuple[Any, Any]] = {
    "exponential": (averaging.average_parameters, _exponential),
    "uniform": (averaging.average_uniformly, _uniform),
}


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("exponential", {"decay": 0.9}),
        ("exponential", {"decay": 0.0}),
        ("exponential", {"decay": 0.5, "start": 3}),
        ("exponential", {"decay": 0.99, "debias": True}),
        ("exponential", {"decay": 0.0, "debias": True}),
        ("exponential", {"decay": 0.8, "start": 2, "debias": True}),
        ("uniform", {}),
        ("uniform", {"start": 3}),
        ("uniform", {"start": 2, "every": 2}),
    ],
    ids=str,
)
def test_the_average_is_the_weighted_mean_of_the_definition(kind: str, arguments: Any) -> None:
    make, mean = MEANS[kind]
    with jax.debug_nans(True), jax.debug_infs(True):
        seen, states = _steps(make(sgd(0.1), **arguments), GRADIENTS)
    plain, _ = _steps(sgd(0.1), GRADIENTS)
    jax.tree.map(np.testing.assert_array_equal, seen, plain)
    for t, state in enumerate(states):
        _assert_average(state, seen[: t + 1], functools.partial(mean, **arguments))
    assert int(states[-1].count) == len(GRADIENTS)


def test_a_decay_near_1_keeps_its_digits() -> None:
    """Float32 would round 1 - 0.99999 by half a percent."""
    for debias in (False, True):
        tx = averaging.average_parameters(sgd(1.0), 0.99999, debias=debias)
        params = {"x": jnp.zeros(())}
        state = tx.init(params)
        for x in (1e5, 3e5):
            updates, state = tx.update({"x": params["x"] - x}, state, params)
            params = optax.apply_updates(params, updates)
        mean = _exponential([np.float64(x) for x in (0, 1e5, 3e5)], 0.99999, debias=debias)
        np.testing.assert_allclose(averaging.read(state)["x"], mean, rtol=1e-6)


def test_an_average_without_bias_forgets_the_parameters_before_it() -> None:
    params = {"x": jnp.asarray(1e8)}
    tx = averaging.average_parameters(sgd(1.0), 0.9, debias=True)
    updates, state = tx.update(params, tx.init(params), params)
    _, state = tx.update({"x": jnp.asarray(-1.0)}, state, optax.apply_updates(params, updates))
    # The mean of x_1 = 0 and x_2 = 1, whose weights are 0.9 and 1; one of 1e-7 for x_0 would add 5.
    np.testing.assert_allclose(averaging.read(state)["x"], 1 / 1.9, rtol=1e-6)


def _average(tx: Any) -> Any:
    return averaging.average_parameters(tx, 0.5)


def _multi(tx: Any) -> Any:
    return optax.MultiSteps(tx, 2).gradient_transformation()


# Wrappers and the calls of `update` that make a step, where the third gradient is NaN.
STEPPING: dict[str, tuple[Callable[[Any], Any], list[int]]] = {
    "accumulate": (lambda tx: accumulation.accumulate(tx, 2), [2, 4, 6]),
    "skip_nonfinite": (guards.skip_nonfinite, [1, 2, 4, 5, 6, 7]),
    "skip_spikes": (lambda tx: guards.skip_spikes(tx, 2, 1e6), [1, 2, 4, 5, 6, 7]),
    "both": (
        lambda tx: accumulation.accumulate(
            guards.skip_nonfinite(tx), 3, skip_nonfinite=False, max_consecutive=2
        ),
        [6],
    ),
    "guard of an accumulation": (
        lambda tx: guards.skip_nonfinite(accumulation.accumulate(tx, 2)),
        [2, 5, 7],
    ),
    "chain": (
        lambda tx: optax.chain(optax.identity(), guards.skip_nonfinite(tx)),
        [1, 2, 4, 5, 6, 7],
    ),
    "master_weights": (
        lambda tx: precision.master_weights(accumulation.accumulate(tx, 2)),
        [2, 4, 6],
    ),
    "MultiSteps": (lambda tx: guards.skip_nonfinite(_multi(tx)), [2, 5, 7]),
    "apply_if_finite": (lambda tx: optax.apply_if_finite(tx, 9), [1, 2, 4, 5, 6, 7]),
}


@pytest.mark.diagonal
@pytest.mark.parametrize("outside", [True, False], ids=["outside", "inside"])
@pytest.mark.parametrize("name", STEPPING)
def test_one_step_of_the_optimizer_is_one_step_of_the_average(name: str, outside: bool) -> None:
    wrap, made = STEPPING[name]
    tx = _average(wrap(sgd(0.1))) if outside else wrap(_average(sgd(0.1)))
    gradients = [1.0, -0.5, NAN, 2.0, 0.5, -1.0, 0.1]
    seen, states = _steps(tx, gradients)
    assert np.isfinite(jax.tree.leaves(seen[-1])[0]).all()
    history = [seen[0]]
    for t in range(1, len(seen)):
        if t in made:
            history.append(seen[t])
        else:  # unchanged to the bit
            before, after = averaging.read(states[t - 1]), averaging.read(states[t])
            jax.tree.map(np.testing.assert_array_equal, before, after)
        _assert_average(states[t], history, functools.partial(_exponential, decay=0.5))
    counts = [
        node.count
        for node in jax.tree.leaves(
            states[-1], is_leaf=lambda node: isinstance(node, averaging.AverageParametersState)
        )
        if isinstance(node, averaging.AverageParametersState)
    ]
    assert counts == [len(made)]


def test_a_group_that_is_skipped_alone_does_not_stop_the_average() -> None:
    groups = {"a": guards.skip_nonfinite(sgd(0.1)), "b": guards.skip_nonfinite(sgd(0.1))}
    tx = _average(optax.partition(groups, {"x": "a", "y": "b"}))
    params = {"x": jnp.ones(()), "y": jnp.ones(())}
    state = tx.init(params)
    _, state = tx.update({"x": jnp.asarray(jnp.nan), "y": jnp.ones(())}, state, params)
    np.testing.assert_allclose(averaging.read(state)["y"], 0.95, rtol=1e-6)


MASTERS: dict[str, Callable[[Any], Any]] = {
    "outside": lambda tx: _average(precision.master_weights(tx)),
    "inside": lambda tx: precision.master_weights(_average(tx)),
    "outside a chain": lambda tx: _average(
        optax.chain(optax.identity(), precision.master_weights(tx))
    ),
    "outside groups": lambda tx: _average(
        optax.partition(
            {k: precision.master_weights(tx) for k in "ab"}, {"kernel": "a", "bias": "b"}
        )
    ),
}


@pytest.mark.parametrize("make", MASTERS.values(), ids=MASTERS)
def test_the_average_of_low_precision_is_that_of_the_masters(make: Callable[[Any], Any]) -> None:
    """The steps are so small that most of them do not change the bfloat16 parameters."""
    params = {"kernel": jnp.ones((2, 2), "bfloat16"), "bias": [jnp.ones(2)]}
    _, states = _steps(make(sgd(1e-4)), GRADIENTS, params)
    wide = jax.tree.map(lambda x: x.astype("float32"), params)
    # The same steps in float32; the gradients 1 + x are nearly the same.
    seen, _ = _steps(sgd(1e-4), GRADIENTS, wide)
    expected = _exponential([np.float64(x["kernel"]) for x in seen], 0.5)
    moved = np.abs(expected - 1).max()
    assert 1e-4 < moved < 1e-3
    average = averaging.read(states[-1])["kernel"]
    np.testing.assert_allclose(average, expected, rtol=0, atol=0.01 * moved)


def test_the_average_of_rounded_parameters_is_that_of_what_the_model_saw() -> None:
    params = jax.tree.map(lambda x: x.astype("bfloat16"), PARAMS)
    tx = _average(precision.stochastic_rounding(sgd(1e-2), jax.random.key(0)))
    seen, states = _steps(tx, GRADIENTS, params)
    _assert_average(states[-1], seen, functools.partial(_exponential, decay=0.5))
    like = averaging.read(states[-1], like=params)
    assert jax.tree.map(lambda x: x.dtype, like) == jax.tree.map(lambda x: x.dtype, params)
    inside = precision.stochastic_rounding(_average(sgd(0.0)), jax.random.key(0))
    _, states = _steps(inside, GRADIENTS, params)
    jax.tree.map(np.testing.assert_array_equal, averaging.read(states[-1], like=params), params)


@pytest.mark.parametrize("make", [averaging.average_parameters, averaging.average_uniformly])
def test_a_step_may_donate_parameters_and_state(make: Any) -> None:
    params = jax.tree.map(jnp.copy, PARAMS)
    tx = make(lookahead(adam(0.1)))
    state = tx.init(params)
    leaves = jax.tree.leaves((params, state))
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for _ in range(2):
        params, state = step(params, state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == before


def test_rows_that_have_no_gradient_are_averaged_too() -> None:
    params = {"table": jnp.arange(10.0).reshape(5, 2)}
    tx = _average(lazy_adam(0.1))
    state, seen = tx.init(params), [params]
    for ids in ([1, 4], [1, 1], [0, 5]):
        g = {"table": SparseRows(np.asarray(ids), jnp.ones((2, 2)), 5)}
        updates, state = tx.update(g, state, seen[-1])
        assert isinstance(updates["table"], SparseRows)
        seen.append(apply_updates(seen[-1], updates))
    _assert_average(state, seen, functools.partial(_exponential, decay=0.5))


MODES: dict[str, dict[str, Any]] = {
    "jit": {},
    "zero1": {"zero1": "data"},
    "fsdp": {"param_shardings": [("hidden", jax.P(None, "data"))]},
    "shard_map": {"mode": "shard_map"},
    "pmap": {"mode": "pmap"},
}


@functools.cache
def _single() -> Any:
    params = many_params(np.random.default_rng(0))
    rng = np.random.default_rng(1)
    batch = {"x": rng.normal(size=(16, 4)), "y": rng.normal(size=(16, 2))}
    batches = [{name: jnp.float32(k * x) for name, x in batch.items()} for k in (1, 2, 0.5)]
    tx = averaging.average_parameters(guards.skip_nonfinite(adam(0.1)), 0.5, debias=True)
    state, now = tx.init(params), params
    update = jax.jit(tx.update)
    for batch in batches:
        updates, state = update(jax.grad(many_loss)(now, batch), state, now)
        now = optax.apply_updates(now, updates)
    return tx, params, batches, averaging.read(state)


@pytest.mark.parametrize("mode", MODES)
def test_the_average_is_that_of_one_device_in_every_mode(mode: str) -> None:
    tx, params, batches, expected = _single()
    step = sharding.data_parallel(many_loss, tx, mesh=data_mesh(8), **MODES[mode])
    now, state = step.init(params)
    for batch in batches:
        now, state, _ = step(now, state, batch)
    average = averaging.read(state, like=now)
    if mode == "zero1":
        assert average["hidden"].sharding.spec == jax.P(None, "data")
        assert average["out"].sharding.spec == jax.P("data")
    for name, x in average.items():
        shards = x if mode == "pmap" else x[None]
        for one in np.asarray(shards):
            # Steps of Adam divide by root(nu), which enlarges a difference of gradients.
            np.testing.assert_allclose(one, expected[name], rtol=10 * RTOL, atol=10 * RTOL)


def test_read_finds_the_average_in_every_container() -> None:
    tx = _average(sgd(0.1))
    _, states = _steps(tx, GRADIENTS)
    expected = averaging.read(states[-1])
    train_state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    train_state = train_state.replace(opt_state=(states[-1], optax.EmptyState()))
    jax.tree.map(np.testing.assert_array_equal, averaging.read(train_state), expected)
    jitted = jax.jit(averaging.read)(train_state.opt_state)
    jax.tree.map(np.testing.assert_array_equal, jitted, expected)

    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = nnx.state(model, nnx.Param)
    kernel = np.asarray(model.kernel[...])
    optimizer.update(model, jax.tree.map(jnp.ones_like, before))
    average = averaging.read(optimizer, like=nnx.state(model, nnx.Param))
    nnx.update(model, average)
    np.testing.assert_allclose(model.kernel[...], kernel - 0.05, rtol=1e-6)


def test_read_joins_groups_and_leaves_other_parameters_unchanged() -> None:
    mask = {"kernel": True, "bias": [False]}
    others = {"kernel": False, "bias": [True]}
    both = optax.chain(
        optax.masked(averaging.average_parameters(sgd(0.1), 0.5), mask),
        optax.masked(averaging.average_parameters(sgd(0.1), 0.5), others),
    )
    seen, states = _steps(both, GRADIENTS)
    joined = (averaging.read(states[-1], like=PARAMS),)
    _assert_average(
        averaging.AverageParametersState(jnp.zeros(()), *joined, ()),
        seen,
        functools.partial(_exponential, decay=0.5),
    )
    with pytest.raises(ArgumentValueError, match=r"^state must hold one average, .*: pass the par"):
        averaging.read(states[-1])
    one = optax.masked(averaging.average_parameters(sgd(0.1), 0.5), mask)
    seen, states = _steps(one, GRADIENTS)
    assert isinstance(averaging.read(states[-1])["bias"][0], optax.MaskedNode)
    like = averaging.read(states[-1], like=seen[-1])
    np.testing.assert_array_equal(like["bias"][0], seen[-1]["bias"][0])
    assert not np.array_equal(like["kernel"], seen[-1]["kernel"])


def test_what_read_cannot_use_raises() -> None:
    with pytest.raises(ArgumentTypeError, match=r"^state must hold the state of average_par"):
        averaging.read(adam(0.1).init(PARAMS))
    state = _average(sgd(0.1)).init(PARAMS)
    with pytest.raises(
        ArgumentTypeError, match=r"averaging.read recognizes .* saved_state.rebuild"
    ):
        averaging.read(state._asdict())
    twice = _average(averaging.average_uniformly(sgd(0.1))).init(PARAMS)
    with pytest.raises(ArgumentValueError, match=r"^state must hold one average of .* of bias/0:"):
        averaging.read(twice, like=PARAMS)
    with pytest.raises(ArgumentValueError, match=r"like must be the parameters .* no kernel$"):
        averaging.read(state, like={"bias": PARAMS["bias"]})


def test_wrong_arguments_raise() -> None:
    for make in (averaging.average_parameters, averaging.average_uniformly):
        with pytest.raises(ArgumentTypeError, match=r"^inner must be an optax\.Gradient"):
            make(0.1)
        tx = make(sgd(0.1))
        with pytest.raises(ArgumentValueError, match=rf"^{make.__name__} needs the parameters"):
            tx.update(PARAMS, tx.init(PARAMS))
        with pytest.raises(ArgumentValueError, match=rf"^{make.__name__}: the gradient of kernel"):
            tx.update({**PARAMS, "kernel": jnp.ones(3)}, tx.init(PARAMS), PARAMS)
        with pytest.raises(ArgumentTypeError, match=r"^parameters must be floating-point, x has"):
            tx.init({"x": jnp.arange(3)})
    with pytest.raises(ArgumentValueError, match=r"^decay must be in \[0, 1\), got 1"):
        averaging.average_parameters(sgd(0.1), 1.0)
    with pytest.raises(ArgumentTypeError, match=r"^debias must be True or False, got 1"):
        averaging.average_parameters(sgd(0.1), debias=1)  # type: ignore[arg-type]
    with pytest.raises(ArgumentValueError, match=r"^start must be >= 1, got 0"):
        averaging.average_uniformly(sgd(0.1), 0)
    with pytest.raises(ArgumentValueError, match=r"^every must be >= 1, got 0"):
        averaging.average_uniformly(sgd(0.1), every=0)


def test_the_decay_may_be_injected_and_rules_are_inside() -> None:
    inner = optax.chain(lamb(0.1), scale_by_rules([("kernel", 0.0)]))
    injected = optax.inject_hyperparams(
        lambda decay: averaging.average_parameters(inner, decay), hyperparam_dtype=jnp.float32
    )
    seen, states = _steps(injected(0.5), GRADIENTS)
    _assert_average(states[-1], seen, functools.partial(_exponential, decay=0.5))
    average = averaging.read(states[-1])["kernel"]
    np.testing.assert_array_equal(average, PARAMS["kernel"])
