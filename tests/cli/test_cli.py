"""The command line: commands, output, and errors as one sentence with an exit code."""

import dataclasses
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import optim_zoo
from optim_zoo import catalogue, cli, recorded, verify
from optim_zoo.train import config_file, loop, saved_config
from optim_zoo.train.run_folder import saved_steps

pytestmark = [
    pytest.mark.usefixtures("compiled", "quick_to_compile"),
]


def environment() -> dict[str, str]:
    """Returns the environment of a user's process, with this module's compilation cache.

    XLA's optimizations are off, because compiling would take most of the time. The output of a run
    does not depend on them.
    """
    kept = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    own = {
        name: value
        for name, value in os.environ.items()
        if name in kept or not name.startswith(("JAX_", "XLA_"))
    }
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return {**own, **quick, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "default"}


def command(tiny: Path, folder: Path, *overrides: str) -> list[str]:
    start = [sys.executable, "-m", "optim_zoo.cli", "train", str(tiny)]
    return [*start, f"run.dir={folder}", *overrides]


def run(tiny: Path, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(tiny, folder, *overrides),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=200,
    )


# Mistakes


@pytest.fixture
def error_message(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Returns a function that runs `train` with overrides and returns its error message."""
    monkeypatch.setattr(
        cli.starting, "quiet_orbax", lambda: None
    )  # it changes global logging settings
    monkeypatch.setattr(loop.jax, "device_count", lambda: 1)

    def sentence(*overrides: str, config: Path = tiny) -> str:
        arguments = ["train", str(config), f"run.dir={tmp_path / 'run'}", *overrides]
        assert cli.main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("optim-zoo: ")
        assert err.count("\n") == 1
        assert "Error" not in err
        return err.removeprefix("optim-zoo: ").rstrip("\n")

    return sentence


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("train.stepz=5",), r"command line \(train\.stepz=5\): unknown key .* did you mean steps"),
        (("optimizer.name=lamp",), "unknown optimizer 'lamp'; did you mean lamb"),
        (("task.name=masked_langage",), "did you mean masked_language"),
        (("train.steps",), "expected section.key=value, got 'train.steps'"),
        (("data.text=nowhere/*.txt",), "no file matches 'nowhere/\\*.txt'"),
        (("data.vocabulary=nowhere",), "nowhere cannot be read"),
        (("data.sequence_length=1999",), "1999"),
        (("train.batch_size=9", "train.micro_batches=2"), r"batch_size must be divisible by 1"),
        (
            ("optimizer.exclude_from_weight_decay=['biass']",),
            "'biass' matches no leaf; the nearest paths are .*/bias",
        ),
        (
            ("schedule.warmup_steps=100",),
            "schedule.warmup_steps must be at most train.steps, got 100 and 6",
        ),
    ],
)
def test_mistakes_are_reported_in_one_sentence_with_exit_code_2(
    overrides: tuple[str, ...], expected: str, error_message: Callable[..., str]
) -> None:
    assert re.search(expected, error_message(*overrides))


def test_a_missing_config_is_named(error_message: Callable[..., str], tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    expected = f"cannot read the config {missing}: No such file or directory"
    assert error_message(config=missing) == expected


@pytest.mark.parametrize("name", ["", "tokens", "checkpoints", "config.toml"])
def test_a_run_folder_that_cannot_be_written_is_named(
    name: str, error_message: Callable[..., str], tmp_path: Path
) -> None:
    """A file is in the way, because permissions do not stop a superuser that runs the tests."""
    if name == "config.toml":
        (tmp_path / "run" / "config.toml").mkdir(parents=True)
    else:
        path = tmp_path / "run" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("a file")
    assert str(tmp_path / "run") in error_message()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["tarin"],
        ["train"],
        ["train", "--steps", "5", "x"],
        ["list", "lamb"],
        ["show"],
        ["show", "lamb", "lars"],
        ["verify", "--all"],
    ],
)
def test_invalid_arguments_print_the_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: optim-zoo")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    commands = ("train", "evaluate", "predict", "export", "list", "show", "verify")
    for arguments in (["--help"], *([command, "--help"] for command in commands)):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "section.key=value" in out
    assert "resumes" in out
    assert all(f"\n    {command} " in out for command in commands)


def test_version_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"optim-zoo {optim_zoo.__version__}\n"


@pytest.fixture
def run_folders(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces training, and returns a list of the run folders that commands would use."""
    folders: list[Path] = []
    monkeypatch.setattr(
        cli.starting, "quiet_orbax", lambda: None
    )  # it changes global logging settings
    monkeypatch.setattr(loop, "run", lambda config, folder, notes: folders.append(folder))
    return folders


def test_a_saved_config_resumes_its_own_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_folders: list[Path]
) -> None:
    """It does so from any directory, with a relative or default folder, and after a move."""
    monkeypatch.chdir(tmp_path)
    for overrides in (["run.dir=here/one"], []):
        loaded = config_file.load(tiny, overrides)
        folder = tmp_path / (loaded.run.dir or "runs/tiny")
        folder.mkdir(parents=True)
        saved = folder / "config.toml"
        saved.write_text(saved_config.of_run(loaded, folder.relative_to(tmp_path)))
        monkeypatch.chdir("/")
        assert cli.main(["train", str(saved)]) == 0
        (folder / "metrics.jsonl").touch()
        moved = folder.rename(tmp_path / f"moved{len(overrides)}")
        monkeypatch.chdir(moved)
        assert cli.main(["train", "config.toml"]) == 0
        assert cli.main(["train", "config.toml", "run.dir=other"]) == 0
        assert run_folders[-3:] == [folder, moved, Path("other")]
        monkeypatch.chdir(tmp_path)


