"""A tokenized text: its training part, its held-out part, and their cache on disk."""

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from optim_zoo.errors import UserError
from optim_zoo.train.tasks.bert.vocabulary import (
    Tokens,
    Vocabulary,
    digest_of,
    encode,
)
from optim_zoo.train.tasks.masked_language import batches, sections, text

# Increased whenever the same text and vocabulary give other tokens or another file than before.
_FORMAT = 1
_HEADER = np.dtype([("train", "<i8"), ("held_out", "<i8")])


@dataclass(frozen=True)
class Corpus:
    """A tokenized text with [SEP] between documents, split into a training and a held-out part."""

    train: Tokens  # (num_train,), memory-mapped
    held_out: Tokens  # (num_held_out,), memory-mapped
    vocabulary: Vocabulary
    digest: str  # hex SHA-256 of text, vocabulary, held_out and format
    unknown: float  # the share of unknown tokens ([UNK]) in both parts, in [0, 1]


def load(
    text_pattern: str,
    vocabulary: Vocabulary,
    held_out: float,
    cache_folder: str | os.PathLike[str],
    *,
    field: str = "",
    sequence_length: int = sections.MIN_SEQUENCE_LENGTH,
) -> Corpus:
    """Returns the corpus of `text.read(text_pattern, field)`, whose tokens `cache_folder` keeps.

    Args:
      text_pattern: see `text.read`.
      vocabulary: the WordPieces to encode it with.
      held_out: the fraction of the tokens to hold out, in (0, 1).
      cache_folder: is created if necessary. The text is tokenized once.
      field: see `text.read`.
      sequence_length: each part must have enough tokens for one sequence of this length, which is
        at least 8.

    Raises:
      UserError: text, fraction or folder cannot be used, or a part is too short.
      ValueError: ``sequence_length`` is below 8.
    """
    if not 0 < held_out < 1:
        raise UserError(
            f"held_out: expected a fraction of the tokens between 0 and 1, got {held_out}; 0.05 is "
            "usual."
        )
    documents = text.read(text_pattern, field)
    digest = digest_of([str(_FORMAT), repr(float(held_out)), vocabulary.digest, *documents])
    path = Path(cache_folder) / f"{digest[:32]}.tokens"
    if not _is_whole(path, vocabulary.dtype):
        parts = split(documents, encode(documents, vocabulary), vocabulary, held_out)
        _require_windows(*parts, sequence_length)
        _write(path, *parts)
    train, rest = _map(path, vocabulary.dtype)
    _require_windows(train, rest, sequence_length)
    unknown = sum(_count(part, vocabulary.unk) for part in (train, rest))
    return Corpus(train, rest, vocabulary, digest, unknown / (len(train) + len(rest)))


def split(
    documents: Sequence[str], encoded: Sequence[Tokens], vocabulary: Vocabulary, held_out: float
) -> tuple[Tokens, Tokens]:
    """Returns the training and the held-out tokens, with [SEP] between documents.

    A document is held out if the hash of its text, as a number in [0, 1), is below ``held_out``.
    Text that is added later therefore moves no other document. The held-out documents are in the
    order of their hashes, so that a few windows from the start are a fair sample. If this would
    hold out less than half or more than twice the fraction (few documents, or a very long one),
    the held-out part is the end of the whole stream instead, which may begin inside a document.

    Args:
      documents: the texts.
      encoded: the tokens of each.
      vocabulary: their vocabulary.
      held_out: the fraction of the tokens to hold out, in (0, 1).
    """
    hashes = np.array([_uniform(document) for document in documents])
    lengths = np.array([len(tokens) for tokens in encoded])
    share = lengths[hashes < held_out].sum() / max(lengths.sum(), 1)
    if held_out / 2 <= share <= held_out * 2 and share < 1:
        train = [
            tokens for tokens, number in zip(encoded, hashes, strict=True) if number >= held_out
        ]
        rest = [encoded[index] for index in np.argsort(hashes) if hashes[index] < held_out]
        return _join(train, vocabulary), _join(rest, vocabulary)
    stream = _join(encoded, vocabulary)
    cut = len(stream) - round(held_out * len(stream))
    return stream[:cut], stream[cut:]


def _count(tokens: Tokens, token: int) -> int:
    """Counts a token, a slice at a time because a stream may be larger than memory."""
    size = 1 << 24
    slices = (tokens[start : start + size] for start in range(0, len(tokens), size))
    return sum(int(np.count_nonzero(part == token)) for part in slices)


def _uniform(document: str) -> float:
    """Returns the hash of a text as a number in [0, 1)."""
    return int(digest_of([document])[:13], 16) / 16**13  # 52 bits are exact in a float


def _join(encoded: Sequence[Tokens], vocabulary: Vocabulary) -> Tokens:
    """Returns the tokens of all documents as one stream, with [SEP] between documents."""
    separator = np.array([vocabulary.sep], vocabulary.dtype)
    pieces = [piece for tokens in encoded for piece in (tokens, separator)][:-1]
    return np.concatenate([np.empty(0, vocabulary.dtype), *pieces])


def _is_whole(path: Path, dtype: np.dtype[np.unsignedinteger]) -> bool:
    """Returns whether a cache file exists and has the length that its header gives."""
    try:
        header = np.fromfile(path, _HEADER, count=1)
        size = path.stat().st_size
    except OSError:
        return False
    return bool(
        len(header) == 1
        and size == _HEADER.itemsize + (header["train"] + header["held_out"])[0] * dtype.itemsize
    )


def _write(path: Path, train: Tokens, held_out: Tokens) -> None:
    """Writes a cache file under a temporary name, then moves it into place in one step."""
    partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "xb") as file:
                file.write(np.array((len(train), len(held_out)), _HEADER).tobytes())
                file.write(train.data)
                file.write(held_out.data)
                file.flush()
                os.fsync(file.fileno())  # or a power cut could leave a file without its content
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        needed = (train.nbytes + held_out.nbytes) / 1e6
        raise UserError(
            f"token cache: expected a folder with {needed:.1f} MB free to write to, but "
            f"{path.parent} cannot be written ({error.strerror}); free space, change its "
            "permissions or choose another folder."
        ) from error


def _map(path: Path, dtype: np.dtype[np.unsignedinteger]) -> tuple[Tokens, Tokens]:
    """Returns the two parts of a cache file, read-only and memory-mapped."""
    header = np.fromfile(path, _HEADER, count=1)[0]
    stored = np.memmap(path, dtype, mode="r", offset=_HEADER.itemsize)
    stream = np.asarray(stored)  # A memmap is slow to index; this view maps the file too.
    return stream[: header["train"]], stream[header["train"] :]


def _require_windows(train: Tokens, held_out: Tokens, sequence_length: int) -> None:
    """Raises `UserError` unless each part has enough tokens for one sequence."""
    needed = batches.window_width(sequence_length)
    for part, tokens in (("training", train), ("held-out", held_out)):
        if len(tokens) < needed:
            raise UserError(
                f"text: expected at least {needed} tokens in the {part} part for one sequence of "
                f"{sequence_length}, but it has {len(tokens)} (training {len(train)}, held-out "
                f"{len(held_out)}); add text, shorten the sequences or change held_out."
            )
