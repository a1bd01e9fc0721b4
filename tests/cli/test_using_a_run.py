"""The commands that use what a run has trained, and the mistakes that they report."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from optim_zoo import cli, train
from optim_zoo.train import config_file, evaluating, loop, predicting
from optim_zoo.train.tasks.bert.huggingface import export
from tests.cli.test_cli import environment

pytestmark = [
    pytest.mark.usefixtures("compiled", "quick_to_compile", "quiet"),
]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.starting, "quiet_orbax", lambda: None)  # it changes logging
    monkeypatch.setattr(cli.starting, "find_user_modules", lambda: None)  # it changes sys.path


def content(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns the time and size of everything in a folder."""
    stats = {str(path): path.lstat() for path in folder.rglob("*")}
    return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


# evaluate


def held_out(run: Path, step: int) -> dict[str, Any]:
    """Returns the held-out metrics that a run has logged after a step."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    [found] = [each for each in records if each["kind"] == "held_out" and each["step"] == step]
    return dict(found)


@pytest.mark.parametrize("step", [3, 6])
def test_evaluate_prints_what_the_run_has_measured(
    step: int, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(trained)
    assert cli.main(["evaluate", str(trained), *([] if step == 6 else ["--step", "3"])]) == 0
    assert capsys.readouterr() == (f"loss: {held_out(trained, step)['loss']:.4f} nats\n", "")
    assert content(trained) == before


@pytest.mark.slow
def test_evaluate_uses_the_average_where_the_run_does(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["output.sinks=[]", "train.steps=3", "averaging.decay=0.9"]
    loop.run(config_file.load(tiny, own), tmp_path / "run")
    for more in ([], ["--no-averaged"]):
        assert cli.main(["evaluate", str(tmp_path / "run"), *more]) == 0
    default, plain = capsys.readouterr().out.splitlines()
    assert default == f"loss: {held_out(tmp_path / 'run', 3)['loss']:.4f} nats"
    assert plain != default


def test_evaluate_accepts_a_relative_path_and_other_data(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(trained)
    monkeypatch.chdir(trained.parent)
    (trained.parent / "other.txt").write_text("the layer and the batch\n" * 50)
    assert cli.main(["evaluate", "run"]) == 0
    assert cli.main(["evaluate", "run", "data.text=other.txt"]) == 0
    own, other = capsys.readouterr().out.splitlines()
    assert own != other
    assert content(trained) == before


def test_evaluate_prints_every_metric_of_the_task(
    trained_digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", str(trained_digits)]) == 0
    out = capsys.readouterr().out
    assert re.fullmatch(r"loss: \d\.\d{4} nats\naccuracy: 0\.\d{4}\n", out)


def test_metrics_have_names_for_people() -> None:
    values = {"loss": 0.5, "f1": 0.91234, "f1/string": 1.0, "confusion/a/b": 3.0}
    assert evaluating.lines(evaluating.Metrics(values, "")) == [
        "loss: 0.5000",
        "F1: 0.9123",
        "F1/string: 1.0000",
    ]


# predict


def masked(text: str, trained: Path) -> tuple[list[str], np.ndarray]:
    """Returns tokens and probabilities at the first mask, from the logits of the loaded model."""
    loaded: Any = train.load(trained)
    [encoding] = loaded.tokenizer.encode_batch([text])
    probabilities = jax.nn.softmax(loaded.apply([encoding.ids])[0])
    at = encoding.tokens.index("[MASK]")
    return [loaded.tokenizer.id_to_token(i) for i in range(loaded.model.vocabulary_size)], (
        np.asarray(probabilities[at])
    )


def test_predict_fills_in_the_most_probable_tokens(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(trained)
    text = "The learning [MASK] of the layer."
    (tmp_path / "text").write_bytes(f"\ufeff{text}\r\n\r\nNo mask.\r\n".encode())
    assert cli.main(["predict", str(trained), str(tmp_path / "text"), "--top", "2"]) == 0
    filled, candidates, *rest = capsys.readouterr().out.splitlines()
    tokens, probabilities = masked(text, trained)
    order = [i for i in np.argsort(-probabilities) if not tokens[i].startswith("[")][:2]
    assert filled == text.replace("[MASK]", tokens[order[0]])
    found = re.findall(r"(\S+) (0\.\d{4})", candidates)
    assert [token for token, _ in found] == [tokens[i] for i in order]
    # The printed values are rounded to 4 digits.
    assert [float(p) for _, p in found] == pytest.approx(probabilities[order], abs=1e-4)
    assert rest == ["", "No mask."]
    assert content(trained) == before


def test_predict_reads_standard_input(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Input:
        class buffer:
            read = staticmethod(lambda: b"[MASK] and [MASK]")

    monkeypatch.setattr(sys, "stdin", Input)
    assert cli.main(["predict", str(trained), "-"]) == 0
    assert re.fullmatch(r"\w+ and \w+\n", capsys.readouterr().out)


def test_predict_ends_silently_on_a_closed_pipe(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("[MASK]")
    process = subprocess.Popen(
        [sys.executable, "-m", "optim_zoo.cli", "predict", trained, tmp_path / "text"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(timeout=100) == 128 + signal.SIGPIPE


# export


def test_export_writes_the_parameters_of_the_chosen_step(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(trained)
    assert cli.main(["export", str(trained), str(tmp_path / "out"), "--step", "3"]) == 0
    assert capsys.readouterr() == (f"exported to {tmp_path / 'out'}\n", "")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    own = train.load(trained, step=3).params["embeddings"]["word_embeddings"]["embedding"]
    np.testing.assert_array_equal(weights["bert.embeddings.word_embeddings.weight"], own)
    assert content(trained) == before


# Mistakes


@pytest.fixture
def error_message(
    trained: Path,
    trained_digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., str]:
    """Returns a function that runs a command in a folder of inputs, and returns its message."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(trained)
    (tmp_path / "digits").symlink_to(trained_digits)
    for name in ("empty", "config", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "config" / "config.toml").write_bytes((trained / "config.toml").read_bytes())
    (tmp_path / "broken" / "config.toml").write_text("[task")
    (tmp_path / "mask.txt").write_text("a [MASK]\n")
    (tmp_path / "plain.txt").write_text("a line\n")
    (tmp_path / "nothing.txt").write_text("\n")
    (tmp_path / "latin1.txt").write_bytes(b"a line\n[MASK] caf\xe9\n")
    (tmp_path / "long.txt").write_text("short [MASK]\n" + "the " * 14 + "[MASK]\n")
    own = (trained / "config.toml").read_text()
    vocabulary = Path(re.findall(r'vocabulary = "(.*)"', own)[0]).read_text()
    (tmp_path / "vocabulary").write_text(vocabulary + "another\n")

    def sentence(*arguments: str) -> str:
        before = [content(folder) for folder in (tmp_path, trained, trained_digits)]
        assert cli.main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("optim-zoo: ")
        assert err.count("\n") == 1
        assert "Error" not in err
        assert [content(folder) for folder in (tmp_path, trained, trained_digits)] == before
        return err.removeprefix("optim-zoo: ").rstrip("\n")

    return sentence


