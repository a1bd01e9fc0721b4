"""The script that compares the wrappers of this package with those of optax.

If an assertion about optax fails, optax has changed, and the README's table must be regenerated.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import optax
import pytest

from optim_zoo import registry
from tests.scripts.importing import imported

pytestmark = pytest.mark.usefixtures("quick_to_compile")

EVERY = 4  # micro-batches per step

Figures = Mapping[str, Any]


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with imported("bench", "against_optax") as (module,):
        yield module


@pytest.fixture
def figures(script: Any) -> Callable[[str], Figures]:
    """Returns a function that runs an experiment by name and returns its measurements."""
    experiments = {experiment.__name__: experiment for experiment in script.EXPERIMENTS}
    return lambda name: experiments[name]().figures


def test_accumulate_skips_a_nan_micro_batch(figures: Callable[[str], Figures]) -> None:
    seen = figures("nan_micro_batch")
    assert seen["ours_finite_steps"] == seen["steps"]
    assert seen["ours_micro_batches"] == EVERY
    assert seen["optax_finite_steps"] == 0
    # When optax skips a micro-batch it does not count it, so the step needs one more.
    assert seen["optax_skipping_finite_steps"] == seen["steps"]
    assert seen["optax_skipping_micro_batches"] == EVERY + 1


def test_the_inner_update_is_executed_once_per_step(figures: Callable[[str], Figures]) -> None:
    seen = figures("inner_calls")
    assert seen["ours_calls"] == seen["steps"]
    assert seen["optax_calls"] == EVERY * seen["steps"]


def test_accumulate_weights_every_token_equally(figures: Callable[[str], Figures]) -> None:
    seen = figures("token_weights")
    # Sums of a few float32 numbers have relative errors of about 1e-7.
    assert seen["ours_percent"] < 1e-4
    assert seen["optax_percent"] > 10


def test_accumulate_passes_the_mean_in_float32(figures: Callable[[str], Figures]) -> None:
    seen = figures("low_precision_mean")
    # The sum of four bfloat16 numbers between 1 and 2 and its quarter are exact in float32.
    assert seen["ours_error"] == 0
    # bfloat16 numbers between 1 and 2 are 2^-7 apart, so rounding changes them by 2^-8 at most.
    assert 1e-3 < seen["optax_error"] <= 2**-8


def test_small_updates_change_bfloat16_parameters(figures: Callable[[str], Figures]) -> None:
    seen = figures("small_steps")
    # Two runs with a thousand float32 roundings of at most 2^-25 each differ by 6e-5 at most.
    assert seen["ours_master_weights_end"] == pytest.approx(seen["float32_end"], abs=6e-5)
    deviation = seen["ours_stochastic_rounding_deviation"]
    # A thousand random roundings to multiples of 2^-8 have a standard deviation of at most
    # 2^-9 sqrt(1000) = 0.062.
    assert 0 < deviation < 0.062
    # The limit is four standard deviations of a mean of 1,024 values.
    ends = seen["ours_stochastic_rounding_end"], seen["float32_end"]
    assert abs(ends[0] - ends[1]) < 4 * deviation / 32
    assert seen["optax_end"] == 1


def test_a_bfloat16_second_moment_follows_its_mean(figures: Callable[[str], Figures]) -> None:
    seen = figures("second_moment")
    assert 0 < seen["ours_deviation"] < 0.05
    # The limit is four standard deviations of a mean of 1,024 values.
    assert abs(seen["ours_share"] - 1) < 4 * seen["ours_deviation"] / 32
    assert seen["optax_share"] < 0.6


def test_states_keep_their_dtypes(script: Any, figures: Callable[[str], Figures]) -> None:
    seen = figures("state_dtypes")
    assert seen["ours_failing"] == []
    assert seen["ours_optimizers"] == len(registry.OPTIMIZERS)
    passing = {"adafactor", "fromage", "sign_sgd"}
    assert set(seen["optax_failing"]) == set(script.precision.OPTAX_OPTIMIZERS) - passing


def test_consecutive_nans_never_change_the_parameters(figures: Callable[[str], Figures]) -> None:
    seen = figures("nans_in_a_row")
    assert seen["ours_first_change"] is None
    assert seen["ours_check_raises_after"] == [3, 4]
    assert seen["optax_first_change"] == 4
    assert seen["optax_parameters_nan"]


def test_all_devices_skip_a_step_that_is_nan_on_one(figures: Callable[[str], Figures]) -> None:
    seen = figures("nan_on_one_device")
    assert seen["devices"] == 8
    assert seen["ours_moved"] == {"pmap": 0, "shard_map": 0}
    assert seen["optax_moved"] == {"pmap": 7, "shard_map": 7}


def test_a_spike_is_skipped_and_no_other_step(figures: Callable[[str], Figures]) -> None:
    seen = figures("spike")
    assert seen["ours_refused"]
    assert seen["ours_others"] == 0
    # No limit of optax's wrapper does both.
    assert not seen["optax_first_bound_refused"]
    assert seen["optax_last_bound_refused"]
    assert seen["optax_last_bound_others"] > 100


def test_a_skipped_step_changes_no_bit(figures: Callable[[str], Figures]) -> None:
    seen = figures("negative_zero")
    assert seen["ours_changed"] == {"skip_nonfinite": False, "accumulate": False}
    assert seen["optax_changed"] == {"apply_if_finite": True, "MultiSteps": True}


def test_metrics_can_be_read_in_scan(figures: Callable[[str], Figures]) -> None:
    seen = figures("metrics_in_scan")
    assert seen["ours_raises"] == ""
    assert {"gradient_norm", "update_norm/bias", "parameter_norm/kernel"} < set(seen["ours_values"])
    assert seen["optax_raises"] == {"monitor": "TypeError", "snapshot": ""}


def test_the_script_prints_json_lines_and_a_table(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        script, "EXPERIMENTS", [script.accumulation.inner_calls, script.accumulation.token_weights]
    )
    script.main(["--table"])
    *lines, header, rule, calls, weights = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["what"] for line in lines] == ["inner_calls", "token_weights"]
    assert json.loads(lines[0])["optax_calls"] == 20
    assert header == f"| situation | optax {optax.__version__} | optim_zoo |"
    assert rule == "|---|---|---|"
    assert calls.endswith("| `MultiSteps`: 20 | `accumulate`: 5 |")
    assert [row.count("|") for row in (calls, weights)] == [4, 4]


def test_every_experiment_is_in_the_table(script: Any) -> None:
    rows = [
        function
        for module in vars(script).values()
        if isinstance(module, ModuleType) and module.__name__.startswith("experiments.")
        for function in vars(module).values()
        if getattr(function, "__annotations__", {}).get("return") is script.Row
    ]
    assert set(rows) == set(script.EXPERIMENTS)
