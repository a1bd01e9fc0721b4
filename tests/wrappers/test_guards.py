from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState

from optim_zoo import accumulation, adamw, guards, lamb, lars, metrics, saved_state, sgd

pytestmark = pytest.mark.usefixtures("quick_to_compile")

# Contains -0.0, which adding 0.0 would change.
PARAMS = {"a": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([-0.0, 0.0, 1.0])}
GRADS = {"a": jnp.array([[0.1, -0.2], [0.3, 0.4]]), "b": jnp.array([0.1, 0.2, -0.3])}
NAN = {**GRADS, "a": GRADS["a"].at[0, 1].set(jnp.nan)}
INFINITE = {**GRADS, "b": GRADS["b"].at[0].set(-jnp.inf)}
ZERO = jax.tree.map(jnp.zeros_like, GRADS)

Wrap = Callable[..., optax.GradientTransformationExtraArgs]


def _bits(tree: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def _run(
    tx: optax.GradientTransformation, steps: list[tuple[Any, dict[str, Any]]]
) -> tuple[Any, Any]:
    params, state = PARAMS, tx.init(PARAMS)
    update = jax.jit(tx.update)
    for gradients, extra in steps:
        updates, state = update(gradients, state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("wrap", [guards.skip_nonfinite, guards.skip_spikes])
@pytest.mark.parametrize(
    ("gradients", "extra"),
    [
        (NAN, {"value": 1.0}),
        (INFINITE, {"value": 1.0}),
        (GRADS, {"value": jnp.nan}),
        (GRADS, {"value": -jnp.inf}),
        (GRADS, {"value": jnp.inf}),
    ],
)
def test_a_skipped_step_is_a_no_op(wrap: Wrap, gradients: Any, extra: dict[str, Any]) -> None:
    """No bit of the parameters or the inner state changes, nor do the following steps."""
    good = (GRADS, {"value": 1.0})
    tx = wrap(lamb(0.1, weight_decay=0.1))
    params, state = _run(tx, [good, good])
    _, expected = _run(tx, [good])
    if extra["value"] == -jnp.inf and wrap is guards.skip_spikes:
        extra = {"value": jnp.nan}  # -inf is not a jump upwards
    trained, after = _run(tx, [good, (gradients, extra), good])
    assert _bits(trained) == _bits(params)
    assert _bits(after.inner) == _bits(state.inner)
    assert after.skipped_steps.total == 1
    assert after.skipped_steps.in_a_row == 0
    assert metrics.read(after)["skipped_steps"] == 1
    # The same holds directly after the skipped step.
    unchanged, during = _run(tx, [good, (gradients, extra)])
    assert _bits(unchanged) == _bits(_run(tx, [good])[0])
    assert _bits(during.inner) == _bits(expected.inner)
    assert during.skipped_steps.in_a_row == 1


@pytest.mark.parametrize("wrap", [guards.skip_nonfinite, guards.skip_spikes])
def test_a_finite_step_equals_the_inner_step(wrap: Wrap) -> None:
    params, _ = _run(wrap(adamw(0.1)), [(GRADS, {})] * 3)
    expected, _ = _run(adamw(0.1), [(GRADS, {})] * 3)
    for name, x in params.items():
        # XLA fuses the two programs differently, which changes the rounding.
        np.testing.assert_allclose(x, expected[name], rtol=1e-6)


@pytest.mark.parametrize("wrap", [guards.skip_nonfinite, guards.skip_spikes])
def test_check_raises_at_the_limit(wrap: Wrap) -> None:
    tx = wrap(sgd(0.1), max_consecutive=2)
    bad, good = (NAN, {}), (GRADS, {})
    guards.check(_run(tx, [bad, good, bad])[1])
    guards.check(optax.sgd(0.1).init(PARAMS))  # has no guard to check
    with pytest.raises(guards.TooManyRefusals, match=r"2 steps in a row .* \(3 in all\): go back"):
        guards.check((_run(tx, [bad, good, bad, bad])[1],))
    # The limit of the current guard applies, not that of the guard that made the state.
    state = _run(wrap(sgd(0.1), max_consecutive=9), [bad, bad])[1]
    guards.check(tx.update(GRADS, state, PARAMS)[1])
    with pytest.raises(guards.TooManyRefusals, match="3 steps in a row"):
        guards.check(tx.update(NAN, state, PARAMS)[1])


@pytest.mark.parametrize("wrap", [guards.skip_nonfinite, guards.skip_spikes])
def test_check_accepts_the_states_of_flax_and_pmap(wrap: Wrap) -> None:
    tx = wrap(metrics.with_metrics(lars(0.1)), max_consecutive=2)
    message = r"2 steps in a row were skipped, at most 1 are allowed \(2 in all\)"

    optimizer = nnx.Optimizer(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), tx, wrt=nnx.Param)
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    gradients = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), nnx.state(model, nnx.Param))
    optimizer.update(model, gradients)
    guards.check(optimizer.opt_state)
    optimizer.update(model, gradients)
    with pytest.raises(guards.TooManyRefusals, match=message):
        guards.check(optimizer.opt_state)
    read = metrics.read(optimizer.opt_state)
    assert read["skipped_steps"] == 2
    assert {"learning_rate", "trust_ratio/kernel", "gradient_norm"} <= set(read)
    assert all(isinstance(value, jax.Array) for value in read.values())
    with pytest.raises(TypeError, match=r"pass optimizer\.opt_state instead of nnx"):
        guards.check(nnx.state(optimizer))

    train = TrainState.create(apply_fn=lambda: None, params=PARAMS, tx=tx)
    train = train.apply_gradients(grads=NAN)
    guards.check(train.opt_state)
    train = train.apply_gradients(grads=NAN)
    with pytest.raises(guards.TooManyRefusals, match=message):
        guards.check(train.opt_state)

    replicated = jax.pmap(lambda _: train.opt_state)(jnp.zeros(jax.local_device_count()))
    with pytest.raises(guards.TooManyRefusals, match=message):
        guards.check(replicated)
    read = metrics.read(replicated)
    assert read["trust_ratio/a"].shape == (jax.local_device_count(),)
    np.testing.assert_array_equal(read["skipped_steps"], 2)


