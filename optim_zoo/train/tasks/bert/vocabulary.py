"""WordPiece vocabularies, and text encoded with them."""

import functools
import hashlib
import importlib.resources
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from optim_zoo.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

_BLOCK = 1 << 16  # characters encoded at a time, so that all cores share a long document

Tokens = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Vocabulary:
    """WordPiece tokens. The id of a token is its index."""

    tokens: tuple[str, ...]
    pad: int  # ids of the five special tokens
    unk: int
    cls: int
    sep: int
    mask: int
    digest: str  # hex SHA-256 of the tokens in order

    @property
    def size(self) -> int:
        """The number of tokens."""
        return len(self.tokens)

    @property
    def special(self) -> tuple[int, ...]:
        """The ids of the five special tokens, in ascending order."""
        return tuple(sorted((self.pad, self.unk, self.cls, self.sep, self.mask)))

    @functools.cached_property
    def continues(self) -> npt.NDArray[np.bool_]:
        """Whether a token continues a word, as ``##s`` does: ``(size,)``."""
        return np.array([token.startswith("##") for token in self.tokens])

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The smallest of uint16 and uint32 that can hold every id."""
        return np.dtype("<u2") if self.size <= 1 << 16 else np.dtype("<u4")


def read_vocabulary(path: str) -> Vocabulary:
    """Returns the vocabulary in a file.

    Args:
      path: a text file with one token per line; "" for the vocabulary bundled with optim_zoo.

    Raises:
      UserError: the file cannot be read, lacks a special token, or has a token twice.
    """
    if path == "":
        packaged = importlib.resources.files(__package__) / "vocabulary.txt"
        data = packaged.read_bytes()
    else:
        data = _vocabulary_bytes(path)
    name = path or "vocabulary.txt"
    try:
        tokens = tuple(data.decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"vocabulary: expected UTF-8, but {name} has an invalid byte at offset {error.start}; "
            "name a text file with one WordPiece token per line."
        ) from error
    return of_tokens(tokens, name)


def of_tokens(tokens: Sequence[str], name: str) -> Vocabulary:
    """Returns the vocabulary with these tokens, whose ids are their indices.

    Args:
      tokens: the tokens.
      name: the file that they come from, for messages.

    Raises:
      UserError: a special token is missing, a token occurs twice, or there are only special ones.
    """
    place = {token: number for number, token in enumerate(tokens)}
    missing = [token for token in SPECIAL_TOKENS if token not in place]
    if missing:
        raise UserError(
            f"vocabulary: expected one token per line with {' '.join(SPECIAL_TOKENS)} among them, "
            f"but {name} lacks {' '.join(missing)}; add a line for each."
        )
    if len(place) < len(tokens):
        twice = next(token for number, token in enumerate(tokens) if place[token] != number)
        raise UserError(
            f"vocabulary: expected every token once, but {name} has {twice!r} on lines "
            f"{tokens.index(twice) + 1} and {place[twice] + 1}; remove one of them."
        )
    if len(tokens) == len(SPECIAL_TOKENS):
        raise UserError(
            f"vocabulary: expected more than the special tokens, but {name} has no other; add some."
        )
    pad, unk, cls, sep, mask = (place[token] for token in SPECIAL_TOKENS)
    return Vocabulary(tuple(tokens), pad, unk, cls, sep, mask, digest_of(tokens))


def tokenizer(vocabulary: Vocabulary) -> "Tokenizer":
    """Returns BERT's WordPiece tokenizer, which adds no [CLS] and [SEP] to the text.

    Text is lowercased unless the vocabulary has the token "A", as every cased one does. Where the
    text itself spells out a special token ("[MASK]"), this is treated as plain text.
    """
    # Imported lazily: a program that encodes no text works without tokenizers.
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    built = Tokenizer(models.WordPiece(vocab=ids, unk_token="[UNK]"))
    built.normalizer = normalizers.BertNormalizer(lowercase="A" not in ids)
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return built


def encode(documents: Sequence[str], vocabulary: Vocabulary) -> list[Tokens]:
    """Returns the token ids of each document, ``(length,)`` of uint16 or uint32."""
    encoder = tokenizer(vocabulary)
    return [_encode_one(document, encoder, vocabulary.dtype) for document in documents]


def digest_of(strings: Iterable[str]) -> str:
    """Returns the SHA-256 of a list of strings, in hexadecimal.

    The length of each string is hashed too, so that two lists never give the same bytes.
    """
    sha = hashlib.sha256()
    for string in strings:
        data = string.encode("utf-8")
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)
    return sha.hexdigest()


def _vocabulary_bytes(path: str) -> bytes:
    """Returns the content of the user's vocabulary file."""
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(
            f"vocabulary: expected a file with one WordPiece token per line, but {path} cannot "
            f'be read ({error.strerror}); correct the path, or use "" for the bundled one.'
        ) from error


def _encode_one(document: str, encoder: "Tokenizer", dtype: np.dtype[np.unsignedinteger]) -> Tokens:
    """Returns the token ids of one document, whose blocks are encoded separately.

    This gives the same tokens, because no token extends over the end of a line.
    """
    encodings = encoder.encode_batch_fast(list(_blocks(document)), add_special_tokens=False)
    return np.concatenate([np.array(encoding.ids, dtype) for encoding in encodings])


def _blocks(document: str) -> Iterator[str]:
    """Splits a document into blocks of whole lines, of about ``_BLOCK`` characters each."""
    start = 0
    while start < len(document) or start == 0:
        end = document.find("\n", start + _BLOCK)
        end = len(document) if end < 0 else end + 1
        yield document[start:end]
        start = end
