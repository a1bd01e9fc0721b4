"""WordPiece vocabularies, and text encoded with them."""

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

_BLOCK = 1 << 16  # characters encoded at a time: long documents spread over the cores

Tokens = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Vocabulary:
    """WordPiece tokens; the id of a token is its place."""

    tokens: tuple[str, ...]
    pad: int  # ids of the five special tokens
    unk: int
    cls: int
    sep: int
    mask: int
    digest: str  # hex SHA-256 of the tokens in order

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return len(self.tokens)

    @property
    def special(self) -> tuple[int, ...]:
        """The five special ids in rising order."""
        return tuple(sorted((self.pad, self.unk, self.cls, self.sep, self.mask)))

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The smaller of uint16 and uint32 that holds every id."""
        return np.dtype("<u2") if self.size <= 1 << 16 else np.dtype("<u4")


def read_vocabulary(path: str) -> Vocabulary:
    """The vocabulary of a file with one token a line; "" is the one that comes with optim_zoo.

    Raises UserError for a file that cannot be read, lacks a special token or names a token twice.
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
            "name a text file with one WordPiece token a line."
        ) from error
    place = {token: number for number, token in enumerate(tokens)}
    missing = [token for token in SPECIAL_TOKENS if token not in place]
    if missing:
        raise UserError(
            f"vocabulary: expected one token a line with {' '.join(SPECIAL_TOKENS)} among them, "
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
            f"vocabulary: expected tokens besides the special ones, but {name} has none; add them."
        )
    pad, unk, cls, sep, mask = (place[token] for token in SPECIAL_TOKENS)
    return Vocabulary(tokens, pad, unk, cls, sep, mask, digest_of(tokens))


def tokenizer(vocabulary: Vocabulary) -> "Tokenizer":
    """BERT's WordPiece tokenizer, without [CLS] and [SEP] around the text.

    Text is lowercased unless the vocabulary has the token "A", as every cased one does. A special
    token spelled out in the text ("[MASK]") stays plain text.
    """
    # Imported here, because a program that encodes no text must run without tokenizers.
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    built = Tokenizer(models.WordPiece(vocab=ids, unk_token="[UNK]"))
    built.normalizer = normalizers.BertNormalizer(lowercase="A" not in ids)
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return built


def encode(documents: Sequence[str], vocabulary: Vocabulary) -> list[Tokens]:
    """Token ids of each document, `(length,)` each, uint16 or uint32."""
    encoder = tokenizer(vocabulary)
    return [_encode_one(document, encoder, vocabulary.dtype) for document in documents]


def digest_of(strings: Iterable[str]) -> str:
    """Hex SHA-256 of a list of strings, each preceded by its length so that no two lists agree."""
    sha = hashlib.sha256()
    for string in strings:
        data = string.encode("utf-8")
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)
    return sha.hexdigest()


def _vocabulary_bytes(path: str) -> bytes:
    """The content of the user's vocabulary file."""
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(
            f"vocabulary: expected a file with one WordPiece token a line, but {path} cannot be "
            f'read ({error.strerror}); correct the path, or use "" for the one that comes along.'
        ) from error


def _encode_one(document: str, encoder: "Tokenizer", dtype: np.dtype[np.unsignedinteger]) -> Tokens:
    """Token ids of one document: no token crosses a line, so its blocks of lines encode alone."""
    encodings = encoder.encode_batch_fast(list(_blocks(document)), add_special_tokens=False)
    return np.concatenate([np.array(encoding.ids, dtype) for encoding in encodings])


def _blocks(document: str) -> Iterator[str]:
    """Pieces of a document of about `_BLOCK` characters that end at line ends."""
    start = 0
    while start < len(document) or start == 0:
        end = document.find("\n", start + _BLOCK)
        end = len(document) if end < 0 else end + 1
        yield document[start:end]
        start = end
