"""The tagging task: its numbers computed by hand, its batches, and what every run promises."""

import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from optim_zoo import cli, train
from optim_zoo.errors import UserError
from optim_zoo.train import config_file, evaluating, loop, records
from optim_zoo.train.tasks.token_tagging.task import TokenTagging
from tests.train.one_device import OneDevice, use_devices
from tests.train.tasks.token_tagging import conlleval
from tests.train.tasks.token_tagging.small_text import write_tagged_text

pytestmark = pytest.mark.usefixtures("compiled", "quick_to_compile")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tagged_text(tmp_path_factory.mktemp("tagged"))


def make(config: Path, folder: Path, *overrides: str) -> TokenTagging:
    task = config_file.make_task(config_file.load(config, overrides), folder / "tokens")
    assert isinstance(task, TokenTagging)
    return task


def test_the_numbers_agree_with_a_computation_word_by_word(config: Path, tmp_path: Path) -> None:
    task = make(config, tmp_path)
    # Scaled, so that predictions differ from word to word.
    params = jax.tree.map(lambda x: 20 * x, jax.jit(task.init)(jax.random.key(0)))
    (first, *_) = task.held_out()
    measured = {
        name: (float(total), float(weight))
        for name, (total, weight) in jax.jit(task.measure)(params, first).items()
    }
    apply = jax.jit(functools.partial(task.model.apply, deterministic=True))
    total, gold, predicted = 0.0, [], []
    for row in range(len(first["labels"])):
        count = int(first["word_weights"][row].sum())
        length = int(first["attention_mask"][row].sum())
        if not count:
            continue
        # Without any padding.
        logits: Any = apply({"params": params}, first["input_ids"][row, :length])
        logits = np.asarray(logits, np.float64)[first["word_positions"][row, :count]]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        labels = first["labels"][row, :count]
        total -= log_p[np.arange(count), labels].sum()
        gold.append([task.scheme.labels[i] for i in labels])
        predicted.append([task.scheme.labels[i] for i in logits.argmax(-1)])
    correct, found, present = conlleval.evaluate(gold, predicted)
    words = sum(map(len, gold))
    right = sum(
        a == b for x, y in zip(gold, predicted, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert measured["loss"] == (pytest.approx(total, rel=1e-4), words)  # float32, and padding
    assert measured["accuracy"] == (right, words)
    assert 0 < correct.total() < found.total()
    assert measured["precision"] == (correct.total(), found.total())
    assert measured["recall"] == (correct.total(), present.total())
    assert measured["f1"] == (2 * correct.total(), found.total() + present.total())
    for name in ("LOC", "PER"):
        assert measured[f"f1/{name}"] == (2 * correct[name], found[name] + present[name])


def test_the_confusion_matrix_has_the_share_of_each_class(config: Path, tmp_path: Path) -> None:
    task = make(config, tmp_path)
    params = jax.tree.map(lambda x: 20 * x, jax.jit(task.init)(jax.random.key(0)))
    batch = task.held_out()[0]
    measured = jax.jit(task.measure)(params, batch)
    names = ["LOC", "PER", "O"]
    cells = np.array([[measured[f"confusion/{a}/{b}"] for b in names] for a in names])
    words = batch["labels"][batch["word_weights"] > 0]
    classes = np.array(task.scheme.class_of)[words]
    assert cells[:, 0, 1].tolist() == [(classes == i).sum() for i in (0, 1, -1)]
    np.testing.assert_array_equal(cells[..., 0].sum(1), cells[:, 0, 1])
    same = np.trace(cells[..., 0])
    assert measured["accuracy"][0] <= same < len(words)


def test_the_baseline_is_the_majority_class(config: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.conll"
    plain.write_text("a N\nb N\n\nc V\n\nd N\na V\n")
    task = make(config, tmp_path, f"data.text={plain}", f"data.held_out_text={plain}")
    assert task.baseline is not None
    assert task.baseline.metrics["accuracy"] == 0.6
    assert task.baseline.metrics["f1"] == pytest.approx(0.6)  # every word is an entity
    assert task.baseline.metrics["loss"] == pytest.approx(
        -(3 * np.log(4 / 7) + 2 * np.log(3 / 7)) / 5
    )


def test_an_epoch_has_every_example_once(config: Path, tmp_path: Path) -> None:
    """Batches are a pure function of seed and number, and each sequence has a dropout key."""
    task, again = make(config, tmp_path), make(config, tmp_path)
    other = make(config, tmp_path, "run.seed=1")
    (stage,) = config_file.load(config).stages
    count = len(task._train)
    rows = [
        row.tobytes() for number in range(count) for row in task.batch(number, stage)["input_ids"]
    ]
    # Eight epochs.
    assert sorted(rows) == sorted(8 * [bytes(_padded(each.ids, 12)) for each in task._train])
    for name, array in task.batch(3, stage).items():
        np.testing.assert_array_equal(array, again.batch(3, stage)[name])
    assert not np.array_equal(task.batch(3, stage)["input_ids"], other.batch(3, stage)["input_ids"])
    assert len(np.unique(task.batch(3, stage)["dropout_keys"], axis=0)) == 8


def _padded(ids: np.ndarray, length: int) -> np.ndarray:
    return np.pad(ids, (0, length - len(ids)))  # the id of [PAD] is 0


def test_a_run_keeps_its_labels_without_its_data(config: Path, tmp_path: Path) -> None:
    """A run with a checkpoint keeps the labels that it began with."""
    labels = make(config, tmp_path).scheme.labels
    assert labels == ("B-LOC", "B-PER", "I-PER", "O")
    fewer = tmp_path / "fewer.conll"
    fewer.write_text("a O\nb B-PER\n\nc O\n")
    changed = (f"data.text={fewer}", "data.held_out_text=unset")
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    assert make(config, tmp_path, *changed).scheme.labels == labels
    bare = config_file.make_task(
        config_file.load(config, ["data.text=gone"]), tmp_path / "tokens", reads_data=False
    )
    assert isinstance(bare, TokenTagging)
    assert bare.scheme.labels == labels
    shutil.rmtree(tmp_path / "checkpoints")
    assert make(config, tmp_path, *changed).scheme.labels == ("B-PER", "O")


# Whole runs


def run(config: Path, folder: Path, *overrides: str) -> tuple[list[float], list[float]]:
    """Returns the training losses and the held-out F1 of a run."""
    loop.run(config_file.load(config, overrides), folder)
    seen = records.read(folder / "metrics.jsonl")
    assert {"loss", "accuracy", "precision", "recall", "f1/PER"} < seen.held_out.keys()
    return list(seen.train["loss"][1]), list(seen.held_out["f1"][1])


@pytest.mark.slow
def test_a_resumed_run_has_the_same_numbers_to_the_bit(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_devices(monkeypatch, OneDevice())
    expected = run(config, tmp_path / "run")
    before = checksums(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    assert run(config, tmp_path / "run") == expected
    assert checksums(tmp_path / "run") == before
    loaded = train.load(tmp_path / "run")
    assert loaded.apply([[2, 5, 3], [2, 3, 0]], [[1, 1, 1], [1, 1, 0]]).shape == (2, 3, 4)
    assert_predictions(loaded)
    assert_evaluates_text_with_fewer_labels(tmp_path)


def assert_evaluates_text_with_fewer_labels(folder: Path) -> None:
    """The labels are those of the run, with which other text need not agree."""
    (folder / "other.conll").write_text("anna B-PER\n\nrain O\n\nbert B-PER\n")
    other = (f"data.text={folder}/other.conll", f"data.held_out_text={folder}/other.conll")
    values = evaluating.evaluate(folder / "run", other).values
    assert {"f1/LOC", "f1/PER"} < values.keys()
    (folder / "other.conll").write_text("anna B-NAME\n\nrain O\n")
    with pytest.raises(UserError, match="'anna' has the label 'B-NAME'; the labels are B-LOC"):
        evaluating.evaluate(folder / "run", other)


def assert_predictions(loaded: Any) -> None:
    """All formats of the same words give the same tags."""
    words = "anna sees new york , bert"
    plain = list(loaded.task.predict(loaded, [words, "", "rain"]))
    assert [line.split("\t")[0] for line in plain] == [*words.split(), "", "rain"]
    assert all(line.split("\t")[1] in loaded.task.scheme.labels for line in plain if line)
    for end in ("", " O", "\tO"):
        lines = [f"{word}{end}" for word in words.split()]
        assert list(loaded.task.predict(loaded, [*lines, "", f"rain{end}"])) == plain
    (line,) = loaded.task.predict(loaded, ["rain"], top=9)
    word, tag, shares = line.split("\t")
    numbers = [float(share.split()[1]) for share in shares.split(", ")]
    assert shares.startswith(f"{tag} ")
    assert word == "rain"
    assert sum(numbers) == pytest.approx(1, abs=3e-4)  # four digits of each of four labels
    assert numbers == sorted(numbers, reverse=True)
    # More words than a sequence has tokens.
    assert len(list(loaded.task.predict(loaded, ["rain in " * 20]))) == 40


def checksums(folder: Path) -> dict[str, int]:
    """Returns the checksum of every array in the checkpoint of step 4."""
    record = json.loads((folder / "checkpoints" / "4" / "info" / "metadata").read_text())
    assert len(record["checksums"]) > 20
    return dict(record["checksums"])


@pytest.mark.slow
def test_every_layout_gives_the_same_losses(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accumulation and micro-batches weigh every word the same, whatever batch it is in."""
    layouts = {
        "jit": (),
        "shard_map": ("parallel.mode=shard_map",),
        "pmap": ("parallel.mode=pmap",),
        "zero1": ("parallel.zero1=true",),
    }
    losses = {name: run(config, tmp_path / name, *options) for name, options in layouts.items()}
    use_devices(monkeypatch, OneDevice())
    expected, f1 = run(config, tmp_path / "one")
    losses["micro_batches"] = run(config, tmp_path / "micro", "train.micro_batches=4")
    whole = run(config, tmp_path / "whole", "model.dropout=0")
    parts = ("model.dropout=0", "train.batch_size=2", "accumulation.every=4")
    # The keys of dropout depend on the number of the batch.
    accumulated = run(config, tmp_path / "accumulated", *parts, "output.evaluation_batches=32")
    np.testing.assert_allclose(accumulated[0], whole[0], rtol=1e-4)  # as below
    assert accumulated[1] == whole[1]
    for name, (found, score) in losses.items():
        # Sums in float32 are taken in another order, and LAMB carries the differences on.
        np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=name)
        assert score == f1, name


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("a X\n\nb X\n", (), "at least two labels .* every word has the label 'X'"),
        ("a X\nb Y\n", (), "at least two sentences"),
        ("a X\n\nb Y\n", ("data.held_out_text={folder}/other.conll",), "'c' has the label 'Z'"),
        ("a X\nb Y\n\nc Y\n", ("data.tag_column=3",), "expected a tag in column 3"),
        ("", (), "have no words"),
        ("a X\nb Y\n\nc Y\n", ("data.sequence_length=2",), "sequence_length must be >= 8"),
        (
            "a X\nb Y\n\nc Y\n",
            ("data.tag_column=0",),
            "tag_column must differ from word",
        ),
        ("a X\nb Y\n\nc Y\n", ("data.text=none*",), "no file matches 'none\\*'"),
    ],
)
def test_bad_input_ends_a_run_with_one_sentence(
    text: str,
    overrides: tuple[str, ...],
    message: str,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.conll").write_text(text)
    (tmp_path / "other.conll").write_text("c Z\n")
    own = (f"data.text={tmp_path}/text.conll", "data.held_out_text=unset", "data.held_out=0.5")
    changed = [each.format(folder=tmp_path) for each in (*own, *overrides)]
    assert cli.main(["train", str(config), f"run.dir={tmp_path / 'run'}", *changed]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not (tmp_path / "run" / "checkpoints").exists()
