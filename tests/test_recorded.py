"""Compares every optimizer with its recorded trajectories, step by step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import optim_zoo
from optim_zoo import recorded
from optim_zoo.recorded import agreement
from optim_zoo.recorded.agreement import REFERENCE_NOISE, follow, steps
from tests import cover, quick

pytestmark = pytest.mark.newest

every_case = pytest.mark.parametrize("case", recorded.cases(), ids=lambda case: case.id)

# The names of moments in the references, and the fields of our states for them.
FIELDS = {
    **dict.fromkeys(["m", "exp_avg", "mu", "grad_avg", "avg_grad", "mg"],
                    ("mu", "exp_avg", "momentum", "trace")),
    **dict.fromkeys(["v", "exp_avg_sq", "nu", "square_avg", "velocity", "rms"],
                    ("nu", "exp_avg_sq", "e_g")),
    **dict.fromkeys(["max_exp_avg_sq", "v_max", "vhat"], ("nu_max",)),
    **dict.fromkeys(["momentum", "momentum_buffer", "trace"], ("momentum",)),
    **dict.fromkeys(["sum", "sum_of_squares", "accumulator"], ("sum_of_squares",)),
    **dict.fromkeys(["e_g", "accum", "accumulated_grad"], ("e_g",)),
    **dict.fromkeys(["e_x", "accum_update", "acc_delta", "accumulated_delta"], ("e_x",)),
    **dict.fromkeys(["slow", "slow_buffer"], ("slow",)),
    "mu_product": ("product",),
    "trust_ratio": ("trust_ratio",),
}  # fmt: skip
# The momentum of some references has the opposite sign.
SIGNED = ("momentum", "momentum_buffer", "trace")


def test_cases_and_files_correspond() -> None:
    """Every case has a file of arrays, and every file has a case."""
    cases = recorded.cases()
    ids = [case.id for case in cases]
    assert ids == sorted(set(ids))
    assert ids == sorted(file.stem for file in Path(recorded.__file__).parent.glob("*.npz"))
    assert {case.origin for case in cases} == {"executed", "transcribed"}
    assert {case.dtype for case in cases} == {"float32", "float64"}
    assert {case.steps for case in cases} == {12}


@every_case
def test_a_case_has_all_its_arrays(case: recorded.Case) -> None:
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


def test_an_unknown_case_raises() -> None:
    with pytest.raises(ValueError, match="no recorded case 'lambo'"):
        recorded.get("lambo")


def _first_of_its_kind() -> list[str]:
    """Returns one case of each optimizer and one of each library that was recorded."""
    kinds: dict[str, str] = {}
    for case in recorded.cases():
        kinds.setdefault(f"{case.constructor} {case.inner is None}", case.id)
        kinds.setdefault(case.id.split("_")[0], case.id)
    return list(kinds.values())


@pytest.mark.parametrize(
    "case", cover.mostly_slow({case.id: case for case in recorded.cases()}, _first_of_its_kind())
)
def test_the_optimizer_follows_the_recorded_trajectory(case: recorded.Case) -> None:
    """Compares parameters after every step, and moments where they were recorded."""
    rtol, atol = case.rtol, case.atol
    if case.id in REFERENCE_NOISE:
        rtol, atol = REFERENCE_NOISE[case.id], REFERENCE_NOISE[case.id] * case.atol / case.rtol
    trajectory = case.load()
    for i, step in enumerate(steps(case, trajectory, jit=quick.jit)):
        _assert_close(step.params, trajectory.params[i], rtol, atol, f"parameters after step {i}")
        if i in case.extra_steps:
            for name in case.extras:
                _assert_state_close(name, step, trajectory.extras[name][i], rtol, atol)


@pytest.mark.parametrize("case_id", ["optax_lamb", "torch_sparseadam", "po_lamb_prenorm"])
def test_follow_reports_agreement_or_noise(case_id: str) -> None:
    followed = follow(recorded.get(case_id))
    assert followed.agrees == (case_id not in REFERENCE_NOISE)
    assert followed.agrees or followed.within_noise


@pytest.mark.parametrize(
    "case_id", ["bert_create_optimizer_nowarm", "bert_create_optimizer_warm",
                "mac_create_optimizer_warm", "ymcui_create_optimizer"],
)  # fmt: skip
def test_create_optimizer_has_the_recorded_learning_rates(case_id: str) -> None:
    case = recorded.get(case_id)
    trajectory = case.load()
    rates = [
        float(optim_zoo.metrics.read(step.state)["learning_rate"])
        for step in steps(case, trajectory, jit=quick.jit)
    ]
    # A few float32 roundings of 6e-8.
    np.testing.assert_allclose(rates, trajectory.per_step["lr"], rtol=5e-7)


def test_a_wrong_number_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference of twice the tolerance in one entry after the last step, or a NaN, is found."""
    case = recorded.get("optax_adamw")
    trajectory = case.load()
    ours = list(steps(case, trajectory, jit=quick.jit))
    monkeypatch.setattr(agreement, "steps", lambda *_: ours)
    monkeypatch.setattr(recorded.Case, "load", lambda _: trajectory)
    assert follow(case).agrees
    kernel = trajectory.params[-1]["dense"]["kernel"]
    right = kernel[0, 0]
    kernel[0, 0] += 2 * (case.rtol * abs(right) + case.atol)
    assert not follow(case).agrees
    assert follow(case).difference == pytest.approx(2 * case.rtol, rel=1e-3)
    kernel[0, 0] = np.nan
    assert not follow(case).agrees


def _assert_state_close(name: str, step: Any, expected: Any, rtol: float, atol: float) -> None:
    kept = _kept(name, step)
    if name == "trust_ratio":  # ours is float32; excluded leaves have the ratio 1
        rtol = max(rtol, 2e-7)
        kept = optim_zoo.tree.map_with_path(
            lambda path, _: kept.get(path, np.ones(())), step.params
        )
    if name == "mu_product":  # ours is one number for all leaves; the reference uses float32
        rtol, kept = 6e-8, jax.tree.map(lambda _: kept, expected)
    if name in SIGNED:
        paired = zip(jax.tree.leaves(kept), jax.tree.leaves(expected), strict=True)
        if sum(float(np.sum(x * y)) for x, y in paired) < 0:
            kept = jax.tree.map(np.negative, kept)
    _assert_close(kept, expected, rtol, atol, name)


def _kept(name: str, step: Any) -> Any:
    """Returns the field of our state that the reference calls ``name``."""
    for field in FIELDS[name]:
        for piece in _named_tuples(step.state):
            if getattr(piece, field, None) is not None:
                return getattr(piece, field)
    raise AssertionError(f"no {name} in {jax.tree.structure(step.state)}")


def _named_tuples(state: Any) -> Iterator[Any]:
    if isinstance(state, tuple):
        if hasattr(state, "_fields"):
            yield state
        for part in state:
            yield from _named_tuples(part)


def _assert_close(actual: Any, expected: Any, rtol: float, atol: float, what: str) -> None:
    optim_zoo.tree.map_with_path(
        lambda path, x, y: np.testing.assert_allclose(
            x, np.reshape(y, np.shape(x)), rtol, atol, err_msg=f"{what}: {path}"
        ),
        actual,
        expected,
    )
