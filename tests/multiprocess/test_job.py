"""The training job over several processes, each with virtual devices, on this machine.

Sums over devices add in another order when they cross processes, so losses agree to rounding: a
float32 loss of about 3 after a few steps of LAMB, whose trust ratios carry the difference on.
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
    pytest.mark.xdist_group("processes"),  # in one worker: the fixtures are runs, and long
    pytest.mark.usefixtures("compiled"),
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
SEVENTY_FIVE = 75  # the exit code that says: start again
LONG = ("train.steps=100000", "output.checkpoint_every=20")
RTOL = 1e-5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, with a little text and a vocabulary beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    write_random_text(folder)
    (folder / "tiny.toml").write_text(TINY.format(folder=folder))
    return folder / "tiny.toml"


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the runs in this process."""
    monkeypatch.setattr(plots, "write_all", lambda *_, **__: [])


def train(tiny: Path, folder: Path, *overrides: str, processes: int = 2, devices: int = 4) -> Group:
    """Starts a run."""
    common = [
        *("-m", "optim_zoo.cli", "train", str(tiny), f"run.dir={folder}", *overrides),
        f"distributed.coordinator=127.0.0.1:{free_port()}",
        f"distributed.processes={processes}",
    ]
    return Group([[*common, f"distributed.index={i}"] for i in range(processes)], devices)


def train_here(tiny: Path, folder: Path, *overrides: str) -> None:
    """In this one process, on its eight devices."""
    loop.run(config_file.load(tiny, overrides), folder)


