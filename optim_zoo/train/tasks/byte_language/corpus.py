"""The bytes that a model is trained on and those that are held out.

Whole files are held out, by a hash of their contents, so that the split depends neither on a seed
nor on the folder in which the files are.
"""

import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from optim_zoo.errors import UserError
from optim_zoo.train.tasks import text_files

_LIBRARY_BYTES = 4_000_000  # of the standard library: more than a small model can memorize
_TABLES = "encodings"  # a folder of the library that mostly holds tables of characters


class Corpus(NamedTuple):
    """A text as bytes."""

    train: np.ndarray  # (num_train,) of uint8
    held_out: np.ndarray  # (num_held_out,) of uint8
    digest: str  # hex SHA-256 of both


def load(pattern: str, held_out: float, sequence_length: int) -> Corpus:
    """Returns the bytes of the files that a glob matches.

    Args:
      pattern: a path or a glob of UTF-8 files, which may be compressed with gzip; "" selects about
        4 MB of the source of Python's standard library.
      held_out: the fraction of the bytes to hold out, in (0, 1); see `split`.
      sequence_length: each part must be longer than this.

    Raises:
      UserError: nothing matches, a file cannot be read or is not UTF-8, or a part is too short.
    """
    if pattern == "":
        contents = _library()
    else:
        contents = [text_files.read(path).encode() for path in text_files.matches(pattern)]
        if not contents:
            raise UserError(
                "text: expected a file name or a glob of text files, but no file matches "
                f"{pattern!r}; correct the pattern ('**' reaches into subfolders), or use \"\" for "
                "the source of Python's standard library."
            )
    train, rest = split(contents, held_out)
    for name, part in (("training", train), ("held-out", rest)):
        if len(part) <= sequence_length:
            raise UserError(
                f"text: expected a {name} part of more than data.sequence_length={sequence_length} "
                f"bytes, but it has {len(part)}; add text, or change data.held_out or "
                "data.sequence_length."
            )
    digest = hashlib.sha256(len(train).to_bytes(8, "little") + train + rest).hexdigest()
    return Corpus(np.frombuffer(train, np.uint8), np.frombuffer(rest, np.uint8), digest)


def split(contents: Iterable[bytes], held_out: float) -> tuple[bytes, bytes]:
    """Returns the joined files to train on, and those to hold out.

    The files are in the order of the hashes of their contents, without duplicates. The first ones
    are held out, until they have the fraction ``held_out`` of all bytes; each part has at least one
    file. Of a single file the end is held out.
    """
    files = _in_order(contents)
    total = sum(map(len, files))
    if len(files) == 1:
        end = total - round(held_out * total)
        return files[0][:end], files[0][end:]
    cut = 1
    while cut < len(files) - 1 and sum(map(len, files[:cut])) < held_out * total:
        cut += 1
    return b"".join(files[cut:]), b"".join(files[:cut])


def _in_order(contents: Iterable[bytes]) -> list[bytes]:
    """Returns the contents in the order of their hashes, without duplicates."""
    return sorted(set(contents), key=lambda content: hashlib.sha256(content).digest())


def _library() -> list[bytes]:
    """Returns files of the standard library, about 4 MB in all.

    Raises:
      UserError: Python was installed without its source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules = [
        path.read_bytes()
        for path in text_files.library_modules(root)
        if _TABLES not in path.relative_to(root).parts
    ]
    chosen: list[bytes] = []
    size = 0
    for content in _in_order(modules):
        if size >= _LIBRARY_BYTES:
            break
        chosen.append(content)
        size += len(content)
    if len(chosen) < 2:
        raise UserError(
            f"text: expected the standard library's source files in {root}, but found "
            f"{len(chosen)}; name your own text files instead."
        )
    return chosen