def test_check_refuses_a_state_whose_types_were_lost() -> None:
    tx = accumulation.accumulate(guards.skip_nonfinite(adamw(0.1), max_consecutive=1), 1)
    state = tx.update(NAN, tx.init(PARAMS), PARAMS)[1]
    for wrapped in (state, (state,)):
        restored = serialization.to_state_dict(wrapped)
        with pytest.raises(TypeError, match=r"rebuild it with saved_state\.rebuild\(tx\.init"):
            guards.check(restored)
        guards.check(saved_state.rebuild(wrapped, restored))
    guards.check(serialization.to_state_dict(adamw(0.1).init(PARAMS)))  # has no guard


def _level(scale: float, value: float | None = None) -> tuple[Any, dict[str, Any]]:
    extra = {} if value is None else {"value": value}
    return jax.tree.map(lambda g: scale * g, GRADS), extra


def _skipped(tx: optax.GradientTransformation, steps: list[tuple[Any, dict[str, Any]]]) -> int:
    return int(_run(tx, steps)[1].skipped_steps.total)


def test_a_jump_of_the_gradient_is_skipped_once_the_window_is_full() -> None:
    tx = guards.skip_spikes(sgd(0.1), window=3, factor=4)
    assert _skipped(tx, [_level(1), _level(100), _level(1)]) == 0  # the window is not full
    usual = [_level(1.0), _level(1.1), _level(0.9)]
    assert _skipped(tx, [*usual, _level(3.9)]) == 0
    assert _skipped(tx, [*usual, _level(4.1)]) == 1
    # The norm of a skipped step does not enter the window.
    assert _skipped(tx, [*usual, _level(4.1), _level(4.1), _level(3.9)]) == 2
    # The norm of every other step does, and the median follows.
    assert _skipped(tx, [*usual, _level(3.0), _level(3.0), _level(10.0)]) == 0


