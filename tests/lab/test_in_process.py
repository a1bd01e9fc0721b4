"""Training a sweep in one process: the same table as by one run at a time, and what is refused."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from optim_zoo.errors import UserError
from optim_zoo.lab import in_process, results, sweep
from optim_zoo.lab.processes import ERRORS, Interrupted
from optim_zoo.lab.results import Outcome
from optim_zoo.lab.trials import Trial, folder_of, grid
from optim_zoo.train import config_file, loop
from optim_zoo.train.tasks.digits import Digits
from tests.lab.conftest import Load
from tests.lab.test_sweep import read, timeless
from tests.train.tasks.token_tagging.small_text import write_tagged_text

pytestmark = pytest.mark.usefixtures("quick_to_compile")

GRID = """
in_process = true
[overrides]
guards.max_consecutive = 1
[grid]
run.seed = [0, 1]
[[grid.optimizer]]
name = "lamb"
learning_rate = [0.1]
weight_decay = { grid = [0.0, 0.1] }
[[grid.optimizer]]
name = "sgd"
learning_rate = [0.5, 1e30]
"""


LAMB = """
in_process = true
[overrides]
guards.max_consecutive = 1
[grid]
run.seed = [0, 1]
[[grid.optimizer]]
name = "lamb"
weight_decay = { grid = [0.0, 0.1] }
learning_rate = [0.1, 1e30]
"""

SGD = """
in_process = true
[grid]
run.seed = [0, 1]
[[grid.optimizer]]
name = "sgd"
learning_rate = [0.5]
"""


class OneAtATime:
    """Trains some of the runs alone, by the loop of a training job."""

    def __init__(self, folder: Path, chosen: Callable[[Trial], bool]) -> None:
        self.folder, self.chosen = folder, chosen

    def __call__(
        self, trials: Sequence[Trial], ended: Callable[[Trial, Outcome | None], Any]
    ) -> None:
        for trial in filter(self.chosen, trials):
            folder = folder_of(self.folder, trial)
            code = 0
            try:
                loop.run(trial.config, folder)
            except UserError as error:
                code = results.USER_ERROR
                (folder / ERRORS).write_text(f"optim-zoo: {error}\n")
            ended(trial, results.of_process(folder, code, 1.0))


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets these processes of eight devices train on one of them."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(jax, "devices", lambda: devices)


def run(load: Load, text: str = GRID, *arguments: str, **options: Any) -> list[dict[str, Any]]:
    return sweep.run(load(text, *arguments), lambda line: None, **options)


@pytest.mark.usefixtures("one_device")
def test_one_process_for_all_runs_ends_with_the_table_of_one_run_at_a_time(load: Load) -> None:
    every = run(load, LAMB)
    assert every == read(Path("runs/trial"))
    assert [row["status"] for row in every] == (["finished"] * 2 + ["diverged"] * 2) * 2
    losses = [row["loss"] for row in every if row["status"] == "finished"]
    assert len(set(losses)) == 4  # no two runs are one

    def chosen(trial: Trial) -> bool:
        return trial.seed == 1 and trial.keys["optimizer.weight_decay"] == 0.1

    alone = run(load, LAMB, "dir=alone", runner=OneAtATime(Path("alone"), chosen))
    together = [row for row in every if row["run"] in {other["run"] for other in alone}]
    assert [row["status"] for row in alone] == ["finished", "diverged"]
    assert [row.keys() for row in together] == [row.keys() for row in alone]
    for one, other in zip(timeless(together), timeless(alone), strict=True):
        for key, value in one.items():
            if not isinstance(value, float):
                # Runs that are trained together save no checkpoint, which the message says.
                saved = re.sub(r"step \d+ is saved", "no checkpoint was saved", str(other[key]))
                assert str(value) == saved, key
            else:
                # float32: the matrix products add in another order under vmap.
                np.testing.assert_allclose(value, other[key], rtol=1e-5, err_msg=key)
    for row in alone:
        files = [
            Path(name, "runs", row["run"], "metrics.jsonl") for name in ("runs/trial", "alone")
        ]
        metrics = [list(map(json.loads, file.read_text().splitlines())) for file in files]
        kinds = [[(each["kind"], each["step"]) for each in lines] for lines in metrics]
        assert kinds[0] == kinds[1]
        assert metrics[1][0].keys() - metrics[0][0].keys() == {"images_per_second"}


@pytest.mark.slow  # three BERTs to compile
@pytest.mark.usefixtures("one_device")
def test_fine_tuning_runs_start_from_the_same_pretrained_model(load: Load, tmp_path: Path) -> None:
    config = write_tagged_text(tmp_path)
    loop.run(config_file.load(config, ["train.steps=2"]), tmp_path / "pretrained")
    sizes = r"(num_layers|hidden_size|num_heads|intermediate_size|max_positions|vocabulary) = .*\n"
    start = f'[model]\ninit_from = "{tmp_path / "pretrained"}"\n'
    config.write_text(re.sub(sizes, "", config.read_text()).replace("[model]\n", start))
    text = """config = "tag.toml"
