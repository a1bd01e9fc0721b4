"""The byte language model: its text, its windows, its loss computed by hand, and a short run."""

import dataclasses
import sysconfig
from pathlib import Path

import jax
import numpy as np
import pytest

from optim_zoo.errors import ArgumentError, UserError
from optim_zoo.train import config_file, loop, records
from optim_zoo.train.config import Stage
from optim_zoo.train.tasks.base import Setup
from optim_zoo.train.tasks.byte_language import corpus
from optim_zoo.train.tasks.byte_language.sections import Data, Model
from optim_zoo.train.tasks.byte_language.task import ByteLanguage
from optim_zoo.tree import Tree
from tests.train.one_device import OneDevice, use_devices

pytestmark = pytest.mark.usefixtures("quick_to_compile")

CONFIG = Path(__file__).parents[3] / "configs" / "byte_language.toml"
SIZES = Model(1, 8, 2, 16)


def stage(batch_size: int) -> Stage:
    return Stage(1, batch_size, 1, schedule={}, sections={}, table={}, settings={})


def a_task(text: Path | str, seed: int = 0, batch_size: int = 4, **data: float) -> ByteLanguage:
    sections = {"data": Data(str(text), **data), "model": SIZES}  # type: ignore[arg-type]
    return ByteLanguage(Setup(sections, [stage(batch_size)], seed, 16, Path()))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(9):
        words = " ".join(f"{number}:{word}" for word in range(100))
        (folder / f"{number}.txt").write_text(words, encoding="utf-8")
    return folder / "*.txt"