def test_a_run_of_an_earlier_version_resumes_with_its_own_activation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its saved config has none, and a config of the user without one has the default."""
    seen: list[str] = []
    monkeypatch.setattr(cli.starting, "quiet_orbax", lambda: None)
    monkeypatch.setattr(
        loop, "run", lambda config, *_: seen.append(config.task_sections["model"].activation)
    )
    path = tmp_path / "config.toml"
    path.write_text("[schedule]\nlearning_rate = 1.0\nwarmup_steps = 2\n")
    assert cli.main(["train", str(path)]) == 0
    (tmp_path / "metrics.jsonl").touch()  # now it is a run folder
    assert cli.main(["train", str(path)]) == 0
    assert cli.main(["train", str(path), "model.activation=gelu"]) == 0
    assert seen == ["gelu", "gelu_tanh", "gelu"]


def test_paths_outside_ascii_work_in_an_ascii_locale(tiny: Path, tmp_path: Path) -> None:
    """Python's UTF-8 mode is off too."""
    own = {**environment(), "LC_ALL": "C", "PYTHONUTF8": "0"}
    path = tmp_path / "\u00fcber.toml"
    path.write_text(tiny.read_text() + '[run]\ndir = "\u00e4"\n', encoding="utf-8")
    program = (
        "import sys; from optim_zoo import cli; from optim_zoo.train import loop, saved_config\n"
        "loop.run = lambda c, f, n: print(saved_config.of_run(c, f).count(chr(228)))\n"
        "sys.exit(cli.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "train", path, f"data.text={tmp_path}/\u00e4.txt"],
        capture_output=True,
        text=True,
        env=own,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")


def test_a_path_that_is_not_utf8_is_reported_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run_folders: list[Path]
) -> None:
    assert cli.main(["train", os.fsdecode(os.fsencode(tmp_path) + b"/\xff.toml")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("optim-zoo: expected arguments in UTF-8, got b'")
    assert err.count("\n") == 1


def test_ctrl_c_before_training_starts(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.train, "run", interrupted)
    assert cli.main(["train", str(tiny)]) == 128 + signal.SIGINT
    assert capsys.readouterr().err.startswith("optim-zoo: interrupted; ")


EXTRAS = ("flax", "orbax", "rich", "tokenizers", "tomli_w")
# One process imports the common modules without starting a thread of JAX, and forks per extra.
WITHOUT_EXTRAS = """
import os, sys, warnings
import optim_zoo
from optim_zoo import cli

class Missing:
    def __init__(self, missing):
        self.missing = missing
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

config, folder, *extras = sys.argv[1:]
for extra in extras:
    assert extra not in sys.modules
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about threads that a copy would not have
        copy = os.fork()
    if not copy:
        os.dup2(os.open(f"{folder}/{extra}", os.O_CREAT | os.O_WRONLY), 2)
        sys.meta_path.insert(0, Missing(extra))
        os._exit(cli.main(["train", config]))
    print(os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]))
"""


@pytest.fixture(scope="module")
def without_extras(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, str]]:
    """Returns exit code and standard error of training without each of the extras."""
    folder = tmp_path_factory.mktemp("without")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, tiny, folder, *EXTRAS],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=200,
    )
    assert (done.returncode, done.stderr) == (0, "")
    codes = map(int, done.stdout.split())
    return {
        extra: (code, (folder / extra).read_text())
        for extra, code in zip(EXTRAS, codes, strict=True)
    }


@pytest.mark.parametrize("missing", EXTRAS)
def test_a_missing_extra_names_what_to_install(
    missing: str, without_extras: dict[str, tuple[int, str]]
) -> None:
    code, err = without_extras[missing]
    assert code == 2
    assert err.startswith(f"optim-zoo: {missing}")
    assert err.endswith(" is missing: pip install 'optim-zoo[train]' installs what train needs\n")
    assert err.count("\n") == 1