def test_a_jump_of_the_loss_is_skipped() -> None:
    tx = guards.skip_spikes(sgd(0.1), window=2, factor=3)
    usual = [_level(1, 2.0), _level(1, 2.0)]
    assert _skipped(tx, [*usual, _level(1, 5.9)]) == 0
    assert _skipped(tx, [*usual, _level(1, 6.1)]) == 1
    negative = [_level(1, -2.0), _level(1, -2.0)]
    assert _skipped(tx, [*negative, _level(1, 1.9)]) == 0
    assert _skipped(tx, [*negative, _level(1, 2.1)]) == 1
    assert _skipped(tx, [_level(1), _level(1), _level(1, 100.0)]) == 0  # no loss in the window


def _messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "optim_zoo.wrappers.guards"]


def test_skip_spikes_logs_once_that_it_has_no_loss(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each guard logs once, however often it is traced. Warnings could be turned into errors."""
    tx = accumulation.accumulate(guards.skip_spikes(sgd(0.1)), 1)
    state = tx.init(PARAMS)
    assert not _messages(caplog)
    for update in (tx.update, jax.jit(tx.update), jax.jit(jax.named_call(tx.update))):
        _, state = update(GRADS, state, PARAMS)
    (message,) = _messages(caplog)
    assert "compares gradient norms only" in message
    assert "Pass the loss to update as value=" in message
    other = guards.skip_spikes(sgd(0.1))
    other.update(GRADS, other.init(PARAMS), PARAMS)
    assert len(_messages(caplog)) == 2


def test_skip_spikes_logs_nothing_with_a_loss(caplog: pytest.LogCaptureFixture) -> None:
    tx = guards.skip_spikes(guards.skip_nonfinite(sgd(0.1)))
    tx.update(GRADS, tx.init(PARAMS), PARAMS, value=1.0)
    plain = guards.skip_nonfinite(sgd(0.1))
    plain.update(GRADS, plain.init(PARAMS), PARAMS)
    assert not _messages(caplog)


def test_zero_gradients_are_not_skipped() -> None:
    assert _skipped(guards.skip_spikes(sgd(0.1), window=2), [(ZERO, {})] * 3) == 0


@pytest.mark.parametrize("wrap", [guards.skip_nonfinite, guards.skip_spikes])
def test_guards_work_in_a_scan_and_with_donation(wrap: Wrap) -> None:
    tx = wrap(lamb(0.1))
    gradients = jax.tree.map(lambda *g: jnp.stack(g), GRADS, NAN, GRADS)

    def step(carry: Any, g: Any) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(carry: Any) -> Any:
        return jax.lax.scan(step, carry, gradients)[0]

    params, state = train((PARAMS, tx.init(PARAMS)))
    expected, _ = _run(tx, [(GRADS, {})] * 2)
    assert state.skipped_steps.total == 1
    for name, x in params.items():
        np.testing.assert_allclose(x, expected[name], rtol=1e-6)
    carry = jax.tree.map(jnp.copy, (PARAMS, tx.init(PARAMS)))
    jax.jit(lambda c: step(c, GRADS)[0], donate_argnums=0)(carry)


@pytest.mark.parametrize("wrap", [guards.skip_nonfinite, guards.skip_spikes])
def test_errors_name_a_state_that_changes_its_dtype(wrap: Wrap) -> None:
    tx = wrap(optax.adam(0.1))
    params = {"a": jnp.ones(3, "bfloat16")}
    with pytest.raises(TypeError, match=r"mu/a from bfloat16\(3,\) to float32\(3,\).*master_weig"):
        tx.update({"a": jnp.ones(3)}, tx.init(params), params)


@pytest.mark.diagonal
@pytest.mark.parametrize("wrap", [guards.skip_nonfinite, guards.skip_spikes])
@pytest.mark.parametrize("how", ["shard_map", "unchecked", "pmap"])
def test_all_devices_skip_a_step_together(wrap: Wrap, how: str) -> None:
    """A NaN on one device makes all devices skip the step, without a deadlock."""
    devices, size = 4, 8
    x = np.arange(1.0, devices * size + 1, dtype=np.float32)
    replicated = np.ones(3, np.float32)
    gradient = np.ones_like(x)
    broken = gradient.copy()
    broken[size + 1] = np.nan  # on the second device
    axis_name = None if how == "shard_map" else [("sharded", "model")]
    # LAMB contains a collective: devices that decide differently would deadlock.
    tx = wrap(lamb(0.1, axis_name=axis_name), axis_name=axis_name)

    def train(sharded: Any, replicated: Any, gradients: Any) -> tuple[Any, Any, Any]:
        params = {"sharded": sharded, "replicated": replicated}
        state = tx.init(params)
        for g in gradients:
            updates, state = tx.update({"sharded": g, "replicated": jnp.ones(3)}, state, params)
            params = optax.apply_updates(params, updates)
        return params["sharded"], params["replicated"], state.skipped_steps.total

    def on_devices(*gradients: np.ndarray) -> tuple[Any, Any, Any]:
        if how == "pmap":
            mapped = jax.pmap(train, "model", in_axes=(0, None, 0), devices=jax.devices()[:devices])
            blocks, copies, total = mapped(
                x.reshape(devices, size), replicated, [g.reshape(devices, size) for g in gradients]
            )
            assert len(set(_bits(list(copies)))) == 1
            return np.asarray(blocks).reshape(-1), copies[0], total[0]
        mesh = jax.sharding.Mesh(jax.devices()[:devices], ("model",))
        mapped = jax.shard_map(
            train,
            mesh=mesh,
            in_specs=(jax.P("model"), jax.P(), jax.P("model")),
            out_specs=(jax.P("model"), jax.P(), jax.P()),
            check_vma=how == "shard_map",
        )
        return jax.jit(mapped)(x, replicated, list(gradients))

    *trained, total = on_devices(gradient, broken, gradient)
    *expected, none = on_devices(gradient, gradient)
    assert (int(total), int(none)) == (1, 0)
    for x, y in zip(trained, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)  # programs are fused differently


@pytest.mark.diagonal
@pytest.mark.parametrize("wrap", [guards.skip_nonfinite, guards.skip_spikes])
@pytest.mark.parametrize("axis_name", ["data", ("data",), [("a", ("data",))]])
def test_all_devices_skip_a_step_whose_loss_is_nan_on_one(wrap: Wrap, axis_name: Any) -> None:
    tx = wrap(sgd(0.1), axis_name=axis_name)

    def total(value: jax.Array) -> jax.Array:
        _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, value=value)
        return state.skipped_steps.total

    skipped = jax.pmap(total, "data", devices=jax.devices()[:2])(jnp.array([1.0, jnp.nan]))
    np.testing.assert_array_equal(skipped, [1, 1])


def test_no_step_is_a_jump_if_the_median_is_zero() -> None:
    """A median of 0 comes from batches without tokens or a hinge loss of 0."""
    tx = guards.skip_spikes(sgd(0.1), window=2)
    assert _skipped(tx, [(ZERO, {"value": 0.0})] * 2 + [_level(1, 0.5)] * 2) == 0


def test_check_raises_inside_jit() -> None:
    state = guards.skip_nonfinite(sgd(0.1)).init(PARAMS)
    with pytest.raises(TypeError, match=r"guards.check reads numbers: call it outside jit"):
        jax.jit(guards.check)(state)


def test_invalid_arguments_raise() -> None:
    tx = guards.skip_spikes(sgd(0.1))
    with pytest.raises(ValueError, match=r"value must be one number, got .* shape \(1,\)"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, value=jnp.ones(1))
    with pytest.raises(ValueError, match="max_consecutive must be >= 1, got 0"):
        guards.skip_nonfinite(sgd(0.1), 0)
    with pytest.raises(ValueError, match="window must be >= 2, got 1"):
        guards.skip_spikes(sgd(0.1), window=1)
    with pytest.raises(ValueError, match="factor must be"):
        guards.skip_spikes(sgd(0.1), factor=1.0)
    with pytest.raises(ValueError, match="axis_name: 'c' matches no leaf"):
        guards.skip_nonfinite(sgd(0.1), axis_name=[("c", "data")]).init(PARAMS)