RUN_MISTAKES = [
    (("nowhere",), "expected the folder of a run, but .*/nowhere has no config.toml"),
    (("empty",), "expected the folder of a run, but .*/empty has no config.toml"),
    (("config",), "config has nothing saved yet"),
    (("broken",), "broken/config.toml is not valid TOML"),
    (("mask.txt",), "expected the folder of a run, but .*/mask.txt has"),
    (("run", "--step", "4"), r"has no step 4: the steps saved are 3, 6"),
    (("run", "--best"), "run has no best parameters: .* output.keep_best"),
    (("run", "--averaged"), "no average of the parameters: the run has no averaging.decay"),
]


@pytest.mark.parametrize(("arguments", "expected"), RUN_MISTAKES)
@pytest.mark.parametrize("command", ["evaluate", "predict", "export"])
def test_a_run_that_cannot_be_used_is_reported_in_one_sentence(
    command: str, arguments: tuple[str, ...], expected: str, error_message: Callable[..., str]
) -> None:
    more = {"evaluate": [], "predict": ["mask.txt"], "export": ["exported"]}[command]
    assert re.search(expected, error_message(command, *arguments[:1], *more, *arguments[1:]))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.txt=x", r"command line \(data.txt=x\): unknown key .* did you mean text\?"),
        ("data.text", "expected section.key=value, got 'data.text'"),
        ("data.text=none/*.txt", r"no file matches 'none/\*.txt'"),
        ("data.held_out=2", r"data.held_out=2\): .* in \(0, 1\), got 2"),
        ("data.sequence_length=2001", "max_positions must be at least the sequence length 2001"),
        ("data.sequence_length=many", "sequence_length must be a whole number, got 'many'"),
        ("data.vocabulary=vocabulary", "this data does not have the vocabulary that"),
        ("data.vocabulary=none", "none cannot be read"),
        ("data.text=latin1.txt", "UTF-8"),
        ("model.num_layers=3", r"\(model.num_layers=3\): .* keys of \[data\] only"),
        ("train.steps=3", r"\(train.steps=3\): .* keys of \[data\] only"),
        ("run.dir=other", r"\(run.dir=other\): .* keys of \[data\] only"),
        ("steps=3", r"\(steps=3\): .* keys of \[data\] only"),
    ],
)
def test_data_that_cannot_be_evaluated_is_reported_in_one_sentence(
    override: str, expected: str, error_message: Callable[..., str]
) -> None:
    assert re.search(expected, error_message("evaluate", "run", override))


