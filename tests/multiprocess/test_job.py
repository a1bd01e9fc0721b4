"""The training job over several processes, each with virtual devices, on this machine.

Sums across processes are taken in another order, so the float32 losses agree to rounding only.
The trust ratios of LAMB carry the differences from step to step.
"""

import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optim_zoo import cli
from optim_zoo.train import config_file, loop
from optim_zoo.train.run_folder import saved_steps
from optim_zoo.train.sinks import plots
from tests.multiprocess.group import Group, free_port
from tests.train.tasks.masked_language.small_text import write_random_text

pytestmark = [
    pytest.mark.usefixtures("compiled", "quick_to_compile"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]
TINY = """
[data]
text = "{folder}/*.txt"
vocabulary = "{folder}/vocabulary"
held_out = 0.2
sequence_length = 16
[model]
num_layers = 1
hidden_size = 16
num_heads = 2
intermediate_size = 16
max_positions = 16
dropout = 0.1
[optimizer]
weight_decay = 0.01
exclude_from_weight_decay = ["bias", "LayerNorm"]
exclude_from_layer_adaptation = ["bias", "LayerNorm"]
[schedule]
name = "constant"
learning_rate = 0.03
[train]
steps = 6
batch_size = 8
[output]
log_every = 1
evaluate_every = 1000
evaluation_batches = 2
checkpoint_every = 3
"""
RESTART = 75  # the exit code after which a launcher starts the run again
LONG = ("train.steps=100000", "output.checkpoint_every=20")
RTOL = 1e-5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a config file, in a folder that also has a little text and a vocabulary."""
    folder = tmp_path_factory.mktemp("tiny")
    write_random_text(folder)
    (folder / "tiny.toml").write_text(TINY.format(folder=folder))
    return folder / "tiny.toml"


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns plots off for runs in this process, because they are slow."""
    monkeypatch.setattr(plots, "write_all", lambda *_, **__: [])


def train(tiny: Path, folder: Path, *overrides: str, processes: int = 2, devices: int = 4) -> Group:
    """Starts the processes of a run."""
    common = [
        *("-m", "optim_zoo.cli", "train", str(tiny), f"run.dir={folder}", *overrides),
        f"distributed.coordinator=127.0.0.1:{free_port()}",
        f"distributed.processes={processes}",
    ]
    return Group([[*common, f"distributed.index={i}"] for i in range(processes)], devices)


def train_here(tiny: Path, folder: Path, *overrides: str) -> None:
    """Trains in this process, on its eight devices."""
    loop.run(config_file.load(tiny, overrides), folder)


def losses(folder: Path, lines: int | None = None) -> list[float]:
    """Returns the loss of every step and the last held-out loss.

    It reads only the first ``lines`` lines of the metrics file, or all by default.
    """
    written = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in written[:lines]]
    steps = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
    assert records[-1]["kind"] == "held_out"
    return [record["loss"] for record in (*steps, records[-1])]


