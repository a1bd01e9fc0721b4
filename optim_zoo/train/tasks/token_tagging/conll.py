"""Reads and writes files in CoNLL format: one word per line, with a blank line after a sentence.

The columns of a line are separated by tabs where the line has one, and by blanks elsewhere. Lines
whose first column is ``-DOCSTART-`` are skipped. In a file with tabs, so are lines that begin with
``#`` and have no tab, which are the comments of CoNLL-U, and its ranges of words (``3-4``).
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from optim_zoo.errors import UserError
from optim_zoo.train.tasks import text_files

_BLANKS = re.compile(r"[ \t]+")
_RANGE = re.compile(r"\d+[-.]\d+")  # of CoNLL-U: 3-4 for a contraction, 3.1 for an omitted word


class Sentence(NamedTuple):
    """A sentence: its words, and one tag for each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


def read(pattern: str, *, key: str, word_column: int, tag_column: int) -> list[Sentence]:
    """Returns the sentences of the files that a glob matches, in the order of paths and lines.

    Args:
      pattern: a path or a glob (with ``**``).
      key: the key of the config that holds ``pattern``, for messages.
      word_column: the column of the words; columns count from 0, negative ones from the last.
      tag_column: the column of the tags.

    Raises:
      UserError: nothing matches, a file cannot be read or is not UTF-8, a line lacks a column or
        has an empty one, or there is no sentence.
    """
    paths = text_files.matches(pattern)
    if not paths:
        raise UserError(
            f"{key}: expected a file name or a glob of CoNLL files, but no file matches "
            f"{pattern!r}; correct the pattern ('**' reaches into subfolders)."
        )
    sentences = [
        sentence
        for path in paths
        for sentence in parse(text_files.read(path, key), path, key, word_column, tag_column)
    ]
    if not sentences:
        raise UserError(
            f"{key}: expected a word and a tag in every line, but the {len(paths)} file(s) that "
            f"match {pattern!r} have no words; name other files."
        )
    return sentences


def parse(
    content: str, path: str, key: str, word_column: int = 0, tag_column: int = -1
) -> Iterator[Sentence]:
    """Yields the sentences in the content of a file; see `read`.

    Args:
      content: the text.
      path: the file that it comes from, for messages.
      key: the key of the config that names it, for messages.
      word_column: see `read`.
      tag_column: see `read`.

    Raises:
      UserError: a line lacks a column, or has an empty one.
    """
    columns = {"word": word_column, "tag": tag_column}
    words: list[str] = []
    tags: list[str] = []
    for number, fields in _lines(content):
        if not fields and words:
            yield Sentence(tuple(words), tuple(tags))
            words, tags = [], []
        if not fields:
            continue
        places = {name: column % len(fields) for name, column in columns.items()}
        for name, column in columns.items():
            reaches = -len(fields) <= column < len(fields)
            if not reaches or places["word"] == places["tag"]:
                missing = name if not reaches else "tag"
                raise UserError(
                    f"{key}: expected a {missing} in column {columns[missing]} of every line, but "
                    f"line {number} of {path} has {len(fields)} column(s): "
                    f"{' '.join(fields)!r:.60}; correct data.{missing}_column or the line."
                )
            if not fields[column]:
                raise UserError(
                    f"{key}: expected a {name} in column {column} of every line, but it is empty "
                    f"in line {number} of {path}; correct data.{name}_column or the line."
                )
        words.append(fields[word_column])
        tags.append(fields[tag_column])
    if words:
        yield Sentence(tuple(words), tuple(tags))


def words_only(content: str, word_column: int = 0) -> list[tuple[str, ...]]:
    """Returns the words of each sentence of a CoNLL file that need not have tags.

    Args:
      content: the text of the file.
      word_column: the column of the words. A line that lacks it has no word.

    Raises:
      UserError: a word is empty.
    """
    sentences: list[list[str]] = [[]]
    for number, fields in _lines(content):
        if not fields:
            sentences.append([])
        elif -len(fields) <= word_column < len(fields):
            if not fields[word_column]:
                raise UserError(
                    f"expected a word in column {word_column} of every line, but it is empty in "
                    f"line {number}; add the word, or make the line blank."
                )
            sentences[-1].append(fields[word_column])
    return [tuple(words) for words in sentences if words]


def write(sentences: Iterable[Sentence]) -> str:
    """Returns sentences as the content of a file with the columns word and tag."""
    return "\n".join(
        "".join(f"{word}\t{tag}\n" for word, tag in zip(*sentence, strict=True))
        for sentence in sentences
    )


def _lines(content: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the number and the columns of each line; blank lines have none."""
    content = content.removeprefix("\ufeff")
    tabs = "\t" in content
    for number, line in enumerate(content.split("\n"), 1):
        line = line.rstrip("\r")
        if not line.strip():
            # Tabs with nothing around them are a line whose columns are empty.
            yield number, [""] * (line.count("\t") + 1) if "\t" in line else []
            continue
        if "\t" in line:
            fields = [field.strip() for field in line.split("\t")]
        elif tabs and line.startswith("#"):
            continue
        else:
            fields = _BLANKS.split(line.strip())
        if fields[0] == "-DOCSTART-" or (tabs and len(fields) > 8 and _RANGE.fullmatch(fields[0])):
            continue
        yield number, fields