in_process = true
[grid]
schedule.learning_rate = [0.0, 0.02, 0.04]
run.seed = [0]
"""
    every = run(load, text)
    alone = run(load, text, "dir=alone", runner=OneAtATime(Path("alone"), lambda trial: True))
    assert [row["status"] for row in every] == ["finished"] * 3
    # float32: the matrix products add in another order under vmap.
    for key in ("loss", "accuracy"):
        losses = [[row[key] for row in rows] for rows in (every, alone)]
        np.testing.assert_allclose(*losses, rtol=1e-5, err_msg=key)
    assert len({row["loss"] for row in every}) == 3


def test_groups_differ_in_more_than_a_few_numbers(load: Load) -> None:
    text = GRID.replace("[grid]\n", "[grid]\ntrain.batch_size = [4, 8]\n")
    found = in_process.groups(grid(load(text + "momentum = { grid = [0.0, 0.5] }\n")))
    described = [
        ({t.optimizer for t in group}, {t.batch_size for t in group}, len(group)) for group in found
    ]
    assert described == [
        ({"lamb"}, {4}, 4), ({"lamb"}, {8}, 4),
        ({"sgd"}, {4}, 4), ({"sgd"}, {8}, 4), ({"sgd"}, {4}, 4), ({"sgd"}, {8}, 4),
    ]  # fmt: skip


@pytest.mark.usefixtures("one_device")
def test_a_stopped_sweep_trains_the_groups_that_have_not_ended(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []

    def train(configs: Any, folders: Sequence[Path], *more: Any) -> list[None]:
        trained.append(len(folders))
        for folder in folders:
            assert not (folder / "outcome.json").exists()
            (folder / "metrics.jsonl").write_text('{"kind": "held_out", "step": 4, "loss": 1.0}\n')
        return [None] * len(folders)

    monkeypatch.setattr(in_process.together, "train", train)
    rows = run(load)
    assert trained == [4, 4]
    assert run(load) == rows
    (Path("runs/trial/runs") / rows[-1]["run"] / "outcome.json").unlink()
    assert timeless(run(load)) == timeless(rows)
    assert trained == [4, 4, 4]


@pytest.mark.usefixtures("one_device")
def test_a_group_that_fails_is_recorded_and_the_rest_continues(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(configs: Any, folders: Sequence[Path], *more: Any) -> list[None]:
        if configs[0].optimizer.name == "lamb":
            raise ZeroDivisionError("a bug in the task")
        for folder in folders:
            (folder / "metrics.jsonl").write_text('{"kind": "held_out", "step": 4, "loss": 1.0}\n')
        return [None] * len(folders)

    monkeypatch.setattr(in_process.together, "train", train)
    rows = run(load)
    assert [row["status"] for row in rows[:4]] == ["failed"] * 4
    assert {row["message"] for row in rows[:4]} == {"ZeroDivisionError: a bug in the task"}
    assert {row["exit_code"] for row in rows[:4]} == {1}
    assert [row["status"] for row in rows[4:]] == ["finished"] * 4


@pytest.mark.usefixtures("one_device")
def test_a_signal_stops_between_two_steps(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training itself is replaced: it asks for signals until one arrives."""

    def train(configs: Any, folders: Any, values: Any, check_signals: Callable[[], None]) -> None:
        signal.raise_signal(signal.SIGTERM)
        for _ in range(1000):
            check_signals()
            threading.Event().wait(0.001)

    monkeypatch.setattr(in_process.together, "train", train)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        run(load)
    assert signal.getsignal(signal.SIGTERM) == before
    assert read(Path("runs/trial")) == []