@pytest.fixture(scope="module")
def params(task: ByteLanguage) -> Tree:
    return jax.jit(task.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def task(text: Path) -> ByteLanguage:
    return a_task(text, sequence_length=6)


# The text


def test_whole_files_are_held_out_without_regard_to_their_order() -> None:
    files = [bytes([65 + number]) * 100 for number in range(20)]
    train, held_out = corpus.split([*files, files[3]], 0.1)  # one file occurs twice
    assert len(held_out) == 200
    assert sorted(train + held_out) == sorted(b"".join(files))
    assert not set(train) & set(held_out)
    assert corpus.split(files[::-1], 0.1) == (train, held_out)


def test_of_a_single_file_the_end_is_held_out() -> None:
    assert corpus.split([b"0123456789"], 0.2) == (b"01234567", b"89")


def test_the_text_of_the_library_has_no_held_out_file_to_train_on() -> None:
    text = corpus.load("", 0.05, 32)
    total = len(text.train) + len(text.held_out)
    assert 3e6 < total < 5e6
    assert len(text.held_out) == pytest.approx(0.05 * total, rel=0.5)  # whole files
    train, held_out = text.train.tobytes(), text.held_out.tobytes()
    source = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_bytes()
    assert [source in train, source in held_out].count(True) <= 1
    ends = [held_out[start : start + 400] for start in range(0, len(held_out) - 400, 20_000)]
    assert not any(piece in train for piece in ends)


@pytest.mark.parametrize(
    ("pattern", "arguments", "word"),
    [
        ("nothing/*.txt", {}, "no file matches"),
        ("{folder}/*.txt", {"sequence_length": 1 << 19}, "data.sequence_length"),
        ("{folder}/*.txt", {"sequence_length": 0}, "sequence_length"),
        ("{folder}/*.txt", {"held_out": 0.0}, "held_out"),
    ],
)
def test_text_that_cannot_be_used_is_refused(
    text: Path, pattern: str, arguments: dict[str, float], word: str
) -> None:
    with pytest.raises((ArgumentError, UserError), match=word):
        a_task(pattern.format(folder=text.parent), **arguments)


def test_heads_that_do_not_divide_the_hidden_size_are_refused() -> None:
    with pytest.raises(ArgumentError, match="hidden_size"):
        dataclasses.replace(SIZES, num_heads=3)


# The windows


def test_batches_are_a_function_of_seed_and_number(text: Path, task: ByteLanguage) -> None:
    again, other = (a_task(text, seed, sequence_length=6) for seed in (0, 1))
    batch = task.batch(700, stage(32))["ids"]
    np.testing.assert_array_equal(batch, again.batch(700, stage(32))["ids"])
    assert not np.array_equal(batch, other.batch(700, stage(32))["ids"])
    for a, b in zip(task.held_out(), other.held_out(), strict=True):
        np.testing.assert_array_equal(a["ids"], b["ids"])


def test_the_order_of_windows_does_not_depend_on_the_batch_size(task: ByteLanguage) -> None:
    """The batches cross the end of a block of random numbers."""
    whole = task.batch(1, stage(800))["ids"]
    halves = [task.batch(number, stage(400))["ids"] for number in (2, 3)]
    np.testing.assert_array_equal(np.concatenate(halves), whole)
    assert np.unique(whole, axis=0).shape[0] > 600


def test_windows_are_pieces_of_their_part(text: Path, task: ByteLanguage) -> None:
    train, held_out = corpus.split([path.read_bytes() for path in text.parent.iterdir()], 0.05)
    assert all(row.tobytes() in train for row in task.batch(0, stage(50))["ids"])
    windows = np.concatenate([batch["ids"] for batch in task.held_out()])
    assert windows.shape == (16 * 4, 7)
    assert all(row.tobytes() in held_out for row in windows)
    assert windows[0].tobytes() == held_out[:7]
    assert windows[-1].tobytes() == held_out[-7:]


# The model


def test_a_position_reads_no_later_byte(task: ByteLanguage, params: Tree) -> None:
    ids = np.arange(12).reshape(2, 6)
    changed = ids.copy()
    changed[:, 4] = 200
    before, after = (jax.jit(task.model.apply)({"params": params}, x) for x in (ids, changed))
    different = np.any(np.asarray(before) != np.asarray(after), (0, 2))
    assert different.tolist() == [False, False, False, False, True, True]


def test_loss_and_accuracy_agree_with_a_computation_by_hand(
    task: ByteLanguage, params: Tree
) -> None:
    batch = task.batch(0, stage(5))
    measured = jax.jit(task.measure)(params, batch)
    ids = batch["ids"].astype(int)
    logits = np.asarray(jax.jit(task.model.apply)({"params": params}, ids[:, :-1]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, ids[:, 1:, None], -1).sum()
    assert float(measured["loss"][0]) == pytest.approx(expected, rel=1e-5)  # float32
    assert float(measured["accuracy"][0]) == (logits.argmax(-1) == ids[:, 1:]).sum()
    assert float(measured["loss"][1]) == float(measured["accuracy"][1]) == 5 * 6
    assert task.units(stage(5)) == 30


def test_the_baseline_predicts_by_byte_frequency(task: ByteLanguage) -> None:
    counts = np.bincount(task._train, minlength=256) + 1
    following = np.concatenate([batch["ids"][:, 1:] for batch in task.held_out()])
    expected = -np.log(counts / counts.sum())[following].mean()
    assert task.baseline is not None
    assert task.baseline.metrics["loss"] == pytest.approx(expected)
    assert task.baseline.metrics["accuracy"] == pytest.approx(np.mean(following == ord(":")))


# The job


def test_a_short_run_learns(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_devices(monkeypatch, OneDevice())
    keys = [
        f"data.text={text}",
        "data.sequence_length=8",
        "model.num_layers=1",
        "model.hidden_size=8",
        "model.intermediate_size=8",
        "train.batch_size=8",
        "train.micro_batches=2",
        "train.steps=20",
        "schedule.warmup_steps=3",
        "output.sinks=[]",
        "output.log_every=1",
    ]
    loop.run(config_file.load(CONFIG, keys), tmp_path / "run")
    losses = records.read(tmp_path / "run" / "metrics.jsonl").train["loss"][1]
    assert losses[-1] < losses[0] - 1  # nats