# The commands `list`, `show` and `verify`


def test_list_prints_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (catalogue.table() + "\n", "")


def test_list_fits_the_width_of_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "90")
    assert cli.main(["list"]) == 0
    assert capsys.readouterr().out == catalogue.table(90) + "\n"


@pytest.mark.parametrize("name", ["lamb", "torch.AdamW", "torch"])
def test_show_prints_the_page_of_an_optimizer(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["show", name]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (catalogue.page(name) + "\n", "")


def test_verify_exits_with_1_if_a_trajectory_differs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["verify", "tf1_momentum", "torch_sgd"]) == 0
    assert capsys.readouterr().out.endswith("\n2 recorded trajectories: 2 agree\n")
    load = recorded.Case.load

    def tampered(case: recorded.Case) -> recorded.Trajectory:
        trajectory = load(case)
        grads = trajectory.grads[::-1] if case.id == "torch_sgd" else trajectory.grads
        return dataclasses.replace(trajectory, grads=grads)

    monkeypatch.setattr(recorded.Case, "load", tampered)
    assert cli.main(["verify", "tf1_momentum", "torch_sgd"]) == 1
    assert capsys.readouterr().out.endswith("\n2 recorded trajectories: 1 agrees, 1 differs\n")


@pytest.mark.parametrize(
    "arguments", [["show", "lamp"], ["verify", "lamp"], ["verify", "sgd", "lamp"]]
)
def test_an_unknown_name_is_answered_with_the_nearest_one(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"optim-zoo: unknown optimizer.* 'lamp'; did you mean lamb .*\?\n", err)


