"""The order of the runs, resuming, and the table, with a fake runner and once with processes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from optim_zoo.cli import main
from optim_zoo.errors import UserError
from optim_zoo.lab import results, sweep
from optim_zoo.lab.sweep_file import Sweep
from optim_zoo.lab.trials import Trial
from tests.lab.conftest import Load
from tests.lab.fake_runner import FakeRunner

GRID = """
[grid]
schedule.learning_rate = [0.1, 1.0, 10.0]
run.seed = [0, 1]
"""


def loss(trial: Trial) -> float:
    return abs(trial.rate - 2) + trial.seed


def run(described: Sweep, runner: FakeRunner) -> list[dict[str, Any]]:
    return sweep.run(described, lambda line: None, runner)


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_the_table_has_one_flat_row_for_each_run(load: Load) -> None:
    described = load(GRID)
    rows = run(described, FakeRunner(described.folder, loss))
    assert rows == read(described.folder)
    assert [(row["learning_rate"], row["seed"]) for row in rows] == [
        (rate, seed) for rate in (0.1, 1.0, 10.0) for seed in (0, 1)
    ]
    first = rows[0]
    assert first["loss"] == first["best_loss"] == pytest.approx(1.9)
    assert first["best_accuracy"] == 0.54
    assert first["schedule.learning_rate"] == 0.1
    assert (first["status"], first["steps"], first["examples"]) == ("finished", 4, 32)
    assert not any(isinstance(value, list | dict) for row in rows for value in row.values())


def test_a_sweep_that_was_stopped_ends_with_the_same_table(load: Load, tmp_path: Path) -> None:
    whole = load(GRID, "dir=whole")
    expected = run(whole, FakeRunner(whole.folder, loss))
    described = load(GRID)
    for stop_after in (0, 1, 2):
        with pytest.raises(KeyboardInterrupt):
            run(described, FakeRunner(described.folder, loss, stop_after))
    last = FakeRunner(described.folder, loss)
    rows = run(described, last)
    assert len(last.ran) == 3
    assert timeless(rows) == timeless(expected)


def test_a_failed_run_is_recorded_and_repeated_only_on_request(load: Load) -> None:
    described = load(GRID)

    def failing(trial: Trial) -> float:
        return 1 / 0 if trial.rate == 1.0 else 0.0

    rows = run(described, FakeRunner(described.folder, failing))
    failed = [row for row in rows if row["status"] == "failed"]
    assert len(rows) == 6
    assert [(row["exit_code"], row["message"]) for row in failed] == [(2, "it failed")] * 2
    assert run(described, again := FakeRunner(described.folder, loss)) == rows
    assert again.ran == []
    retried = load(GRID, "retry=true")
    rows = run(retried, again := FakeRunner(described.folder, loss))
    assert len(again.ran) == 2
    assert {row["status"] for row in rows} == {"finished"}


def test_a_changed_sweep_runs_what_is_new_and_leaves_out_what_is_gone(load: Load) -> None:
    described = load(GRID)
    run(described, FakeRunner(described.folder, loss))
    changed = load(GRID.replace("[0.1, 1.0, 10.0]", "[1.0, 3.0]"))
    runner = FakeRunner(changed.folder, loss)
    rows = run(changed, runner)
    assert [trial.rate for trial in runner.ran] == [3.0, 3.0]
    assert [row["learning_rate"] for row in rows] == [1.0, 1.0, 3.0, 3.0]


def test_a_changed_config_is_refused_with_the_key(load: Load, tmp_path: Path) -> None:
    described = load(GRID)
    run(described, FakeRunner(described.folder, loss))
    base = tmp_path / "base.toml"
    base.write_text(base.read_text().replace("batch_size = 8", "batch_size = 16"))
    with pytest.raises(UserError, match=r"has changed.*train.batch_size: 8 -> 16.*dir="):
        run(load(GRID), FakeRunner(described.folder, loss))


def test_the_folder_of_another_sweep_or_run_is_refused(load: Load, tmp_path: Path) -> None:
    described = load(GRID, "dir=there")
    run(described, FakeRunner(described.folder, loss))
    with pytest.raises(UserError, match=r"holds the sweep .*trial.toml"):
        run(load(GRID, "dir=there", name="other.toml"), FakeRunner(described.folder, loss))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="is the folder of a training run"):
        run(load(GRID, "dir=run"), FakeRunner(described.folder, loss))


def test_two_sweeps_cannot_use_one_folder(load: Load) -> None:
    described = load(GRID)

    def second(trial: Trial) -> float:
        with pytest.raises(UserError, match="another sweep is running"):
            run(described, FakeRunner(described.folder, loss))
        raise ZeroDivisionError

    rows = run(described, FakeRunner(described.folder, second))
    assert len(rows) == 6


def test_a_metric_that_the_task_does_not_have_is_named(load: Load) -> None:
    described = load('metric = "f1"\n' + GRID)
    with pytest.raises(UserError, match="no held-out metric 'f1'; it has loss, accuracy"):
        run(described, FakeRunner(described.folder, loss))


SEARCH = """
[search]
learning_rates = [0.1, 1.0, 10.0]
runs = 6
seeds = [3, 4]
[grid]
[[grid.optimizer]]
name = "lars"
[[grid.optimizer]]
name = "lamb"
learning_rate = [0.001, 0.01]
"""


def test_a_search_gives_every_optimizer_the_same_budget_and_the_best_all_seeds(load: Load) -> None:
    described = load(SEARCH)

    def loss(trial: Trial) -> float:  # best at 2 for lars; lamb always wants a larger rate
        return abs(trial.rate - 2) if trial.optimizer == "lars" else 1 / trial.rate

    rows = run(described, FakeRunner(described.folder, loss))
    searched = [row for row in rows if row["seed"] == 3]
    for optimizer in ("lars", "lamb"):
        rates = [row["learning_rate"] for row in searched if row["optimizer"] == optimizer]
        assert len(set(rates)) == len(rates) == 6
    best = min((r for r in searched if r["optimizer"] == "lars"), key=lambda row: row["loss"])
    others = [row for row in rows if row["seed"] == 4]
    # The best rate of lamb is at the edge of what was tried, so that it is no best rate.
    assert [(r["optimizer"], r["learning_rate"]) for r in others] == [
        ("lars", best["learning_rate"])
    ]
    assert run(described, again := FakeRunner(described.folder, loss)) == rows
    assert again.ran == []


PROCESSES = """
jobs = 2
[grid]
run.seed = [0]
[[grid.optimizer]]
name = "lars"
learning_rate = [0.1]
[[grid.optimizer]]
name = "sgd"
learning_rate = [1e30]
[overrides]
guards.max_consecutive = 1
"""


@pytest.mark.usefixtures("compiled")
def test_processes_train_and_a_run_that_diverges_is_recorded(
    load: Load, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    load(PROCESSES)
    assert main(["sweep", "trial.toml"]) == 0
    rows = read(Path("runs/trial"))
    assert [row["status"] for row in rows] == ["finished", "diverged"]
    assert rows[0]["steps"] == 4
    assert "schedule.learning_rate" in rows[1]["message"]
    assert "1 finished, 1 diverged" in capsys.readouterr().out
    assert main(["sweep", "trial.toml"]) == 0
    assert read(Path("runs/trial")) == rows


def test_the_exit_code_says_whether_a_run_resumes(tmp_path: Path) -> None:
    assert results.of_process(tmp_path, 143, 1.0) is None
    ended = results.of_process(tmp_path, 2, 1.0)
    assert ended is not None
    assert ended.status == "failed"  # no step was logged
    killed = results.of_process(tmp_path, -9, 1.0)
    assert killed is not None
    assert killed.message == "ended by signal 9"


WAITING = """
import signal, sys
from pathlib import Path
from optim_zoo.lab import processes
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
code = "import time, pathlib; pathlib.Path('started').touch(); time.sleep(600)"
command = processes.Command([sys.executable, "-c", code], Path("."))
try:
    processes.run([command, command], 1, lambda command, code, seconds: print(code, flush=True))
except processes.Interrupted as stopped:
    print("stopped", stopped.signal_number)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_sweep_ends_the_runs(tmp_path: Path, number: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", WAITING], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    while not (tmp_path / "started").exists():
        assert parent.poll() is None
        time.sleep(0.02)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(children) == 1
    parent.send_signal(number)
    output, _ = parent.communicate(timeout=60)
    expected = "" if number == signal.SIGKILL else f"-15\nstopped {number.value}\n"
    assert output == expected
    deadline = time.monotonic() + 30
    while Path(f"/proc/{children[0]}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{children[0]}").exists()
