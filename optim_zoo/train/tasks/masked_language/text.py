"""Text to pretrain on: the user's own UTF-8 files, or the prose of Python's standard library.

A plain text file is one document. In a file of JSON lines, each line is one document.

The standard library is on every machine that runs Python, so a first run needs no download: its
help topics, docstrings and comments make about 3 MB of English. They are under the Python Software
Foundation licence (PSF-2.0), and differ a little between versions of Python.
"""

import ast
import inspect
import io
import json
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from optim_zoo.errors import UserError
from optim_zoo.train.tasks import text_files

_LAYOUT_TOKENS = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
_IGNORED_TOKENS = {tokenize.COMMENT, tokenize.NL}
# Lines under headings and in tables: no word, and the same sign four times in a row.
_RULED_LINE = re.compile(r"^(?=.*([^\w\s])\1{3})[^\w\n]*$\n?", re.MULTILINE)


def read(pattern: str, field: str = "") -> list[str]:
    """Returns the documents of the files that match a glob.

    A file of plain text is one document. With ``field`` every file holds JSON lines, and each line
    is one document. Documents come in the order of the paths and lines; blank ones are left out.

    Args:
      pattern: a path or a glob (with ``**``); "" selects `standard_library`. A file that is
        compressed with gzip is decompressed.
      field: the key of a JSON object that holds the text; "" for plain text.

    Raises:
      UserError: nothing matches, a file cannot be read or is not UTF-8, all text is blank, a file
        of JSON lines is read without ``field``, or a line has no text in that field.
    """
    if pattern == "":
        return standard_library()
    paths = text_files.matches(pattern)
    if not paths:
        raise UserError(
            f"text: expected a file name or a glob of text files, but no file matches {pattern!r}; "
            "correct the pattern ('**' reaches into subfolders), or use \"\" for the prose of "
            "Python's standard library."
        )
    documents = [
        document for path in paths for document in _documents(path, field) if document.strip()
    ]
    if not documents:
        raise UserError(
            f"text: expected text, but the {len(paths)} file(s) that match {pattern!r} hold only "
            "blanks; name other files."
        )
    return documents


def standard_library() -> list[str]:
    """Returns the help topics of `pydoc`, and the docstrings and comments of each module.

    The topics are in the order of their names, and the modules follow in the order of their paths.
    Each is one document. A paragraph that occurs in an earlier document is left out (topics quote
    one another, and licences recur), because a model could otherwise memorize the held-out part.

    Raises:
      UserError: Python was installed without its source.
    """
    from pydoc_data.topics import topics  # Imported lazily: it takes half a megabyte.

    root = Path(sysconfig.get_path("stdlib"))
    modules = [_prose(path) for path in text_files.library_modules(root)]
    if not any(modules):
        raise UserError(
            f"text: expected the standard library's source files in {root}, but found none that "
            "has docstrings; name your own text files instead."
        )
    seen: set[str] = set()
    documents = [
        "\n\n".join(_unseen(document, seen))
        for document in [*(topics[name] for name in sorted(topics)), *modules]
    ]
    return [document for document in documents if document]


def _documents(path: str, field: str) -> list[str]:
    """Returns the documents of one file."""
    content = text_files.read(path)
    if field:
        return [
            _text_of(line, field, f"line {number} of {path}")
            for number, line in enumerate(content.split("\n"), 1)
            if line.strip()
        ]
    fields = _json_fields(content)
    if fields is not None:
        raise UserError(
            f"text: expected plain text, but {path} holds JSON lines; name the field of the text "
            f"by data.field, one of {', '.join(fields) or 'the keys of its objects'}."
        )
    return [content]


def _json_fields(content: str) -> list[str] | None:
    """Returns the text fields of the JSON object in the first nonblank line, or None."""
    first = content.lstrip().partition("\n")[0]
    if not first.startswith("{"):
        return None
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        return None
    return [key for key, value in record.items() if isinstance(value, str)]


def _text_of(line: str, field: str, place: str) -> str:
    """Returns the text in a line of JSON."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"text: expected a JSON object in every line, as data.field={field} is set, but "
            f"{place} is none; leave the file out of the pattern, or data.field for plain text."
        ) from error
    value = record.get(field) if isinstance(record, dict) else None
    if not isinstance(value, str):
        keys = ", ".join(map(str, record)) if isinstance(record, dict) else "no fields"
        raise UserError(
            f"text: expected text in the field {field!r} of every line, but {place} has {keys}; "
            "correct data.field."
        )
    # JSON can escape a lone surrogate, which UTF-8 cannot encode.
    return value.encode("utf-8", "replace").decode("utf-8")


def _prose(path: Path) -> str:
    """Returns docstrings and block comments in source order; "" if the module does not parse."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        return "\n\n".join(_paragraphs(source))
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError, tokenize.TokenError):
        return ""


def _paragraphs(source: str) -> Iterator[str]:
    """Yields docstrings (any string that is a statement) and blocks of comment lines, each joined.

    This reads the tokens once. `ast` would take three times as long, and it drops comments.
    """
    comment: list[str] = []
    last_row = 0
    opening = True  # whether the next token begins a statement
    statement = ""  # the string token that began the current statement
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT and not token.line[:column].strip():
            words = _comment_words(token.string)
            if comment and (row != last_row + 1 or not words):
                yield " ".join(comment)
                comment = []
            comment += words
            last_row = row
        if token.type in _IGNORED_TOKENS:
            continue
        if comment:
            yield " ".join(comment)
            comment = []
        if token.type == tokenize.NEWLINE and statement:
            yield from _docstring(statement)
        statement = token.string if opening and token.type == tokenize.STRING else ""
        opening = token.type in _LAYOUT_TOKENS


def _comment_words(comment: str) -> list[str]:
    """Returns the words of a comment: none for separators, shebangs and encoding declarations."""
    if comment.startswith("#!") or "-*-" in comment:
        return []
    words = comment.lstrip("#:").split()
    return words if any(letter.isalpha() for letter in comment) else []


def _docstring(literal: str) -> Iterator[str]:
    """Yields the value of a string literal without its indentation, unless it is blank."""
    value = ast.literal_eval(literal)
    if isinstance(value, str) and value.strip():
        # An escape such as "\\ud800" is a lone surrogate, which UTF-8 cannot encode.
        yield inspect.cleandoc(value).encode("utf-8", "replace").decode("utf-8")


def _unseen(document: str, seen: set[str]) -> Iterator[str]:
    """Yields the paragraphs of a document that are not in ``seen``, and adds them to it."""
    for paragraph in re.split(r"\n\s*\n", _RULED_LINE.sub("", document)):
        words = " ".join(paragraph.split())
        if words and words not in seen:
            seen.add(words)
            yield paragraph.strip("\n")
