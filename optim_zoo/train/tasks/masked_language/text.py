"""Text to pretrain on: the user's own UTF-8 files, or the prose of Python's standard library.

The standard library is on every machine that runs Python, so a first run needs no download: its
help topics, docstrings and comments make about 3 MB of English. They are under the Python Software
Foundation licence (PSF-2.0), and differ a little between versions of Python.
"""

import ast
import glob
import inspect
import io
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from optim_zoo.errors import UserError

# Folders that are not the library's own prose: installed packages, tests, and programs whose
# comments are mostly test data.
_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "pydoc_data",
    "__pycache__",
}
_LAYOUT_TOKENS = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
_IGNORED_TOKENS = {tokenize.COMMENT, tokenize.NL}
# Rules under headings and in tables: a line without a word and with four of one sign in a row.
_RULED_LINE = re.compile(r"^(?=.*([^\w\s])\1{3})[^\w\n]*$\n?", re.MULTILINE)


def read(pattern: str) -> list[str]:
    """Documents of the files that match a glob (with `**`), or `standard_library()` for "".

    One document a file, in the order of the paths; files with only blank text are left out. Raises
    UserError where nothing matches, a file cannot be read or is not UTF-8, or all text is blank.
    """
    if pattern == "":
        return standard_library()
    paths = _matches(pattern)
    if not paths:
        raise UserError(
            f"text: expected a file name or a glob of text files, but no file matches {pattern!r}; "
            "correct the pattern ('**' reaches into subfolders), or use \"\" for the prose of "
            "Python's standard library."
        )
    documents = [document for document in map(_read_file, paths) if document.strip()]
    if not documents:
        raise UserError(
            f"text: expected text, but the {len(paths)} file(s) that match {pattern!r} hold only "
            "blanks; name other files."
        )
    return documents


def standard_library() -> list[str]:
    """The help topics of `pydoc` and, one document a module, docstrings and comments.

    The topics come in the order of their names, then the modules in the order of their paths. A
    paragraph that an earlier document has said already (topics quote one another, licences recur)
    is left out: it would let a model learn the held-out part by heart. Raises UserError where
    Python came without its source.
    """
    from pydoc_data.topics import topics  # half a megabyte, wanted here alone

    root = Path(sysconfig.get_path("stdlib"))
    modules = [_prose(path) for path in _modules(root)]
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


def _matches(pattern: str) -> list[str]:
    """Files that a pattern names, sorted; a file's own name may hold brackets."""
    pattern = os.path.expanduser(pattern)
    found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    return sorted(path for path in set(found) if os.path.isfile(path))


def _read_file(path: str) -> str:
    """The text of one file."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"text: expected UTF-8, but {path} has an invalid byte at offset {error.start}; "
            "convert the file or leave it out of the pattern."
        ) from error
    except OSError as error:
        raise UserError(
            f"text: expected a readable file, but {path} cannot be read ({error.strerror}); "
            "change its permissions or leave it out of the pattern."
        ) from error


def _modules(root: Path) -> list[Path]:
    """Source files of the library below `root`, sorted by their path inside it."""
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    return [root / path for path in sorted(paths) if _LEFT_OUT.isdisjoint(path.parts)]


def _prose(path: Path) -> str:
    """Docstrings and block comments of one module in source order; "" if it does not parse."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        return "\n\n".join(_paragraphs(source))
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError, tokenize.TokenError):
        return ""


def _paragraphs(source: str) -> Iterator[str]:
    """Docstrings (any string that is a statement of its own) and joined runs of comment lines.

    One pass over the tokens: three times faster than `ast`, which drops the comments besides.
    """
    comment: list[str] = []
    last_row = 0
    opening = True  # the next token begins a statement
    statement = ""  # a string token that began one
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
    """Words of a comment line; none for a separator, a shebang or an encoding declaration."""
    if comment.startswith("#!") or "-*-" in comment:
        return []
    words = comment.lstrip("#:").split()
    return words if any(letter.isalpha() for letter in comment) else []


def _docstring(literal: str) -> Iterator[str]:
    """The value of a string literal, its indentation removed."""
    value = ast.literal_eval(literal)
    if isinstance(value, str) and value.strip():
        # An escape such as "\\ud800" makes half a character, which no file could hold.
        yield inspect.cleandoc(value).encode("utf-8", "replace").decode("utf-8")


def _unseen(document: str, seen: set[str]) -> Iterator[str]:
    """Paragraphs of a document that are not in `seen`, to which they are added; no rules."""
    for paragraph in re.split(r"\n\s*\n", _RULED_LINE.sub("", document)):
        words = " ".join(paragraph.split())
        if words and words not in seen:
            seen.add(words)
            yield paragraph.strip("\n")
