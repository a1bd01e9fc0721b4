"""Splitting a text, and loading it with the token cache."""

import errno
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from optim_zoo.errors import UserError
from optim_zoo.train.tasks.bert.vocabulary import (
    SPECIAL_TOKENS,
    Vocabulary,
    encode,
    read_vocabulary,
)
from optim_zoo.train.tasks.masked_language import corpus
from optim_zoo.train.tasks.masked_language.batches import held_out_batches
from tests.train.tasks.masked_language.small_text import SENTENCE, WORDS, windows, write_vocabulary

Documents = set[tuple[int, ...]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder with sixty short documents and a small vocabulary."""
    for number in range(60):
        (tmp_path / f"{number:02}.txt").write_text(SENTENCE * (20 + number % 7) + "." * number)
    write_vocabulary(tmp_path / "vocabulary", [*SPECIAL_TOKENS, *WORDS])
    return tmp_path


def load(folder: Path, **changes: object) -> corpus.Corpus:
    arguments: dict[str, object] = {
        "text_pattern": f"{folder}/*.txt",
        "vocabulary": read_vocabulary(str(folder / "vocabulary")),
        "held_out": 0.2,
        "cache_folder": folder / "cache",
    }
    return corpus.load(**{**arguments, **changes})  # type: ignore[arg-type]


def cache_files(folder: Path) -> list[Path]:
    return sorted((folder / "cache").iterdir())


def documents(count: int) -> list[str]:
    return [f"document {number} " + SENTENCE * 3 for number in range(count)]


def split(texts: list[str], vocabulary: Vocabulary, held_out: float) -> tuple[Documents, Documents]:
    """Returns the documents of both parts, as tuples of tokens."""
    parts = corpus.split(texts, encode(texts, vocabulary), vocabulary, held_out)
    pieces = [np.split(part, np.flatnonzero(part == vocabulary.sep)) for part in parts]
    train, rest = (
        {tuple(piece[piece != vocabulary.sep].tolist()) for piece in part} for part in pieces
    )
    return train, rest


def test_split_divides_no_document(vocabulary: Vocabulary) -> None:
    texts = documents(400)
    train, rest = split(texts, vocabulary, 0.1)
    assert train | rest == {tuple(ids.tolist()) for ids in encode(texts, vocabulary)}
    assert not train & rest
    # The limit is five standard deviations of a binomial count, as for a random hash.
    assert abs(len(rest) - 40) < 5 * math.sqrt(400 * 0.1 * 0.9)


def test_adding_text_moves_no_document_to_another_part(vocabulary: Vocabulary) -> None:
    train, rest = split(documents(200), vocabulary, 0.1)
    more_train, more_rest = split(documents(400)[::-1], vocabulary, 0.1)
    assert train < more_train
    assert rest < more_rest


def test_copies_of_a_document_go_to_the_same_part(vocabulary: Vocabulary) -> None:
    train, rest = split(documents(200) * 2, vocabulary, 0.1)
    assert not train & rest


@pytest.mark.parametrize("count", [1, 2, 3])
def test_with_few_documents_the_end_of_the_stream_is_held_out(
    vocabulary: Vocabulary, count: int
) -> None:
    texts = [SENTENCE * 100] + ["short text"] * (count - 1)
    encoded = encode(texts, vocabulary)
    train, rest = corpus.split(texts, encoded, vocabulary, 0.05)
    stream = np.concatenate([train, rest])
    np.testing.assert_array_equal(stream[: len(encoded[0])], encoded[0])
    assert np.count_nonzero(stream == vocabulary.sep) == count - 1
    assert len(rest) == round(0.05 * len(stream))


def test_a_long_document_does_not_change_the_size_of_the_held_out_part(
    vocabulary: Vocabulary,
) -> None:
    held_out_one = next(text for text in documents(100) if corpus._uniform(text) < 0.1)
    texts = [held_out_one, *(text for text in documents(20) if text != held_out_one)]
    encoded = encode(texts, vocabulary)
    encoded[0] = np.tile(encoded[0], 100)
    train, rest = corpus.split(texts, encoded, vocabulary, 0.1)
    assert len(rest) == round(0.1 * (len(train) + len(rest)))


def test_held_out_windows_do_not_occur_in_the_training_part(vocabulary: Vocabulary) -> None:
    texts = [f"{' '.join(f'{number}x{word}' for word in range(40))}" for number in range(200)]
    train, rest = corpus.split(texts, encode(texts, vocabulary), vocabulary, 0.1)
    width = 61
    trained = {row.tobytes() for row in np.lib.stride_tricks.sliding_window_view(train, width)}
    batches = held_out_batches(
        rest, vocabulary, seed=0, batch_size=8, sequence_length=64, num_batches=1000
    )
    held_out = [row for batch in batches for row in windows(batch, vocabulary)]
    assert len(held_out) > 20
    assert not any(np.array(row, train.dtype).tobytes() in trained for row in held_out)


def test_load_returns_both_parts_and_the_vocabulary(folder: Path) -> None:
    loaded = load(folder)
    texts = [path.read_text() for path in sorted(folder.glob("*.txt"))]
    vocabulary = read_vocabulary(str(folder / "vocabulary"))
    train, rest = corpus.split(texts, encode(texts, vocabulary), vocabulary, 0.2)
    np.testing.assert_array_equal(loaded.train, train)
    np.testing.assert_array_equal(loaded.held_out, rest)
    assert loaded.vocabulary == vocabulary
    assert loaded.train.dtype == np.uint16
    assert not loaded.train.flags.writeable


def test_a_second_load_does_not_tokenize(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(folder)

    def refuse(*arguments: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr("optim_zoo.train.tasks.masked_language.corpus.encode", refuse)
    second = load(folder)
    np.testing.assert_array_equal(second.train, first.train)
    np.testing.assert_array_equal(second.held_out, first.held_out)
    assert second.digest == first.digest


def change_text(folder: Path) -> dict[str, object]:
    (folder / "00.txt").write_text(SENTENCE * 21)
    return {}


def change_cut_between_documents(folder: Path) -> dict[str, object]:
    content = (folder / "01.txt").read_text()
    (folder / "00.txt").write_text((folder / "00.txt").read_text() + content[:4])
    (folder / "01.txt").write_text(content[4:])
    return {}


def change_vocabulary(folder: Path) -> dict[str, object]:
    write_vocabulary(folder / "vocabulary", [*SPECIAL_TOKENS, *WORDS[::-1]])
    return {}


def change_held_out(folder: Path) -> dict[str, object]:
    return {"held_out": 0.1999}


@pytest.mark.parametrize(
    "change",
    [change_text, change_cut_between_documents, change_vocabulary, change_held_out],
)
def test_a_changed_input_changes_the_cache_key(
    folder: Path, change: Callable[[Path], dict[str, object]]
) -> None:
    first = load(folder)
    second = load(folder, **change(folder))
    assert first.digest != second.digest
    assert len(cache_files(folder)) == 2


@pytest.mark.parametrize("size", [0, 7, 16, 17, -1, -2])
def test_an_incomplete_cache_file_is_replaced(folder: Path, size: int) -> None:
    first = load(folder)
    train, held_out = first.train.copy(), first.held_out.copy()
    del first
    (path,) = cache_files(folder)
    content = path.read_bytes()
    path.write_bytes(content[:size])
    second = load(folder)
    np.testing.assert_array_equal(second.train, train)
    np.testing.assert_array_equal(second.held_out, held_out)
    assert path.read_bytes() == content


def test_a_kill_before_the_move_leaves_no_cache_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(Killed):
            load(folder)
    assert not list(folder.glob("cache/*.tokens"))
    assert len(load(folder).train) > 0


def test_a_full_disk_is_an_error_and_leaves_no_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"token cache: .*No space left on device.*free space"):
        load(folder)
    assert cache_files(folder) == []


def test_a_cache_folder_that_cannot_be_created_is_an_error(folder: Path) -> None:
    with pytest.raises(UserError, match="token cache: expected a folder"):
        load(folder, cache_folder=folder / "vocabulary" / "tokens")


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.1, math.nan])
def test_held_out_must_be_a_fraction(folder: Path, held_out: float) -> None:
    with pytest.raises(UserError, match="held_out: expected a fraction"):
        load(folder, held_out=held_out)


def test_parts_shorter_than_a_sequence_are_an_error(folder: Path) -> None:
    (folder / "one.text").write_text(SENTENCE * 2)  # 22 tokens
    pattern = f"{folder}/*.text"
    with pytest.raises(
        UserError, match=r"at least 5 tokens in the held-out .* it has 4 \(training"
    ):
        load(folder, text_pattern=pattern)
    with pytest.raises(UserError, match=r"at least 61 tokens in the training .* it has 11 "):
        load(folder, text_pattern=pattern, held_out=0.5, sequence_length=64)
    load(folder, text_pattern=pattern, held_out=0.5)
    with pytest.raises(UserError, match="at least 61 tokens"):  # from the cache as well
        load(folder, text_pattern=pattern, held_out=0.5, sequence_length=64)


def test_text_without_a_token_is_an_error(folder: Path) -> None:
    (folder / "one.text").write_text("\x01\x02")
    with pytest.raises(UserError, match="it has 0"):
        load(folder, text_pattern=f"{folder}/*.text")