def losses(folder: Path, lines: int | None = None) -> list[float]:
    """The loss of every step, and the last one on held-out text, in all or the first lines."""
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
    """A copy of a run folder without the checkpoints after ``step``."""
    shutil.copytree(whole, folder)
    for path in (folder / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    return folder


@pytest.fixture(scope="module")
def two(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[tuple[int, str, str]]]:
    """A finished run of two processes with four devices each, and how its processes ended."""
    folder = tmp_path_factory.mktemp("two") / "run"
    with train(tiny, folder) as group:
        return folder, group.ends()


@pytest.fixture(scope="module")
def one(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by this one process, on eight devices."""
    folder = tmp_path_factory.mktemp("one") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "write_all", lambda *_, **__: [])
        train_here(tiny, folder)
    return folder


# One run, by any number of processes


@pytest.mark.newest
def test_the_first_process_writes_and_speaks(two: tuple[Path, list[Any]]) -> None:
    folder, ((code, out, err), *others) = two
    assert (code, err) == (0, "")
    assert others == [(0, "", "")]  # not even what C++ prints
    printed = out.splitlines()
    assert [line.split("  ")[0] for line in printed[:6]] == [f"step {i}/6" for i in range(1, 7)]
    assert printed[-1] == f"report: {folder / 'report.html'}"
    assert "8 x cpu in 2 processes" in (folder / "report.html").read_text()
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"3", "6"}
    assert len(list((folder / "tokens").iterdir())) == 1
    # The mark by which the processes have seen that they share the folder is removed.
    hidden = {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] == "."}
    assert hidden == {".lock": b""}
    # Where it ran is no part of what it is.
    assert "distributed" not in (folder / "config.toml").read_text()


@pytest.mark.newest
def test_two_processes_give_the_losses_of_one(two: tuple[Path, Any], one: Path) -> None:
    np.testing.assert_allclose(losses(two[0]), losses(one), rtol=RTOL)


def test_a_run_of_two_processes_goes_on_in_one(
    two: tuple[Path, Any], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cut_back(two[0], tmp_path / "run", 3)
    train_here(tiny, folder)
    assert "note: devices was 8 x cpu in 2 processes and is 8 x cpu now" in capsys.readouterr().out
    np.testing.assert_allclose(losses(folder), losses(two[0]), rtol=RTOL)


def test_a_run_of_two_processes_goes_on_in_four_until_one_is_killed(
    two: tuple[Path, Any], tiny: Path, tmp_path: Path
) -> None:
    """The optimizer's state is sharded over the four; the other three end with a sentence."""
    folder = cut_back(two[0], tmp_path / "run", 3)
    changes = (
        *("parallel.zero1=true", "run.accept_changes=true", "train.steps=100000"),
        *("output.checkpoint_every=6", "output.evaluate_every=6"),
    )
    with train(tiny, folder, *changes, processes=4, devices=2) as group:
        # Then the four have saved a checkpoint, and made another step.
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
        assert code == SEVENTY_FIVE
        # A save may end between the sentences of two processes.
        assert_lost(err, folder, saved=saved_steps(folder))


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_four_with_its_state_spread(
    two: tuple[Path, Any], tiny: Path, tmp_path: Path
) -> None:
    folder = cut_back(two[0], tmp_path / "run", 3)
    changes = ("parallel.zero1=true", "run.accept_changes=true")
    with train(tiny, folder, *changes, processes=4, devices=2) as group:
        assert [(code, err) for code, _, err in group.ends()] == [(0, "")] * 4
    np.testing.assert_allclose(losses(folder), losses(two[0]), rtol=RTOL)


# Being stopped, and losing a process


@pytest.fixture(scope="module")
def stopped(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[tuple[int, str, str]]]:
    """A long run whose second process was sent SIGTERM."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with train(tiny, folder, *LONG) as group:
        group.wait_for(lambda: lines_of(folder) > 2)
        group.processes[1].send_signal(signal.SIGTERM)
        return folder, group.ends()


def test_a_signal_to_one_process_stops_all_after_the_same_step(
    stopped: tuple[Path, list[tuple[int, str, str]]],
) -> None:
    folder, ends = stopped
    assert [code for code, _, _ in ends] == [128 + signal.SIGTERM] * 2
    said = re.fullmatch(
        rf"optim-zoo: stopped by SIGTERM; step (\d+) is saved in {folder}, and the same command "
        r"resumes from there\n",
        ends[0][2],
    )
    assert said, ends
    assert ends[1][1:] == ("", "")
    assert saved_steps(folder)[-1] == int(said[1]) == lines_of(folder)
    # Saved by both: the copy of either is whole.
    params = folder / "checkpoints" / said[1] / "training"
    assert any(params.glob("ocdbt.process_0"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_process_ends_the_other_with_a_sentence_and_the_run_goes_on(
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
    assert code == SEVENTY_FIVE
    assert_lost(err, folder)
    if victim == 0:
        assert_goes_on_and_ctrl_c_stops_it(tiny, folder)


def assert_goes_on_and_ctrl_c_stops_it(tiny: Path, folder: Path) -> None:
    """Ctrl-C at one process stops all too; each has the exit code of the signal it got."""
    saved = saved_steps(folder)[-1]
    (folder / "metrics.jsonl").unlink()  # to see when the first line is there
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
    """One sentence of ours, without anything of Python's or C++'s.

    The step that it names is one of `saved`, by default the last one in the folder.
    """
    said = re.fullmatch(
        rf"optim-zoo: another process of this run has failed or is gone \({reason}\); step (\d+) "
        rf"is saved in {folder}: start all processes again with the same commands to resume "
        r"from there\n",
        err,
    )
    assert said, err
    assert int(said[1]) in (saved or saved_steps(folder)[-1:])


@pytest.mark.slow
def test_a_process_that_stops_answering_ends_the_other(
    stopped: tuple[Path, Any], tiny: Path, tmp_path: Path
) -> None:
    """No connection breaks, so a collective waits for ever: the heartbeats tell."""
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
    assert group.processes[0].returncode == SEVENTY_FIVE
    assert_lost(err, folder, "no heartbeat of process 1")


@pytest.mark.slow
def test_a_mistake_of_one_process_ends_the_other_too(
    stopped: tuple[Path, Any], tiny: Path, tmp_path: Path
) -> None:
    """Here the first one may not write; the folder stands for a full disk."""
    folder = tmp_path / "run"
    shutil.copytree(stopped[0], folder)
    (folder / "config.toml").unlink()
    (folder / "config.toml.tmp").mkdir()
    with train(tiny, folder, *LONG) as group:
        ends = group.ends(200)
    assert [code for code, _, _ in ends] == [2, SEVENTY_FIVE]
    assert ends[0][2].startswith(f"optim-zoo: expected to write {folder / 'config.toml'}, got ")
    assert ends[0][2].count("\n") == 1
    assert_lost(ends[1][2], folder)


@pytest.mark.slow
def test_a_closed_output_is_one_sentence_and_ends_the_other_too(tiny: Path, tmp_path: Path) -> None:
    """As in `optim-zoo train ... | head -2`."""
    with train(tiny, tmp_path / "run", *LONG) as group:
        first = group.processes[0]
        assert first.stdout is not None
        first.stdout.close()
        first.stdout = None
        ends = group.ends()
    assert ends[0][0] == 2
    assert ends[0][2] == "optim-zoo: Broken pipe; the same command resumes from what is saved\n"
    assert ends[1][0] == SEVENTY_FIVE
    assert ends[1][2].startswith("optim-zoo: another process of this run has failed or is gone (")
    assert ends[1][2].count("\n") == 1


# Settings


@pytest.fixture
def said(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """A function from overrides to the one sentence that a mistake is answered with."""
    monkeypatch.setattr(cli, "_quiet_orbax", lambda: None)  # it changes the whole process

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
def test_settings_that_do_not_fit_together(
    overrides: tuple[str, ...], expected: str, said: Callable[..., str]
) -> None:
    sentence = said(*overrides)
    assert sentence.startswith("optim-zoo: command line (distributed.")
    assert re.search(expected, sentence)


def test_a_coordinator_that_is_not_there(said: Callable[..., str]) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    overrides = (f"coordinator={nowhere}", "processes=2", "index=1", "start_seconds=1")
    assert re.search(rf"the coordinator {nowhere} was not reached in 1 s \(", said(*overrides))


@pytest.mark.slow
def test_two_processes_of_the_same_index(tiny: Path, tmp_path: Path) -> None:
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
def test_processes_must_train_the_same(tiny: Path, tmp_path: Path) -> None:
    """Another learning rate on one host would be averaged in silence."""
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


def test_a_plain_machine_is_asked_nothing(tmp_path: Path, tiny: Path) -> None:
    """Loading a config starts no backend, and no cluster is found here."""
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


# The step itself


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
def test_a_step_spans_processes_in_every_layout() -> None:
    address = f"127.0.0.1:{free_port()}"
    with Group([["-c", STEPS, address, str(i)] for i in range(2)], devices=2) as group:
        ends = group.ends()
    assert [(code, err) for code, _, err in ends] == [(0, "")] * 2
