"""Every recorded trajectory of an optimizer that is in the zoo, step by step."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim_zoo
from optim_zoo import recorded, schedules
from optim_zoo.transforms import ScaleByAdamState, ScaleByTrustRatioState

# Named one by one, so that a case that is lost fails.
ZOO = (
    "algoeff_torch_lamb",
    "algoeff_torch_lamb_excl",
    "dle_tf_bert_lamb",
    "dle_tf_txl_lamb",
    "optax_adamw",
    "optax_lamb",
    "optax_lamb_excl",
    "optax_lamb_wd0",
    "paper_lamb_nobias",
    "paper_lamb_phi_clip",
    "paper_lamb_phi_clip_high",
    "paper_lamb_sched",
    "paper_lamb_wd",
    "paper_lamb_wd0",
    "paper_lamb_wd_excl",
    "paper_lamb_wd_excl_both",
)
BERT_ADAM = ("bert_adamw", "bert_adamw_excl", "bert_adamw_wd0", "mac_adamw_excl")
BERT_CREATE_OPTIMIZER = (
    "bert_create_optimizer_nowarm",
    "bert_create_optimizer_warm",
    "mac_create_optimizer_warm",
)

MU_NAMES = ("m", "exp_avg", "mu")
NU_NAMES = ("v", "exp_avg_sq", "nu")


def test_every_case_is_there() -> None:
    cases = recorded.cases()
    assert len(cases) == 171
    assert [case.id for case in cases] == sorted({case.id for case in cases})
    assert sum(case.origin == "executed" for case in cases) == 148


def test_cases_of_the_zoo_are_those_named_here() -> None:
    present = {f"optim_zoo.{name}" for name in optim_zoo.registry.OPTIMIZERS}
    named = {"optim_zoo.lamb", "optim_zoo.adamw"}
    assert named <= present
    found = {case.id for case in recorded.cases() if case.constructor in present}
    assert found == set(ZOO)


@pytest.mark.parametrize("case", recorded.cases(), ids=lambda case: case.id)
def test_case_is_whole(case: recorded.Case) -> None:
    trajectory = case.load()
    structure = jax.tree.structure(trajectory.params0)
    assert len(trajectory.params) == len(trajectory.grads) == case.steps
    for tree in (*trajectory.params, *trajectory.grads):
        assert jax.tree.structure(tree) == structure
        for x, like in zip(jax.tree.leaves(tree), jax.tree.leaves(trajectory.params0), strict=True):
            assert (x.shape, x.dtype) == (like.shape, np.dtype(case.dtype))
            assert np.isfinite(x).all()
    assert set(trajectory.extras) == set(case.extras)
    for by_step in trajectory.extras.values():
        assert tuple(by_step) == case.extra_steps
    for series in trajectory.per_step.values():
        assert len(series) >= case.steps


def test_unknown_case() -> None:
    with pytest.raises(ValueError, match="no recorded case 'lambo'"):
        recorded.get("lambo")


@pytest.mark.parametrize("case_id", ZOO)
def test_zoo(case_id: str) -> None:
    case = recorded.get(case_id)
    module, name = case.constructor.rsplit(".", 1)
    _follow(case, getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("case_id", BERT_ADAM)
def test_bert_adam(case_id: str) -> None:
    def constructor(
        learning_rate: Any,
        weight_decay_rate: float,
        beta_1: float,
        beta_2: float,
        epsilon: float,
        exclude_from_weight_decay: Any = (),
    ) -> optax.GradientTransformation:
        return optim_zoo.bert_adamw(
            learning_rate,
            beta_1,
            beta_2,
            epsilon,
            weight_decay_rate,
            exclude_from_weight_decay=exclude_from_weight_decay,
        )

    _follow(recorded.get(case_id), constructor)


@pytest.mark.parametrize("case_id", BERT_CREATE_OPTIMIZER)
def test_bert_create_optimizer(case_id: str) -> None:
    """Clipping, BERT's Adam and its schedule together."""
    case = recorded.get(case_id)
    schedule = schedules.bert_warmup_polynomial(
        case.arguments["init_lr"],
        case.arguments["num_warmup_steps"],
        case.arguments["num_train_steps"],
    )

    def constructor(
        init_lr: float,
        num_train_steps: int,
        num_warmup_steps: int,
        exclude_from_weight_decay: Any,
    ) -> optax.GradientTransformation:
        return optax.chain(
            optim_zoo.clip_by_global_norm(1.0),
            optim_zoo.bert_adamw(
                schedule,
                weight_decay=0.01,
                exclude_from_weight_decay=exclude_from_weight_decay,
            ),
        )

    learning_rates = _follow(case, constructor)
    expected = case.load().per_step["lr"]
    # Computed in float32 by us: a few roundings of 6e-8.
    np.testing.assert_allclose(learning_rates, expected, rtol=5e-7)
    np.testing.assert_allclose([schedule(s) for s in range(case.steps)], expected, rtol=5e-7)


def _follow(
    case: recorded.Case, constructor: Callable[..., optax.GradientTransformation]
) -> list[float]:
    """Holds each step against the recording, in the precision of the case; the rates it used."""
    with jax.enable_x64(case.dtype == "float64"):
        return list(_steps(case, constructor))


def _steps(
    case: recorded.Case, constructor: Callable[..., optax.GradientTransformation]
) -> Iterator[float]:
    trajectory = case.load()
    arguments = {
        name: _series(trajectory, value) if isinstance(value, str) else value
        for name, value in case.arguments.items()
    }
    tx = constructor(**arguments)
    params = jax.tree.map(jnp.asarray, trajectory.params0)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(case.steps):
        grads = jax.tree.map(jnp.asarray, trajectory.grads[step])
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        _assert_close(case, params, trajectory.params[step], f"parameters after step {step}")
        if step in case.extra_steps:
            for name in case.extras:
                recorded_state = trajectory.extras[name][step]
                _assert_close(case, _kept(name, state, params), recorded_state, f"{name}, {step}")
        yield float(optim_zoo.metrics.read(state)["learning_rate"])


def _series(trajectory: recorded.Trajectory, name: str) -> optax.Schedule:
    values = jnp.asarray(trajectory.per_step[name.removeprefix("per_step/")])
    return lambda step: values[step]


def _kept(name: str, state: Any, params: Any) -> Any:
    """What our state has of the recorded state ``name``."""
    if name in MU_NAMES:
        return _piece(state, ScaleByAdamState).mu
    if name in NU_NAMES:
        return _piece(state, ScaleByAdamState).nu
    assert name == "trust_ratio"
    ratios = _piece(state, ScaleByTrustRatioState).trust_ratio
    # The reference records 1 where a leaf is excluded.
    return optim_zoo.tree.map_with_path(lambda path, _: ratios.get(path, np.ones(())), params)


def _piece(state: Any, kind: type) -> Any:
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    (piece,) = (node for node in nodes if isinstance(node, kind))
    return piece


def _assert_close(case: recorded.Case, actual: Any, expected: Any, what: str) -> None:
    def assert_leaf_close(path: str, actual: Any, expected: Any) -> None:
        # The state keeps trust ratios in float32, whatever the parameters are.
        rtol = max(case.rtol, 2e-7) if what.startswith("trust_ratio") else case.rtol
        np.testing.assert_allclose(
            actual, expected, rtol, case.atol, err_msg=f"{case.id}: {what}: {path}"
        )

    optim_zoo.tree.map_with_path(assert_leaf_close, actual, expected)