def test_ctrl_c_interrupts_verify(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "follow", interrupted)
    assert cli.main(["verify", "sgd"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "optim-zoo: interrupted\n"


@pytest.mark.parametrize("arguments", [["list"], ["show", "lamb"], ["verify", "sgd"]])
def test_commands_that_only_print_end_silently_on_a_closed_pipe(arguments: list[str]) -> None:
    """This happens in `optim-zoo list | head -1`. Here the pipe is closed before any output."""
    process = subprocess.Popen(
        [sys.executable, "-m", "optim_zoo.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE


def test_a_missing_platform_is_reported_in_one_sentence() -> None:
    """Commands that compute nothing do not need the platform."""
    nowhere = {**environment(), "JAX_PLATFORMS": "nowhere"}
    start = [sys.executable, "-m", "optim_zoo.cli"]
    done = subprocess.run([*start, "verify", "sgd"], capture_output=True, text=True, env=nowhere)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("optim-zoo: JAX finds no device (JAX_PLATFORMS=nowhere): ")
    assert done.stderr.count("\n") == 1
    done = subprocess.run([*start, "show", "sgd"], capture_output=True, text=True, env=nowhere)
    assert (done.returncode, done.stderr) == (0, "")


def test_list_show_and_verify_work_without_the_extras() -> None:
    program = (
        "import sys\n"
        "extras = ('flax', 'orbax', 'matplotlib', 'tokenizers', 'rich', 'tomli_w')\n"
        "sys.modules.update(dict.fromkeys(extras))\n"  # a module that is None cannot be imported
        "from optim_zoo import cli\n"
        "for command in (['list'], ['show', 'lamb'], ['verify', 'torch_sgd']):\n"
        "    assert cli.main(command) == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment()
    )
    assert (done.returncode, done.stderr) == (0, "")


# Runs in separate processes


@pytest.fixture(scope="module")
def finished(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, run(tiny, folder)


@pytest.mark.newest
def test_a_run_prints_only_plain_lines_to_a_pipe(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = finished
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    block, _, after = done.stdout.partition("compiling\n")
    names = ["devices", "parameters", "text", "unknown tokens", "tokens", "steps", "run folder"]
    assert [line.partition(": ")[0] for line in block.splitlines()] == names
    assert f"run folder: {folder}\n" in block
    assert "unknown tokens: 0.00% of the text\n" in block
    printed = after.splitlines()
    assert [line.split("  ")[0] for line in printed[:6]] == [f"step {i}/6" for i in range(1, 7)]
    assert re.fullmatch(
        r"step 2/6  loss \d\.\d{4}  learning rate 1\.50e-03  [\d,]+ tokens/s", printed[1]
    )
    assert printed[6].startswith("step 6: held-out loss ")
    assert printed[-1] == f"report: {folder / 'report.html'}"


def test_restarting_a_finished_run_exits_with_0(
    tiny: Path, finished: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    folder, first = finished
    again = run(tiny, folder)
    assert (again.returncode, again.stderr) == (0, "")
    opening, *rest = again.stdout.splitlines()
    assert opening == f"resuming from the checkpoint of step 6 in {folder}"
    assert rest[5:7] == ["steps: 6, 6 of them made", f"run folder: {folder}"]
    del rest[:7]
    assert rest == first.stdout.splitlines()[-len(rest) :]


def test_a_damaged_checkpoint_is_moved_away_with_one_sentence(
    tiny: Path, finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", finished[0], folder], check=True)
    arrays = (folder / "checkpoints" / "6" / "training").rglob("d/*")
    largest = max(arrays, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    done = run(tiny, folder)
    assert (done.returncode, done.stderr) == (0, "")
    note, opening, *rest = done.stdout.splitlines()
    assert note.startswith("the checkpoint of step 6 is damaged (")
    assert note.endswith(f"was moved to {folder / 'damaged' / '6'}; resuming from step 3")
    assert opening == f"resuming from the checkpoint of step 3 in {folder}"
    held_out = [line for line in rest if line.startswith("held-out loss")]
    assert held_out == [
        line for line in finished[1].stdout.splitlines() if line.startswith("held-out loss")
    ]


def test_a_terminal_shows_a_progress_bar(tiny: Path, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    own = {**environment(), "TERM": "xterm-256color", "COLUMNS": "120"}
    process = subprocess.Popen(
        command(tiny, tmp_path / "run"), stdout=slave, stderr=subprocess.PIPE, env=own
    )
    os.close(slave)
    shown = b""
    limit = time.monotonic() + 120
    while time.monotonic() < limit:
        if select.select([master], [], [], 0.1)[0]:
            try:
                shown += os.read(master, 65536)
            except OSError:  # the process has closed its side
                break
        elif process.poll() is not None:
            break
    os.close(master)
    assert process.wait(timeout=60) == 0
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == b""
    assert b"\x1b[" in shown
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert "compiling" in text
    assert "training" in text
    assert "6/6" in text
    assert "report: " in text


def test_a_closed_pipe_is_reported_in_one_sentence(tiny: Path, tmp_path: Path) -> None:
    """This happens in `optim-zoo train ... | head -2`."""
    process = subprocess.Popen(
        command(tiny, tmp_path / "run"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr:
        err = process.stderr.read()
    assert process.wait(timeout=120) == 2
    assert err == "optim-zoo: Broken pipe; the same command resumes from what is saved\n"


def test_output_to_a_full_disk_is_reported_in_one_sentence(tiny: Path, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command(tiny, tmp_path / "run"),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            timeout=200,
        )
    assert done.returncode == 2
    assert done.stderr == (
        "optim-zoo: No space left on device; the same command resumes from what is saved\n"
    )


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mounts a small file system and returns its folder."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "none", tmp_path], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def fill(disk: Path) -> Path:
    """Writes a file that takes all the free space, and returns its path."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return path


RARELY = ("output.log_every=1000", "output.evaluate_every=1000", "output.checkpoint_every=1000")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "first", "named"),
    [
        ((*RARELY, "output.checkpoint_every=20"), "checkpoints/20/commit_success.txt", "checkp"),
        ((*RARELY, "output.log_every=1"), "metrics.jsonl", "metrics.jsonl"),
        ((*RARELY, "output.evaluate_every=200"), "report.html", ".png"),
    ],
)
def test_a_run_that_filled_the_disk_reports_it_in_one_sentence_and_resumes_later(
    overrides: tuple[str, ...], first: str, named: str, tiny: Path, disk: Path, tmp_path: Path
) -> None:
    steps = ("train.steps=800", "schedule.warmup_steps=5")
    folder = disk / "run"
    process = subprocess.Popen(
        command(tiny, folder, *steps, *overrides),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    limit = time.monotonic() + 120
    while not ((folder / first).exists() and (folder / first).stat().st_size):
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.002)
    filler = fill(disk)
    assert process.stderr is not None
    with process.stderr:
        err = process.stderr.read()
    assert process.wait(timeout=120) == 2
    assert err.startswith("optim-zoo: ")
    assert err.count("\n") == 1
    assert "No space left on device" in err
    assert named in err
    saved = saved_steps(folder)
    filler.unlink()
    if named == "checkp":
        assert saved
    done = run(tiny, folder, *steps, *overrides)
    assert (done.returncode, done.stderr) == (0, "")
    if saved:
        assert done.stdout.startswith(f"resuming from the checkpoint of step {saved[-1]} ")
    whole = run(tiny, disk / "whole", *steps, *overrides)
    assert (whole.returncode, whole.stderr) == (0, "")

    def without_times(folder: Path) -> str:
        return re.sub(r'"tokens_per_second": [^,}]*', "", (folder / "metrics.jsonl").read_text())

    assert without_times(folder) == without_times(disk / "whole")
