"""Tests that every transformation accepts extra arguments and passes them on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from optim_zoo import layerwise_adaptive, lookahead, ports, recorded
from optim_zoo.recorded.agreement import make
from optim_zoo.transforms import scale_by_adam, scale_by_learning_rate
from tests.ports.test_ports import ONE_EACH
from tests.test_contract import ALL_PIECES, FULL, PLAIN
from tests.wrappers.test_wrappers import WRAPPERS

PARAMS = {
    "dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)},
    "layer_norm": {"scale": jnp.ones(4)},
    "stack": jnp.ones((2, 3)),
}
# Line searches and wrappers use the first three; nothing uses the last one.
EXTRA = {"value": 0.5, "grad": 1.0, "weight": 2.0, "unknown": None}


def _assert_ignored(tx: optax.GradientTransformation) -> None:
    """Asserts that extra arguments do not change the program of an update."""
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    state = jax.eval_shape(tx.init, PARAMS)
    with_extra, without = (
        jax.make_jaxpr(lambda *given, extra=extra: tx.update(*given, **extra))(
            PARAMS, state, PARAMS
        )
        for extra in (EXTRA, {})
    )
    assert str(with_extra) == str(without)


@pytest.mark.parametrize("constructor", [*PLAIN.values(), *FULL.values()], ids=[*PLAIN, *FULL])
def test_optimizers_ignore_extra_arguments(constructor: Callable[..., Any]) -> None:
    _assert_ignored(constructor(0.1))


@pytest.mark.parametrize("piece", ALL_PIECES.values(), ids=ALL_PIECES)
def test_pieces_ignore_extra_arguments(piece: Callable[[], optax.GradientTransformation]) -> None:
    _assert_ignored(piece())


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.constructor[16:])
def test_ports_ignore_extra_arguments(case: recorded.Case) -> None:
    _assert_ignored(make(case.constructor, case.arguments, case.inner, case.load()))


class _Recorder:
    """A direction that records its extra arguments."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        inner = scale_by_adam()

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            self.seen.append(extra)
            return inner.update(updates, state, params)

        self.direction = optax.GradientTransformationExtraArgs(inner.init, update)
        self.optimizer = optax.chain(self.direction, scale_by_learning_rate(0.1))

    def assert_reached_through(self, tx: optax.GradientTransformation) -> None:
        assert isinstance(tx, optax.GradientTransformationExtraArgs)
        state = jax.eval_shape(tx.init, PARAMS)
        marker = object()
        jax.eval_shape(
            lambda *given: tx.update(*given, value=0.5, unknown=marker), PARAMS, state, PARAMS
        )
        assert self.seen
        for seen in self.seen:
            assert seen["unknown"] is marker
            assert "value" in seen


@pytest.mark.parametrize("inner", [None, *WRAPPERS])
@pytest.mark.parametrize("outer", WRAPPERS)
def test_wrappers_pass_extra_arguments_on(outer: str, inner: str | None) -> None:
    recorder = _Recorder()
    wrapped = recorder.optimizer if inner is None else WRAPPERS[inner](recorder.optimizer)
    recorder.assert_reached_through(WRAPPERS[outer](wrapped))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_optimizers_ignore_extra_arguments(wrapper: str, name: str) -> None:
    tx = WRAPPERS[wrapper](PLAIN[name](0.1))
    state = jax.eval_shape(tx.init, PARAMS)
    jax.eval_shape(lambda *given: tx.update(*given, value=0.5, unknown=None), PARAMS, state, PARAMS)


WRAPPING: dict[str, Callable[[optax.GradientTransformation], optax.GradientTransformation]] = {
    "lookahead": lookahead,
    "michaelrzhang.Lookahead": ports.michaelrzhang.Lookahead,
    "michaelrzhang.Lookahead-reset": lambda tx: ports.michaelrzhang.Lookahead(
        tx, pullback_momentum="reset"
    ),
    "michaelrzhang.LookaheadTF": ports.michaelrzhang.LookaheadTF,
    "lifeiteng.LookaheadOptimizer": ports.lifeiteng.LookaheadOptimizer,
    "pytorch_optimizer.Lookahead": ports.pytorch_optimizer.Lookahead,
    "timm.Lookahead": ports.timm.Lookahead,
    "tensorflow_addons.Lookahead": ports.tensorflow_addons.Lookahead,
}


@pytest.mark.parametrize("name", WRAPPING)
def test_optimizers_that_wrap_an_optimizer_pass_extra_arguments_on(name: str) -> None:
    recorder = _Recorder()
    recorder.assert_reached_through(WRAPPING[name](recorder.optimizer))


def test_optimizers_that_wrap_a_direction_pass_extra_arguments_on() -> None:
    recorder = _Recorder()
    recorder.assert_reached_through(layerwise_adaptive(recorder.direction, 0.1))