@pytest.mark.usefixtures("one_device")
def test_a_task_whose_loss_depends_on_the_seed_is_refused(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seeded(Digits):
        def measure(self, params: Any, batch: Any) -> Any:
            batch = {**batch, "pixels": batch["pixels"] + self.setup.seed}
            return super().measure(params, batch)

    monkeypatch.setattr("optim_zoo.train.config_file.tasks.find", lambda name: Seeded)
    rows = run(load, SGD)
    assert [row["status"] for row in rows] == ["failed"] * 2
    assert "through the batches alone" in rows[0]["message"]


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.micro_batches", "2"),
        ("train.noise_scale", "true"),
        ("accumulation.every", "2"),
        ("averaging.decay", "0.9"),
        ("precision.parameters", "bfloat16"),
        ("precision.state", '{nu = "bfloat16"}'),
        ("output.keep_best", "loss"),
        ("output.sinks", '["progress"]'),
        ("parallel.mode", "pmap"),
        ("parallel.zero1", "true"),
    ],
)
def test_what_only_a_process_of_its_own_has_is_refused(load: Load, key: str, value: str) -> None:
    name = "[precision]" if key.startswith("precision") else key
    with pytest.raises(UserError) as caught:
        run(load, GRID, f"{key}={value}")
    assert str(caught.value).startswith(f"trial.toml: in_process=true trains without {name}, ")
    assert not Path("runs").exists()


@pytest.mark.usefixtures("one_device")
def test_stages_are_refused(load: Load, tmp_path: Path) -> None:
    with (tmp_path / "base.toml").open("a") as file:
        file.write("[[stages]]\nsteps = 2\n[[stages]]\nsteps = 2\n")
    with pytest.raises(UserError, match=r"trains without several \[\[stages\]\]"):
        run(load)


def test_several_devices_are_refused(load: Load) -> None:
    with pytest.raises(UserError, match="trains on one device, and this process has 8"):
        run(load)


@pytest.mark.usefixtures("one_device")
def test_a_run_with_a_checkpoint_is_refused(load: Load) -> None:
    described = load(GRID)
    trial = grid(described)[0]
    (folder_of(described.folder, trial) / "checkpoints" / "2").mkdir(parents=True)
    with pytest.raises(UserError, match="has a checkpoint, from which in_process=true cannot"):
        run(load)


KILLED = """
jobs = 1
[overrides]
train.steps = 400
output.checkpoint_every = 20
[grid]
train.batch_size = [4, 8]
run.seed = [0]
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["in_process=false", "in_process=true"])
@pytest.mark.usefixtures("compiled")
def test_a_sweep_that_is_killed_ends_with_the_same_table(
    load: Load, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    load(KILLED)
    command = [sys.executable, "-m", "optim_zoo.cli", "sweep", "trial.toml", how]
    subprocess.run([*command, "dir=whole"], check=True)
    (last,) = Path("whole").glob("runs/*batch8*")
    metrics = Path("runs/trial/runs", last.name, "metrics.jsonl")
    sweeping = subprocess.Popen(command)
    while not (metrics.exists() and metrics.read_text().count("\n") > 30):
        assert sweeping.poll() is None
        time.sleep(0.01)
    sweeping.kill()
    sweeping.wait()
    assert len(read(Path("runs/trial"))) == 1
    subprocess.run(command, check=True)
    assert timeless(read(Path("runs/trial"))) == timeless(read(Path("whole")))