def lines_of(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def cut_back(whole: Path, folder: Path, step: int) -> Path:
    """Copies a run folder without the checkpoints after ``step``."""
    shutil.copytree(whole, folder)
    for path in (folder / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    return folder


@pytest.fixture(scope="module")
def two(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[tuple[int, str, str]]]:
    """Returns the folder and the ends of a finished run of two processes with four devices each."""
    folder = tmp_path_factory.mktemp("two") / "run"
    with train(tiny, folder) as group:
        return folder, group.ends()


@pytest.fixture(scope="module")
def one(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of the same run in this process, on eight devices."""
    folder = tmp_path_factory.mktemp("one") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "write_all", lambda *_, **__: [])
        train_here(tiny, folder)
    return folder


# The same run in any number of processes


@pytest.mark.newest
def test_only_process_0_writes_files_and_output(two: tuple[Path, list[Any]]) -> None:
    folder, ((code, out, err), *others) = two
    assert (code, err) == (0, "")
    assert others == [(0, "", "")]  # nothing, including the log of C++
    printed = out.splitlines()
    assert printed[0] == "devices: 8 x cpu in 2 processes"
    start = printed.index("compiling") + 1
    steps = [line.split("  ")[0] for line in printed[start : start + 6]]
    assert steps == [f"step {i}/6" for i in range(1, 7)]
    assert printed[-1] == f"report: {folder / 'report.html'}"
    assert "8 x cpu in 2 processes" in (folder / "report.html").read_text()
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"3", "6"}
    assert len(list((folder / "tokens").iterdir())) == 1
    # The file by which the processes checked that they share the folder is removed.
    hidden = {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] == "."}
    assert hidden == {".lock": b""}
    # Launch settings are not part of the experiment.
    assert "distributed" not in (folder / "config.toml").read_text()


@pytest.mark.newest
def test_two_processes_agree_with_one(two: tuple[Path, Any], one: Path) -> None:
    np.testing.assert_allclose(losses(two[0]), losses(one), rtol=RTOL)


def test_a_run_of_two_processes_resumes_in_one(
    two: tuple[Path, Any], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cut_back(two[0], tmp_path / "run", 3)
    train_here(tiny, folder)
    assert "note: devices was 8 x cpu in 2 processes and is 8 x cpu now" in capsys.readouterr().out
    np.testing.assert_allclose(losses(folder), losses(two[0]), rtol=RTOL)


@pytest.mark.slow
def test_a_run_of_two_processes_resumes_in_four_and_ends_if_one_is_killed(
    two: tuple[Path, Any], tiny: Path, tmp_path: Path
) -> None:
    """The state is sharded over four processes. When one is killed, the others end."""
    folder = cut_back(two[0], tmp_path / "run", 3)
    changes = (
        *("parallel.zero1=true", "run.accept_changes=true", "train.steps=100000"),
        *("output.checkpoint_every=6", "output.evaluate_every=6"),
    )
    with train(tiny, folder, *changes, processes=4, devices=2) as group:
        # By then the four have saved a checkpoint and made another step.
        group.wait_for(lambda: saved_steps(folder)[-1] >= 6 and lines_of(folder) > 7)
        group.processes[3].kill()
        killed = time.monotonic()
        ends = group.ends(60)
        took = time.monotonic() - killed
    print(f"the others were gone after {took:.1f} s")
    assert took < 30
    np.testing.assert_allclose(losses(folder, lines=7), losses(two[0]), rtol=RTOL)
    assert ends[3][0] == -signal.SIGKILL
    for code, _, err in ends[:3]:
        assert code == RESTART
        # A save may finish between the messages of two processes, which then name other steps.
        assert_lost(err, folder, saved=saved_steps(folder))


@pytest.mark.slow
def test_a_run_of_two_processes_resumes_in_four_with_sharded_state(
    two: tuple[Path, Any], tiny: Path, tmp_path: Path
) -> None:
    folder = cut_back(two[0], tmp_path / "run", 3)
    changes = ("parallel.zero1=true", "run.accept_changes=true")
    with train(tiny, folder, *changes, processes=4, devices=2) as group:
        assert [(code, err) for code, _, err in group.ends()] == [(0, "")] * 4
    np.testing.assert_allclose(losses(folder), losses(two[0]), rtol=RTOL)


# Stopping a run, and losing a process


@pytest.fixture(scope="module")
def stopped(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[tuple[int, str, str]]]:
    """Returns the folder and the ends of a long run after SIGTERM was sent to process 1."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with train(tiny, folder, *LONG) as group:
        group.wait_for(lambda: lines_of(folder) > 2)
        group.processes[1].send_signal(signal.SIGTERM)
        return folder, group.ends()


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(
    stopped: tuple[Path, list[tuple[int, str, str]]],
) -> None:
    folder, ends = stopped
    assert [code for code, _, _ in ends] == [128 + signal.SIGTERM] * 2
    found = re.fullmatch(
        rf"optim-zoo: stopped by SIGTERM; step (\d+) is saved in {folder}, and the same command "
        r"resumes from there\n",
        ends[0][2],
    )
    assert found, ends
    assert ends[1][1:] == ("", "")
    assert saved_steps(folder)[-1] == int(found[1]) == lines_of(folder)
    # Process 0 wrote its part of the checkpoint.
    params = folder / "checkpoints" / found[1] / "training"
    assert any(params.glob("ocdbt.process_0"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_process_ends_the_other_with_one_sentence_and_the_run_resumes(
    victim: int, stopped: tuple[Path, Any], tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped[0], folder)
    before = lines_of(folder)
    with train(tiny, folder, *LONG) as group:
        group.wait_for(lambda: lines_of(folder) > before + 2)
        group.processes[victim].kill()
        killed = time.monotonic()
        ends = group.ends(60)
        took = time.monotonic() - killed
    print(f"the other was gone after {took:.1f} s")
    assert took < 30
    assert ends[victim][0] == -signal.SIGKILL
    code, _, err = ends[1 - victim]
    assert code == RESTART
    assert_lost(err, folder)
    if victim == 0:
        assert_resumes_and_stops_on_ctrl_c(tiny, folder)


def assert_resumes_and_stops_on_ctrl_c(tiny: Path, folder: Path) -> None:
    """Resumes the run and sends Ctrl-C to process 0, which stops process 1 by SIGTERM."""
    saved = saved_steps(folder)[-1]
    (folder / "metrics.jsonl").unlink()  # so that a first line shows that training has begun
    with train(tiny, folder, *LONG) as group:
        group.wait_for(lambda: lines_of(folder) > 0)
        group.processes[0].send_signal(signal.SIGINT)
        ends = group.ends()
    assert [code for code, _, _ in ends] == [128 + signal.SIGINT, 128 + signal.SIGTERM]
    assert ends[0][1].startswith(f"resuming from the checkpoint of step {saved} in {folder}\n")
    answer, last = ends[0][2].splitlines()
    assert answer.startswith("optim-zoo: saving the next step that all processes reach, ")
    assert last.startswith("optim-zoo: stopped by SIGINT; step ")


def assert_lost(
    err: str, folder: Path, reason: str = ".*", saved: Sequence[int] | None = None
) -> None:
    """Checks that standard error is only the sentence about a lost process.

    The sentence must name one of the steps in `saved`, by default the last one in the folder.
    """
    found = re.fullmatch(
        rf"optim-zoo: another process of this run has failed or is gone \({reason}\); step (\d+) "
        rf"is saved in {folder}: start all processes again with the same commands to resume "
        r"from there\n",
        err,
    )
    assert found, err
    assert int(found[1]) in (saved or saved_steps(folder)[-1:])


@pytest.mark.slow
def test_a_process_without_heartbeats_ends_the_other(
    stopped: tuple[Path, Any], tiny: Path, tmp_path: Path
) -> None:
    """No connection breaks, so a collective would wait forever without heartbeats."""
    folder = tmp_path / "run"
    shutil.copytree(stopped[0], folder)
    before = lines_of(folder)
    with train(tiny, folder, *LONG, "distributed.heartbeat_seconds=6") as group:
        group.wait_for(lambda: lines_of(folder) > before + 2)
        group.processes[1].send_signal(signal.SIGSTOP)
        silent = time.monotonic()
        _, err = group.processes[0].communicate(timeout=60)
        took = time.monotonic() - silent
    print(f"the other was gone after {took:.1f} s")
    assert took < 30
    assert group.processes[0].returncode == RESTART
    assert_lost(err, folder, "no heartbeat of process 1")


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_other(
    stopped: tuple[Path, Any], tiny: Path, tmp_path: Path
) -> None:
    """Process 0 cannot write, because a folder has the name of its file."""
    folder = tmp_path / "run"
    shutil.copytree(stopped[0], folder)
    (folder / "config.toml").unlink()
    (folder / "config.toml.tmp").mkdir()
    with train(tiny, folder, *LONG) as group:
        ends = group.ends(200)
    assert [code for code, _, _ in ends] == [2, RESTART]
    assert ends[0][2].startswith(f"optim-zoo: expected to write {folder / 'config.toml'}, got ")
    assert ends[0][2].count("\n") == 1
    assert_lost(ends[1][2], folder)


@pytest.mark.slow
def test_a_closed_pipe_ends_both_processes_with_one_sentence_each(
    tiny: Path, tmp_path: Path
) -> None:
    """This happens in `optim-zoo train ... | head -2`."""
    with train(tiny, tmp_path / "run", *LONG) as group:
        first = group.processes[0]
        assert first.stdout is not None
        first.stdout.close()
        first.stdout = None
        ends = group.ends()
    assert ends[0][0] == 2
    assert ends[0][2] == "optim-zoo: Broken pipe; the same command resumes from what is saved\n"
    assert ends[1][0] == RESTART
    assert ends[1][2].startswith("optim-zoo: another process of this run has failed or is gone (")
    assert ends[1][2].count("\n") == 1


# Settings


@pytest.fixture
def error_message(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Returns a function that runs the command with overrides and returns its error message."""
    monkeypatch.setattr(
        cli.starting, "quiet_orbax", lambda: None
    )  # it changes global logging settings

    def sentence(*overrides: str) -> str:
        settings = [f"distributed.{override}" for override in overrides]
        assert cli.main(["train", str(tiny), f"run.dir={tmp_path / 'run'}", *settings]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return str(err)

    return sentence


HERE = "coordinator=127.0.0.1:1234"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((HERE,), "belong together: processes and index must be set too"),
        ((HERE, "processes=2"), "belong together: index must be set too"),
        (("processes=2",), "belong together: coordinator and index must be set too"),
        (("index=0",), "belong together: coordinator and processes must be set too"),
        ((HERE, "processes=2", "index=2"), "index must be below processes, got 2 of 2"),
        ((HERE, "processes=2", "index=-2"), "index must be >= -1, got -2"),
        (("coordinator=here", "processes=2", "index=0"), "must be host:port, got 'here'"),
        (("heartbeat_seconds=1",), "heartbeat_seconds must be >= 2, got 1"),
    ],
)
def test_inconsistent_settings_are_refused(
    overrides: tuple[str, ...], expected: str, error_message: Callable[..., str]
) -> None:
    sentence = error_message(*overrides)
    assert sentence.startswith("optim-zoo: command line (distributed.")
    assert re.search(expected, sentence)


def test_an_unreachable_coordinator_is_reported_in_one_sentence(
    error_message: Callable[..., str],
) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    overrides = (f"coordinator={nowhere}", "processes=2", "index=1", "start_seconds=1")
    assert re.search(
        rf"the coordinator {nowhere} was not reached in 1 s \(", error_message(*overrides)
    )


@pytest.mark.slow
def test_a_duplicate_process_index_is_refused(tiny: Path, tmp_path: Path) -> None:
    overrides = (
        f"distributed.coordinator=127.0.0.1:{free_port()}",
        "distributed.processes=3",
        "distributed.start_seconds=2",
    )
    command = ["-m", "optim_zoo.cli", "train", str(tiny), f"run.dir={tmp_path}", *overrides]
    with Group([[*command, f"distributed.index={i}"] for i in (0, 1, 1)], devices=1) as group:
        ends = group.ends()
    assert [code for code, _, _ in ends] == [2] * 3
    for _, out, err in ends:
        assert out == ""
        assert re.fullmatch(
            r"optim-zoo: the (processes did not come together|coordinator) .*\n", err
        )
    assert sum("another one has the same distributed.index" in err for _, _, err in ends) == 1


@pytest.mark.slow
def test_processes_with_different_configs_are_refused(tiny: Path, tmp_path: Path) -> None:
    """Processes with different settings would otherwise average their gradients silently."""
    address = f"127.0.0.1:{free_port()}"
    command = [
        *("-m", "optim_zoo.cli", "train", str(tiny), f"run.dir={tmp_path / 'run'}"),
        *(f"distributed.coordinator={address}", "distributed.processes=2"),
    ]
    commands = [[*command, f"distributed.index={i}", f"train.steps={6 + i}"] for i in (0, 1)]
    with Group(commands, devices=1) as group:
        ends = group.ends()
    for code, _, err in ends:
        assert code == 2
        assert err.startswith(
            "optim-zoo: the config must be the same in every process, but differs"
        )
        assert err.count("\n") == 1


def test_without_a_cluster_no_backend_is_initialized(tmp_path: Path, tiny: Path) -> None:
    """Loading a config and looking for a cluster do not initialize JAX."""
    program = (
        "import jax\n"
        "from jax._src import xla_bridge\n"
        "from pathlib import Path\n"
        "from optim_zoo.train import config_file, distributed, loop\n"
        f"loaded = config_file.load({str(tiny)!r})\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "assert not distributed.start(loaded.distributed, Path('run')).joined\n"
        "assert not jax.distributed.is_initialized()\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )
    with Group([["-c", program]], devices=1) as group:
        assert group.ends() == [(0, "", "")]


# One step, without the training job


STEPS = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), cluster_detection_method="deactivate")
from optim_zoo import lamb, sharding

rng = np.random.default_rng(0)
params = {"w": rng.normal(size=(8, 4)).astype(np.float32), "b": np.zeros(4, np.float32)}
keys = jax.random.split(jax.random.key(1), 8)
batches = [{"x": rng.normal(size=(8, 8)).astype(np.float32), "key": keys} for _ in range(3)]

def loss(params, batch):
    noise = jax.vmap(lambda key: jax.random.normal(key, (8,)))(batch["key"])
    return jnp.mean((batch["x"] + noise @ params["w"] @ params["w"].T + params["b"].sum()) ** 2)

def train(devices, **options):
    step = sharding.data_parallel(loss, lamb(0.1), mesh=Mesh(devices, ("data",)), **options)
    x, state = step.init(params)
    for batch in batches:
        x, state, value = step(x, state, batch)
    x, state = step.place(*step.global_arrays((x, state)))
    return step.params(x)

expected = train(np.array(jax.local_devices()[:1]))
cut = [("w", PartitionSpec("data"))]
for options in ({}, {"mode": "shard_map"}, {"zero1": "data"}, {"param_shardings": cut}):
    plain = train(np.array(jax.devices()), **options)
    for name in params:
        assert plain[name].is_fully_addressable
        np.testing.assert_allclose(plain[name], expected[name], rtol=1e-5, atol=1e-6)
try:
    train(np.array(jax.devices()), mode="pmap")
except ValueError as error:
    assert str(error).startswith("mode 'pmap' must have one process"), error
else:
    raise AssertionError
jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_a_step_across_processes_works_in_every_layout() -> None:
    address = f"127.0.0.1:{free_port()}"
    with Group([["-c", STEPS, address, str(i)] for i in range(2)], devices=2) as group:
        ends = group.ends()
    assert [(code, err) for code, _, err in ends] == [(0, "")] * 2
