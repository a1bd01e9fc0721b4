"""Reading vocabularies, and tokenizing with them."""

import dataclasses
import string
from pathlib import Path

import numpy as np
import pytest

from optim_zoo.errors import UserError
from optim_zoo.train.tasks.bert.vocabulary import (
    SPECIAL_TOKENS,
    Vocabulary,
    _blocks,
    encode,
    read_vocabulary,
)
from tests.train.tasks.masked_language.small_text import write_vocabulary


def test_the_packaged_vocabulary_has_the_special_tokens_first_and_all_of_ascii(
    vocabulary: Vocabulary,
) -> None:
    assert vocabulary.size == 4096
    assert vocabulary.tokens[:5] == SPECIAL_TOKENS
    assert vocabulary.special == (0, 1, 2, 3, 4)
    printable = string.ascii_lowercase + string.digits + string.punctuation
    assert set(printable) <= set(vocabulary.tokens)
    inside = {f"##{letter}" for letter in string.ascii_lowercase + string.digits}
    assert inside <= set(vocabulary.tokens)


def test_special_tokens_may_have_any_ids(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "v", ["a", *reversed(SPECIAL_TOKENS), "b"])
    vocabulary = read_vocabulary(path)
    assert (vocabulary.mask, vocabulary.sep, vocabulary.cls) == (1, 2, 3)
    assert (vocabulary.unk, vocabulary.pad) == (4, 5)
    assert vocabulary.special == (1, 2, 3, 4, 5)


def test_digest_depends_on_the_order_and_the_boundaries_of_tokens(tmp_path: Path) -> None:
    digests = {
        read_vocabulary(write_vocabulary(tmp_path / "v", [*SPECIAL_TOKENS, *rest])).digest
        for rest in (["ab", "c"], ["a", "bc"], ["c", "ab"])
    }
    assert len(digests) == 3


def test_ids_use_two_bytes_if_they_fit(vocabulary: Vocabulary) -> None:
    largest = dataclasses.replace(vocabulary, tokens=tuple(map(str, range(65_536))))
    larger = dataclasses.replace(vocabulary, tokens=tuple(map(str, range(65_537))))
    assert largest.dtype == np.uint16
    assert larger.dtype == np.uint32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"[PAD]\n[UNK]\n[CLS]\nword\n", r"lacks \[SEP\] \[MASK\]"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nx\ny\nx\n", "'x' on lines 6 and 8"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n", "expected more than the special tokens"),
        (b"[PAD]\n\xff", "invalid byte at offset 6"),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_an_error(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read_vocabulary(str(path))
    assert "mine.txt" in str(raised.value)


def test_encode_applies_wordpiece_to_lowercased_text(vocabulary: Vocabulary) -> None:
    (ids,) = encode(["The Naïve learning-rate xqzj."], vocabulary)
    pieces = [vocabulary.tokens[number] for number in ids]
    text = "".join(
        piece.removeprefix("##") if piece[:2] == "##" else f" {piece}" for piece in pieces
    )
    assert text == " the naive learning - rate xqzj ."
    assert vocabulary.unk not in ids


def test_a_cased_vocabulary_keeps_capitals(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "v", [*SPECIAL_TOKENS, "A", "a", "The"])
    (ids,) = encode(["The A a"], read_vocabulary(path))
    assert ids.tolist() == [7, 5, 6]


def test_special_tokens_spelled_out_in_the_text_are_plain_text(vocabulary: Vocabulary) -> None:
    (ids,) = encode(["[MASK] and [SEP] and [CLS]"], vocabulary)
    assert not set(ids.tolist()) & set(vocabulary.special)


def test_long_documents_are_encoded_in_pieces_with_the_same_tokens(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = "A line of text.\n\r\n\tAnother, longer line.\u0301\nunbelievably\u2028so" * 20
    (whole,) = encode([document], vocabulary)
    monkeypatch.setattr("optim_zoo.train.tasks.bert.vocabulary._BLOCK", 7)
    assert len(list(_blocks(document))) > 20
    assert "".join(_blocks(document)) == document
    (pieces,) = encode([document], vocabulary)
    np.testing.assert_array_equal(pieces, whole)
