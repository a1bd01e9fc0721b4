"""The faults of ``scripts/faults``: a job survives each without losing saved steps."""

import shutil
import signal
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from tests.scripts.importing import imported

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    with imported("faults", "main") as (module,):
        yield module


@pytest.fixture(scope="module")
def site(program: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Compiles without optimizations, because these runs spend most of their time compiling."""
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    work = tmp_path_factory.mktemp("faults")
    with program.Site(work, program.SMOKE, environment=quick) as site:
        yield site
    shutil.rmtree(work)  # hundreds of megabytes


@pytest.fixture
def outcome(request: pytest.FixtureRequest, program: Any, site: Any) -> dict[str, Any]:
    """Returns the record of the fault that the test names, and checks what all faults share."""
    record: dict[str, Any] = program.try_fault(site, request.param)
    if "skipped" in record:
        pytest.skip(record["skipped"])
    assert "failed" not in record, record
    assert set(record["same"]) == {"metrics", "parameters", "optimizer state"}
    assert all(record["same"].values()), record
    assert record["finite"] is True
    title, happens, lost = program.table([record]).splitlines()[-1][2:-2].split(" | ")
    assert title.startswith(record["title"])
    assert f"bit for bit equal at the end to {record['like']}" in happens
    assert lost.startswith(("at most", str(record["lost"])))
    return record


def fault(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("outcome", [name], indirect=True)


def assert_resumed(record: dict[str, Any], saved: int) -> None:
    """Checks that the next start resumed from the last complete save without an error."""
    assert (record["next_exit_code"], record["next_said"]) == (0, "")
    assert record["resumed_from"] == record["saved"] == saved


def assert_finished_and_resumed(record: dict[str, Any]) -> None:
    """Checks that the run finished, and that resuming from step 15 gives the same end."""
    assert (record["exit_code"], record["said"], record["made"]) == (0, "", 20)
    assert record["next_notes"] == []
    assert_resumed(record, 15)
    assert all(record["next_same"].values()), record


@slow
@fault("kills")
def test_kills_at_random_moments_lose_at_most_two_saves(outcome: dict[str, Any]) -> None:
    assert len(outcome["kills"]) == 20
    assert outcome["landed"] >= 18
    assert outcome["during"]["a save"] >= 5
    assert outcome["during"]["a start"] > 0
    assert outcome["from_the_last_whole"]
    # The save that the kill interrupts is lost. The one before it is complete, because a save only
    # begins when the previous one has ended.
    assert 0 < outcome["lost"] <= 2 * outcome["save_every"]
    assert (outcome["next_exit_code"], outcome["next_said"]) == (0, "")


@slow
@fault("sigterm")
def test_sigterm_loses_no_step(outcome: dict[str, Any]) -> None:
    assert outcome["exit_code"] == 128 + signal.SIGTERM
    assert outcome["said"].startswith(
        f"stopped by SIGTERM; step {outcome['saved']} is saved in run, "
    )
    assert outcome["lost"] == 0
    assert_resumed(outcome, outcome["made"])


@slow
@fault("full_disk")
def test_a_full_disk_during_a_save(outcome: dict[str, Any]) -> None:
    assert outcome["exit_code"] == 2
    assert outcome["said"].startswith(
        "cannot write a checkpoint to run/checkpoints: No space left on device; the last "
        "complete one is of step 5: make room, "
    )
    assert_resumed(outcome, 5)
    # A failed save is noticed at the next save at the latest.
    assert 5 <= outcome["lost"] <= 10


@slow
@fault("full_disk_between")
def test_a_full_disk_between_two_saves(outcome: dict[str, Any]) -> None:
    assert outcome["exit_code"] == 2
    assert "No space left on device" in outcome["said"]
    assert not outcome["said"].startswith("no sentence")
    assert_resumed(outcome, outcome["saved"])
    assert outcome["saved"] >= 5
    assert outcome["lost"] <= 10


@slow
@fault("truncated")
def test_a_truncated_checkpoint(outcome: dict[str, Any]) -> None:
    assert_fell_back(outcome)


@slow
@fault("flipped_byte")
def test_a_flipped_byte_in_a_checkpoint(outcome: dict[str, Any]) -> None:
    assert_fell_back(outcome)


def assert_fell_back(record: dict[str, Any]) -> None:
    (note,) = record["next_notes"]
    assert note.startswith("the checkpoint of step 20 is damaged (")
    assert note.endswith(") and was moved to run/damaged/20; resuming from step 15")
    assert_resumed(record, 15)
    assert record["lost"] == 5


@slow
@fault("two_jobs")
def test_two_jobs_on_one_folder(outcome: dict[str, Any]) -> None:
    assert outcome["exit_code"] == 2
    assert outcome["said"].startswith("another process trains in run: ")
    assert 0 < outcome["first_at"] < 400
    assert (outcome["first_exit_code"], outcome["first_said"], outcome["lost"]) == (0, "", 0)


@slow
@fault("nan_micro_batch")
def test_nan_in_one_micro_batch(outcome: dict[str, Any]) -> None:
    assert_finished_and_resumed(outcome)
    assert (outcome["left_out"], outcome["skipped_steps"], outcome["lost"]) == (1, [], 0)


@slow
@pytest.mark.parametrize(
    "outcome",
    [f"nan_one_device_{mode}" for mode in ("jit", "zero1", "shard_map", "pmap")],
    indirect=True,
)
def test_nan_in_the_gradient_of_one_device(outcome: dict[str, Any]) -> None:
    assert_finished_and_resumed(outcome)
    assert (outcome["skipped_steps"], outcome["lost"]) == ([8], 1)


@slow
@fault("nan_step")
def test_nan_in_one_step(outcome: dict[str, Any]) -> None:
    assert_finished_and_resumed(outcome)
    assert (outcome["skipped_steps"], outcome["lost"]) == ([8], 1)


@slow
@fault("infinite_loss")
def test_an_infinite_loss_for_ten_steps(outcome: dict[str, Any]) -> None:
    assert_finished_and_resumed(outcome)
    assert (outcome["skipped_steps"], outcome["lost"]) == ([*range(8, 18)], 10)


@slow
@fault("infinite_loss_ends")
def test_an_infinite_loss_for_more_steps_than_the_limit(outcome: dict[str, Any]) -> None:
    assert outcome["exit_code"] == 2
    assert outcome["said"].startswith("up to step 12, 5 steps in a row were skipped, ")
    assert "; step 10 is saved: " in outcome["said"]
    assert outcome["skipped_steps"] == [*range(8, 13)]
    assert_resumed(outcome, 10)
    assert outcome["lost"] == 2


@slow
@fault("clock")
def test_a_clock_that_jumps(outcome: dict[str, Any]) -> None:
    assert_finished_and_resumed(outcome)
    assert outcome["days_off"] == [-1, 1, 1]
    assert outcome["rates_are_positive"]
    assert outcome["lost"] == 0


# The table reports outcomes, including wrong ones


def sigterm_record(**changes: Any) -> dict[str, Any]:
    return {
        "title": "SIGTERM",
        "variant": "",
        "exit_code": 143,
        "said": "stopped",
        "resumed_from": 9,
        "next_exit_code": 0,
        "next_said": "",
        "next_notes": [],
        "lost": 0,
        "like": "an unbroken run",
        "same": {"metrics": True, "parameters": True, "optimizer state": True},
        "finite": True,
        **changes,
    }


EQUAL = "bit for bit equal at the end to an unbroken run"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            f'| SIGTERM | exit 143, "stopped"; the next start resumes from step 9; {EQUAL} | 0 |',
        ),
        (
            {"exit_code": -11, "said": "no sentence: 'x | y'", "lost": 9, "variant": "pmap"},
            "| SIGTERM (pmap) | exit -11, \"no sentence: 'x \\| y'\"; the next start resumes from "
            f"step 9; {EQUAL} | 9 |",
        ),
        (
            {
                "next_notes": ["moved", "other cores"],
                "same": {"metrics": False, "parameters": False, "optimizer state": True},
            },
            '| SIGTERM | exit 143, "stopped"; the next start says "moved" and says "other cores" '
            "and resumes from step 9; metrics and parameters differ at the end from an unbroken "
            "run | 0 |",
        ),
        (
            {"next_exit_code": 2, "next_said": "no", "same": {}, "finite": None},
            '| SIGTERM | exit 143, "stopped"; the next start: exit 2, "no"; nothing can be '
            "compared with an unbroken run; no parameters | 0 |",
        ),
        (
            {"finite": False, "skipped_steps": [3, 5], "next_same": {"metrics": False}},
            f'| SIGTERM | exit 143, "stopped"; skipped steps: 3, 5; {EQUAL}; parameters are not '
            "finite; resumed from step 9: metrics differ at the end from before | 0 |",
        ),
        ({"skipped": "no root"}, "| SIGTERM | not known: no root | ? |"),
        ({"failed": "it is stuck"}, "| SIGTERM | not known: it is stuck | ? |"),
    ],
)
def test_the_table_shows_each_outcome(program: Any, changes: dict[str, Any], expected: str) -> None:
    assert program.table([sigterm_record(**changes)]).splitlines()[2:] == [expected]


def test_variants_with_equal_outcomes_share_a_row(program: Any) -> None:
    modes = [sigterm_record(variant=mode) for mode in ("jit", "pmap")]
    other = sigterm_record(variant="shard_map", lost=1)
    _, _, both, alone = program.table([*modes, other]).splitlines()
    assert both.startswith("| SIGTERM (jit; pmap) |")
    assert alone.startswith("| SIGTERM (shard_map) |")


def test_an_unknown_fault_is_refused(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["nothing"])
    assert "nothing: not one of kills, sigterm, " in capsys.readouterr().err