def test_a_task_without_data_sections_has_nothing_to_override(
    error_message: Callable[..., str],
) -> None:
    assert "keys of no section only" in error_message("evaluate", "digits", "data.text=x")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("run", "none.txt"), "cannot read none.txt: No such file or directory"),
        (("run", "empty"), "cannot read empty: Is a directory"),
        (("run", "nothing.txt"), "expected a text, but nothing.txt is empty"),
        (("run", "latin1.txt"), "latin1.txt has an invalid byte on line 2"),
        (("run", "plain.txt"), r"expected \[MASK\] in at least one line"),
        (("run", "long.txt"), "line 2 has 17 tokens, .* sequences of 16: shorten the line"),
        (("run", "mask.txt", "--top", "-1"), "--top must be at least 0, got -1"),
        (("digits", "mask.txt"), "a run of Digits has no predictions"),
    ],
)
def test_a_text_that_cannot_be_used_is_reported_in_one_sentence(
    arguments: tuple[str, ...], expected: str, error_message: Callable[..., str]
) -> None:
    assert re.search(expected, error_message("predict", *arguments))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("run", "exported", "--format", "onnx"), "format.*'onnx'.*huggingface"),
        (("run", "config"), "expected a folder that does not exist or is empty"),
        (("run", "mask.txt"), "expected a folder that does not exist or is empty"),
        (("digits", "exported"), "expected a run whose model is a BERT, .* task Digits"),
    ],
)
def test_an_export_that_is_not_possible_is_reported_in_one_sentence(
    arguments: tuple[str, ...], expected: str, error_message: Callable[..., str]
) -> None:
    assert re.search(expected, error_message("export", *arguments))


COMMANDS: list[tuple[list[str], Any, str]] = [
    (["evaluate", "run"], evaluating, "evaluate"),
    (["predict", "run", "file"], predicting, "predict"),
    (["export", "run", "exported"], export, "export"),
]


@pytest.mark.parametrize(("command", "module", "function"), COMMANDS)
def test_a_missing_extra_is_named(
    command: list[str],
    module: Any,
    function: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'orbax'", name="orbax")

    monkeypatch.setattr(module, function, missing)
    assert cli.main(command) == 2
    needed = f"pip install 'optim-zoo[train]' installs what {command[0]} needs"
    assert capsys.readouterr().err == f"optim-zoo: orbax is missing: {needed}\n"


@pytest.mark.parametrize(("command", "module", "function"), COMMANDS)
def test_ctrl_c_ends_a_command_in_one_sentence(
    command: list[str],
    module: Any,
    function: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, function, interrupted)
    assert cli.main(command) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "optim-zoo: interrupted\n"
