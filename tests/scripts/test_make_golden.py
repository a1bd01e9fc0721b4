"""The installed reference optimizers still give the recorded trajectories."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from optim_zoo import recorded
from tests.scripts.importing import imported

with imported("recordings", "make_golden") as (make_golden,):
    pass  # not a fixture, because a test is parametrized over the cases of the module

# pytorch_optimizer always sums the squares of the global gradient norm in float32, so its clipping
# factor depends on the order of the six leaves: 316 of 720 orders give the recorded factor of the
# last step, and the others the next float32, 1.0e-7 away. Cancellation in exp_avg makes it 7.3e-7.
TOLERANCES = {"po_lamb_prenorm": 1e-6}


# Prefixes of the ids of the cases that were recorded from a library
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
def test_the_cases_of_every_library_are_found(library: str) -> None:
    """Fails if the cases of a library are no longer found by their ids."""
    covered = [case.id for case in make_golden.covered() if make_golden.library(case) == library]
    assert covered
    prefix = PREFIXES[library]
    assert covered == [case.id for case in recorded.cases() if case.id.startswith(prefix)]


@pytest.mark.references
@pytest.mark.parametrize("case", make_golden.covered(), ids=lambda case: case.id)
def test_each_reference_gives_the_recorded_trajectory(case: recorded.Case) -> None:
    reason = make_golden.LIBRARIES[make_golden.library(case)].unusable()
    if reason:
        pytest.skip(reason)
    line = make_golden.comparison(case, make_golden.regenerate(case))
    assert line["largest_difference"] <= TOLERANCES.get(case.id, case.rtol), line


@pytest.mark.parametrize(("factor", "agrees"), [(0.5, True), (2.0, False), (np.nan, False)])
def test_the_comparison_finds_one_wrong_number(factor: float, agrees: bool) -> None:
    """The tolerance is rtol |expected| + atol."""
    case = recorded.get("optax_adamw")  # optax is always installed
    trajectory = case.load()
    last = dict(trajectory.params[-1])
    last["embed"] = last["embed"].copy()
    last["embed"][0, 0] += factor * (case.rtol * abs(last["embed"][0, 0]) + case.atol)
    wrong = dataclasses.replace(trajectory, params=(*trajectory.params[:-1], last))
    assert make_golden.comparison(case, wrong)["agrees"] == agrees


def test_the_arrays_equal_those_of_the_recorded_file() -> None:
    case = recorded.get("torch_adamw_sched")
    file = Path(recorded.__file__).parent / f"{case.id}.npz"
    made = make_golden.arrays(case.load())
    with np.load(file) as archive:
        assert set(made) == set(archive)
        for key, x in archive.items():
            np.testing.assert_array_equal(made[key], x)
