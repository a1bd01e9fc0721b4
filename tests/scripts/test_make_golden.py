"""The installed reference optimizers still give the recorded trajectories."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from optim_zoo import recorded
from tests.scripts.importing import imported

with imported("recordings", "make_golden") as (make_golden,):
    pass  # a module, not a fixture, because a test is parametrized over its cases

# pytorch_optimizer sums the squares of the global gradient norm in float32, whatever the gradients
# are. Of the 720 orders of the six leaves 316 give the clipping factor of the recorded last step,
# the others the neighbouring float32, 1.0e-7 away; cancellation in exp_avg makes that 7.3e-7.
TOLERANCES = {"po_lamb_prenorm": 1e-6}


# The ids of the cases recorded from a library begin with:
PREFIXES = {
    "torch": "torch_",
    "timm": "timm_",
    "pytorch_optimizer": "po_",
    "keras": "keras_",
    "optax": "optax_",
}


def test_every_library_is_covered() -> None:
    assert make_golden.LIBRARIES.keys() == PREFIXES.keys()


@pytest.mark.parametrize("library", PREFIXES)
def test_covered_cases(library: str) -> None:
    """By their ids, so that a library whose cases are no longer found fails."""
    covered = [case.id for case in make_golden.covered() if make_golden.library(case) == library]
    assert covered
    prefix = PREFIXES[library]
    assert covered == [case.id for case in recorded.cases() if case.id.startswith(prefix)]


@pytest.mark.references
@pytest.mark.parametrize("case", make_golden.covered(), ids=lambda case: case.id)
def test_reference_gives_the_recorded_trajectory(case: recorded.Case) -> None:
    reason = make_golden.LIBRARIES[make_golden.library(case)].unusable()
    if reason:
        pytest.skip(reason)
    line = make_golden.comparison(case, make_golden.regenerate(case))
    assert line["largest_difference"] <= TOLERANCES.get(case.id, case.rtol), line


@pytest.mark.parametrize(("factor", "agrees"), [(0.5, True), (2.0, False), (np.nan, False)])
def test_comparison_sees_one_wrong_number(factor: float, agrees: bool) -> None:
    """Where |expected| is large, the tolerance is rtol |expected| + atol."""
    case = recorded.get("optax_adamw")  # optax is installed wherever tests run
    trajectory = case.load()
    last = dict(trajectory.params[-1])
    last["embed"] = last["embed"].copy()
    last["embed"][0, 0] += factor * (case.rtol * abs(last["embed"][0, 0]) + case.atol)
    wrong = dataclasses.replace(trajectory, params=(*trajectory.params[:-1], last))
    assert make_golden.comparison(case, wrong)["agrees"] == agrees


def test_arrays_are_those_of_the_recorded_file() -> None:
    case = recorded.get("torch_adamw_sched")
    file = Path(recorded.__file__).parent / f"{case.id}.npz"
    made = make_golden.arrays(case.load())
    with np.load(file) as archive:
        assert set(made) == set(archive)
        for key, x in archive.items():
            np.testing.assert_array_equal(made[key], x)
